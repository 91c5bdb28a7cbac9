"""Whether a shared prompt gives a model's own log-probs: what is compared, and how far rounding alone may take it."""

from collections.abc import Sequence

import numpy as np
import torch

from dmpo_dist.batching.layout import group_cost
from dmpo_dist.data.tokenization import TokenGroup

COMPARED = 8
"""Most responses of a group that are compared: the longest, and others spread over the group."""


def probe(groups: Sequence[TokenGroup], token_budget: int) -> list[TokenGroup]:
    """A few responses of the group with the longest prompt, and where both fit into one row, of that with the shortest.

    The extremes, because positions, windows and what is packed beside a group can each go wrong by itself.
    """
    by_length = sorted(groups, key=lambda group: len(group.prefix))
    longest, shortest = _few_responses(by_length[-1]), _few_responses(by_length[0])
    tokens = group_cost(longest, shared=True).tokens + group_cost(shortest, shared=True).tokens
    return [longest, shortest] if len(groups) > 1 and tokens <= token_budget else [longest]


def disagreement(seen: Sequence[np.ndarray], expected: Sequence[np.ndarray], dtype: torch.dtype) -> str | None:
    """How log-probs behind a shared prompt differ from those of separate rows; None where that is rounding.

    Args:
        seen, expected: for each group (R,) float64.
        dtype: of the weights that computed them.
    """
    shared, separate = np.concatenate(seen), np.concatenate(expected)
    if not np.isfinite(separate).all():
        return None  # weights that diverged or are damaged say nothing of the layout; whoever uses the scores finds out
    error, allowed = np.abs(shared - separate), tolerance(separate, dtype)
    if (error <= allowed).all():  # not a number is no agreement
        return None
    worst = int(np.nanargmax(error - allowed)) if np.isfinite(error).any() else 0
    return (
        f"gives a title {shared[worst]:.4g} nats where its own row gives {separate[worst]:.4g} "
        f"(rounding in {str(dtype).removeprefix('torch.')} explains {allowed[worst]:.2g})"
    )


def tolerance(log_probs: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """(R,) nats by which summed ``log_probs`` may move where the same arithmetic is done in another order.

    A sum over tokens is as uncertain as it is large. On stories260K sums of up to 265 nats moved by at most .6 epsilon
    of their size in bf16 (.79 nats) and in fp16, and by 3 epsilon in fp32; so 2 epsilon in half types leaves a factor
    of 3. The constant term is for titles so likely that the rounding of logits (of some tens) is larger than they are.
    """
    epsilon = torch.finfo(dtype).eps
    return max(1e-4, 16 * epsilon) + np.abs(log_probs) * max(1e-5, 2 * epsilon)


def _few_responses(group: TokenGroup) -> TokenGroup:
    """``group`` with at most ``COMPARED`` of its responses."""
    lengths = [len(branch) for branch in group.branches]
    spread = np.linspace(0, len(lengths) - 1, min(COMPARED - 1, len(lengths))).astype(int).tolist()
    few = sorted({lengths.index(max(lengths)), *spread})
    return TokenGroup(group.prefix, tuple(group.branches[i] for i in few), tuple(group.scored_from[i] for i in few))
