"""Supervised fine-tuning: the likelihood of each group's positive, and of its history where that is scored."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dmpo_dist.objectives.groups import Groups


@dataclass(frozen=True)
class Likelihood:
    """Mean-token negative log-likelihood; see ``Loss``."""

    scores_history: bool = False
    sums = ("loss", "logp_positive")
    needs_reference = False

    def initial(self, policy: Tensor, groups: Groups) -> None:
        """None: a model's likelihood is not known in advance."""

    def __call__(
        self, policy: Tensor, reference: Tensor | None, groups: Groups, history: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        policy = widen(policy)
        loss = mean_token_nll(policy, groups, history).sum()
        return loss, {"loss": loss.detach(), "logp_positive": groups.positive(policy.detach()).sum()}


def mean_token_nll(policy: Tensor, groups: Groups, history: Tensor | None) -> Tensor:
    """(G,) mean over the tokens of the positive, and of the history where there is one."""
    total, tokens = groups.positive(policy), groups.positive(groups.lengths)
    if history is not None and groups.history_lengths is not None and len(history):
        total, tokens = total + history, tokens + groups.history_lengths
    return -total / tokens


def widen(log_probs: Tensor) -> Tensor:
    """Half types become fp32: a softplus of bf16 sums would lose the third digit."""
    return log_probs if log_probs.dtype in (torch.float32, torch.float64) else log_probs.float()
