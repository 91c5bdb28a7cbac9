"""Ranking the validation requests with all ranks."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dmpo_dist.batching.layout import Layout, group_cost
from dmpo_dist.batching.plan import deal
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.evaluation.metrics import ranking_metrics
from dmpo_dist.training.groups import lay_out

METRICS = ("ndcg@10", "hr@1", "hr@10", "mrr", "auc")


def rank_with_all(
    log_probs: Callable[[Layout], Tensor],
    groups: Sequence[TokenGroup],
    rank: int,
    world_size: int,
    token_budget: int,
    shared: bool,
    device: torch.device,
) -> dict[str, float]:
    """Mean ranking metrics of ``groups`` (positive first in each), every one scored by exactly one rank.

    All ranks run the same number of forwards, as ZeRO-3 needs.
    """
    if not groups:
        return {}
    costs = [group_cost(group, shared) for group in groups]
    budget = max(token_budget, max(cost.tokens for cost in costs))
    step = deal(range(len(groups)), costs, world_size, budget)
    scores: list[np.ndarray] = []
    with torch.no_grad():
        for micro_batch in step.micro_batches[rank]:
            layout = lay_out([groups[g] for g in micro_batch.groups], shared).to(device)
            scored = log_probs(layout).double().cpu()
            if not micro_batch.filler:
                scores += split_by_group(scored, layout.targets.group_id.cpu())
    sums = torch.zeros(len(METRICS) + 1, dtype=torch.float64, device=device)
    if scores:
        values = ranking_metrics(scores)
        sums += torch.tensor([*(values[m].sum() for m in METRICS), len(scores)], dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    *totals, count = sums.tolist()
    return {metric: total / count for metric, total in zip(METRICS, totals, strict=True)}


def split_by_group(scores: Tensor, group_id: Tensor) -> list[np.ndarray]:
    """(R,) scores -> one array per group, in row order."""
    sizes = torch.bincount(group_id).tolist()
    return [part.numpy() for part in scores.split(sizes)]
