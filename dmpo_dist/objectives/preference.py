"""What the preference objectives share: rewards, the choice of negatives, the likelihood term, and what is reported.

With r = beta * (policy - reference), w the positive and n the negatives of a group, s = softplus:

    dmpo       s(mean_n r_n - r_w)          Bai et al., arXiv 2405.16127
    sdpo       s(logsumexp_n(r_n - r_w))    Chen et al., arXiv 2406.09215
    dpo_pairs  mean_n s(r_n - r_w)          Rafailov et al., arXiv 2305.18290, averaged over the K pairs

The others, among them those that take several positives and ordered lists, say theirs in their files.
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from dmpo_dist.config.objective import PreferenceOptions
from dmpo_dist.objectives.dynamic_beta import beta_factors
from dmpo_dist.objectives.groups import Groups, boundary_negatives
from dmpo_dist.objectives.likelihood import mean_token_nll, widen

SUMS = (
    "loss", "preference_loss", "margin", "accuracy", "reward_accuracy", "reward_positive", "reward_negative",
    "logp_positive", "logp_negative", "negatives",
)  # fmt: skip


class Preference(PreferenceOptions):
    """A loss of one positive against K negatives, with the options of ``PreferenceOptions``; see ``Loss``.

    A subclass gives ``preference_loss``. What is reported, each a sum over groups: ``loss``, ``preference_loss``
    (without the likelihood term), ``margin`` (r_w - mean r_n), ``accuracy`` (share of negatives the policy rates below
    the positive), ``reward_accuracy`` (the same for r), ``reward_positive`` and ``reward_negative`` (r_w, mean r_n),
    ``logp_positive``, ``logp_negative`` (mean over negatives) and ``negatives`` (K kept). Among levels the positive is
    the first response of the best one, and the negatives are all responses of lower ones.
    """

    takes_levels: ClassVar[bool] = False
    """Whether several positives and more than two levels have a meaning for it."""

    @property
    def needs_scores(self) -> bool:
        """Whether it needs ``Groups.scores``."""
        return False

    @property
    def sums(self) -> tuple[str, ...]:
        return SUMS

    @property
    def needs_reference(self) -> bool:
        return not self.reference_free

    @property
    def scores_history(self) -> bool:
        return self.sft_weight > 0 and self.sft_loss_on == "all_titles"

    @property
    def likelihood_weight(self) -> float:
        """Of the positive's mean-token negative log-likelihood in the loss."""
        return self.sft_weight

    def preference_loss(self, rewards: Tensor, negatives: Tensor, groups: Groups) -> Tensor:
        """(G,) the loss of each group without the likelihood term.

        Args:
            rewards: (N,) r of each response.
            negatives: (N,) bool, the negatives that count.
            groups: which response belongs to which group.
        """
        raise NotImplementedError

    def initial(self, policy: Tensor, groups: Groups) -> Tensor | None:
        """(G,) the formula at r = 0, which is what a policy equal to its reference has: log 2 for dmpo and dpo_pairs,
        log(1 + K) for sdpo. None where there is no reference."""
        if not self.needs_reference:
            return None
        policy = widen(policy)
        return self.preference_loss(torch.zeros_like(policy), self._selected(policy, groups), groups)

    def group_losses(self, rewards: Tensor, policy: Tensor, negatives: Tensor, groups: Groups) -> Tensor:
        """(G,) ``preference_loss`` of the rewards as ``dynamic_beta`` scales them, by the log-probs ``policy`` (N,)."""
        return self.preference_loss(self._scaled(rewards, policy, negatives, groups), negatives, groups)

    def __call__(
        self, policy: Tensor, reference: Tensor | None, groups: Groups, history: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As ``Loss``.

        Raises:
            ValueError: a group without exactly one positive and at least one negative, or with levels that the
                objective does not take (checked on the CPU only, where it costs no synchronisation).
        """
        if policy.device.type == "cpu":
            groups.check()
            if groups.has_lists and not self.takes_levels:
                raise ValueError(f"{type(self).__name__} takes one positive and its negatives; for levels take MultDpo")
        policy = widen(policy)
        ratio = policy
        if self.needs_reference:
            if reference is None:
                raise ValueError(f"{type(self).__name__} needs reference log-probs")
            ratio = policy - widen(reference.detach())
        rewards = self.beta * (ratio / groups.lengths if self.length_normalize else ratio)  # (N,)
        negatives = self._selected(policy, groups)  # (N,) bool
        preference = self.group_losses(rewards, policy, negatives, groups)  # (G,)
        total, weight = preference, self.likelihood_weight
        if weight:
            total = preference + weight * mean_token_nll(policy, groups, history)
        loss = total.sum()
        return loss, {
            "loss": loss.detach(),
            "preference_loss": preference.detach().sum(),
            "negatives": negatives.to(policy.dtype).sum(),
            **_statistics(policy.detach(), rewards.detach(), groups),
        }

    def smoothed(self, z: Tensor) -> Tensor:
        """softplus(z), mixed with the loss of the flipped preference."""
        e = self.label_smoothing
        return (1 - e) * softplus(z) + e * softplus(-z) if e else softplus(z)

    def _scaled(self, rewards: Tensor, policy: Tensor, negatives: Tensor, groups: Groups) -> Tensor:
        """(N,) rewards that lie as far from their positive's as ``dynamic_beta`` says; as they are without it."""
        if not self.dynamic_beta:
            return rewards
        factors = beta_factors(policy.detach(), negatives, groups, self.dynamic_beta, self.dynamic_beta_margin)
        positive = groups.positive(rewards)[groups.group_id]
        return torch.where(negatives, positive + factors * (rewards - positive), rewards)

    def _selected(self, policy: Tensor, groups: Groups) -> Tensor:
        """(N,) bool: the negatives that count."""
        return groups.negative if self.negative_selection == "all" else boundary_negatives(policy.detach(), groups)


def _statistics(policy: Tensor, rewards: Tensor, groups: Groups) -> dict[str, Tensor]:
    negative = groups.negative
    k = groups.sum(torch.ones_like(policy), negative)  # (G,), counted once for all four means
    positive, positive_reward = groups.positive(policy), groups.positive(rewards)  # (G,)
    below = (policy < positive[groups.group_id]).to(policy.dtype)
    reward_below = (rewards < positive_reward[groups.group_id]).to(policy.dtype)
    negative_reward = groups.sum(rewards, negative) / k  # (G,)
    return {
        "margin": (positive_reward - negative_reward).sum(),
        "accuracy": (groups.sum(below, negative) / k).sum(),
        "reward_accuracy": (groups.sum(reward_below, negative) / k).sum(),
        "reward_positive": positive_reward.sum(),
        "reward_negative": negative_reward.sum(),
        "logp_positive": positive.sum(),
        "logp_negative": (groups.sum(policy, negative) / k).sum(),
    }
