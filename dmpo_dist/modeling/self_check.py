"""Whether a shared prompt gives a model's own log-probs: what is compared, and how far rounding alone may take it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from dmpo_dist.batching.layout import group_cost
from dmpo_dist.data.tokenization import TokenGroup

HALF_TYPES = (torch.bfloat16, torch.float16)
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


def confirmed(
    compare: Callable[[torch.dtype], str | None], module: torch.nn.Module, dtype: torch.dtype, can_widen: bool = True
) -> str | None:
    """What ``compare`` finds, unless it finds nothing once the half types of ``module`` are fp32.

    How far rounding takes a half type depends on the model: sums of Gemma 3 270M of 17 nats moved by .54 nats, twice
    what is allowed. A layout that is wrong is wrong in fp32 too, where rounding is no longer an excuse.

    Args:
        compare: ``disagreement`` of the module, for its weights in the type it is given.
        dtype: of the weights.
        can_widen: False where the weights are in parts or quantized, so that what was found stands.
    """
    found = compare(dtype)
    if found is None or dtype not in HALF_TYPES or not can_widen:
        return found
    try:
        with fp32_weights(module):
            return compare(torch.float32)
    except torch.OutOfMemoryError:
        return found


@contextmanager
def fp32_weights(module: torch.nn.Module) -> Iterator[None]:
    """The half-type weights and buffers of ``module`` in fp32, then the same tensors as before, bit for bit.

    Takes 4 bytes more for each of them.
    """
    before = [(t, t.data) for t in (*module.parameters(), *module.buffers()) if t.dtype in HALF_TYPES]
    try:
        for tensor, data in before:
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


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
