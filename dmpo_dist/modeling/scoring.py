"""Log-probs of token groups by one forward function, for each way of laying them out.

``score_micro_batches``  many groups in a row, each prompt once (or every response as a row of its own).
``node_log_probs``       one prompt with thousands of responses behind it, as a trie of their tokens.
``score_rows``           one group, every response a row with the whole prompt: the plain way, for any model.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dmpo_dist.batching.layout import Cost, Layout, group_cost, lay_out, rows_layout
from dmpo_dist.batching.plan import MicroBatch, deal
from dmpo_dist.batching.targets import single_targets
from dmpo_dist.batching.trie import PromptMemory, TitleTrie, prompt_part, trie_part
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.modeling.logprobs import AnyLayout

Forward = Callable[[AnyLayout], Tensor]
"""Any layout -> (R,) log-probs of its responses, as a ``LogProbModel`` gives them."""


def deal_for_scoring(
    groups: Sequence[TokenGroup], world_size: int, token_budget: int, shared: bool
) -> tuple[tuple[MicroBatch, ...], ...]:
    """For each rank its micro-batches, the same number on every rank; a group over the budget gets its own."""
    costs: list[Cost] = [group_cost(group, shared) for group in groups]
    budget = max(token_budget, max(cost.tokens for cost in costs))
    return deal(range(len(groups)), costs, world_size, budget).micro_batches


@torch.no_grad()
def score_micro_batches(
    forward: Callable[[Layout], Tensor],
    groups: Sequence[TokenGroup],
    micro_batches: Iterable[MicroBatch],
    shared: bool,
    device: torch.device,
) -> Iterator[tuple[int, np.ndarray]]:
    """(group index, (K+1,) float64 log-probs) for the groups of ``micro_batches``; fillers are run and left out."""
    for micro_batch in micro_batches:
        members = [groups[index] for index in micro_batch.groups]
        scores = forward(lay_out(members, shared).to(device)).double().cpu()
        if micro_batch.filler:
            continue
        parts = scores.split([len(group.branches) for group in members])
        yield from zip(micro_batch.groups, (part.numpy() for part in parts), strict=True)


@torch.no_grad()
def node_log_probs(
    forward: Forward, prefix: list[int], trie: TitleTrie, token_budget: int, device: torch.device
) -> np.ndarray:
    """(N,) float64 log-prob of each node's token behind ``prefix`` and its ancestors.

    Args:
        forward: of a model whose attention is ``trie_attention``.
        token_budget: most tokens in a row behind the prompt.
    """
    memory: PromptMemory = {}  # the prompt's keys and values, written by its own part and read by all that follow
    out = np.empty(len(trie.token))
    out[trie.children(np.array([-1]))] = _numbers(forward(prompt_part(prefix, trie, memory).to(device)))
    for nodes in trie.chunks(token_budget):
        part = trie_part(trie, nodes, len(prefix), memory).to(device)
        out[trie.children(nodes)] = _numbers(forward(part))
    return out


@torch.no_grad()
def score_rows(forward: Forward, group: TokenGroup, token_budget: int, device: torch.device) -> np.ndarray:
    """(R,) float64 of the responses of ``group``, at most ``token_budget`` tokens or one response at a time."""
    size = max(1, token_budget // (len(group.prefix) + max(map(len, group.branches))))
    parts = [
        TokenGroup(group.prefix, group.branches[start : start + size], group.scored_from[start : start + size])
        for start in range(0, len(group.branches), size)
    ]
    return np.concatenate([_numbers(forward(rows_layout([part]).to(device))) for part in parts])


def per_token(layout: Layout) -> Layout:
    """``layout`` with every scored token as a response of its own, in the order branch by branch.

    A ``LogProbModel`` then gives (N,) log-probs instead of (R,) sums, by the same forward pass. Meant for groups of one
    response and without scored histories: group ids and positives have no meaning here.
    """
    targets = layout.targets
    single = single_targets(targets.predict_index, targets.target_row, targets.target_ids)
    return replace(layout, targets=single, reference_targets=None)


def _numbers(log_probs: Tensor) -> np.ndarray:
    return log_probs.double().cpu().numpy()
