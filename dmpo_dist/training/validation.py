"""Ranking the validation requests with all ranks."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dmpo_dist.batching.layout import Layout
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.metrics import ranking_metrics
from dmpo_dist.modeling.scoring import deal_for_scoring, score_micro_batches

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

    Raises:
        UserError: on every rank, if a score on any rank is not finite.
    """
    if not groups:
        return {}
    own = deal_for_scoring(groups, world_size, token_budget, shared)[rank]
    scores = [scored for _, scored in score_micro_batches(log_probs, groups, own, shared, device)]
    finite = [candidates for candidates in scores if np.isfinite(candidates).all()]
    totals = [len(scores) - len(finite), len(finite)]
    values = ranking_metrics(finite) if finite else {}
    totals += [values[metric].sum() if finite else 0.0 for metric in METRICS]
    reduced = torch.tensor(totals, dtype=torch.float64, device=device)
    dist.all_reduce(reduced)
    broken, count, *sums = reduced.tolist()
    if broken:
        raise UserError(
            f"{int(broken)} of {len(groups)} validation requests have scores that are not finite: training diverged; "
            "lower the learning rate or max_grad_norm, or train in float32"
        )
    return {metric: total / count for metric, total in zip(METRICS, sums, strict=True)}
