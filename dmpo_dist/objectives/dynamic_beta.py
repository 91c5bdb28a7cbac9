"""DynamicPO's dual-margin beta (Hu et al., arXiv 2605.00327): each boundary negative gets a beta of its own.

With the policy's log-probs p, w the positive, b a boundary negative and d the mean of the other negatives:

    first margin   m1 = p_w - p_b       second margin   m2 = p_b - p_d
    beta_b = beta * (1 + range * tanh((m1 - m2 - margin) / (|m1| + |m2|)))

so that beta falls for a negative which the policy hardly tells from the positive, and is not differentiated. Where all
negatives are boundary ones, d is their own mean. Formula and constants (range 0.5, margin 6) are those of the authors'
code, ``trainer/dynamicpo_trainer.py`` of xingyuHuxingyu/DynamicPO; the paper's text was not at hand. Where no negative
is above the positive, their code clusters the log-probs, and ours takes the hardest (``boundary_negatives``).
"""

import torch
from torch import Tensor

from dmpo_dist.objectives.groups import Groups


def beta_factors(policy: Tensor, boundary: Tensor, groups: Groups, reach: float, margin: float) -> Tensor:
    """(N,) beta_b / beta of each response; only those of the boundary negatives mean anything.

    Args:
        policy: (N,) log-probs, without a gradient.
        boundary: (N,) bool, the boundary negatives.
        reach: largest change of beta as a share of it.
        margin: in nats.
    """
    others = groups.negative & ~boundary
    none = (groups.sum(others.to(policy.dtype), others) == 0)[groups.group_id]
    easy = groups.mean(policy, torch.where(none, boundary, others))[groups.group_id]  # (N,)
    first, second = groups.positive(policy)[groups.group_id] - policy, policy - easy
    # Two margins of 0 leave the sign of -margin, as tanh is then at its end; with a margin of 0 too, beta is kept.
    change = (first - second - margin) / (first.abs() + second.abs())
    return 1 + reach * torch.tanh(change).nan_to_num(0.0)
