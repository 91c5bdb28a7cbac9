"""Ranking the validation requests with all ranks."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dmpo_dist.batching.layout import Layout
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.evaluation.metrics import ranking_metrics
from dmpo_dist.evaluation.scoring import deal_for_scoring, score_micro_batches

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
    mine = deal_for_scoring(groups, world_size, token_budget, shared)[rank]
    scores = [scored for _, scored in score_micro_batches(log_probs, groups, mine, shared, device)]
    sums = torch.zeros(len(METRICS) + 1, dtype=torch.float64, device=device)
    if scores:
        values = ranking_metrics(scores)
        sums += torch.tensor([*(values[m].sum() for m in METRICS), len(scores)], dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    *totals, count = sums.tolist()
    return {metric: total / count for metric, total in zip(METRICS, totals, strict=True)}
