"""Group-relative policy gradient with a rank reward, GRPO-style: ReRe (arXiv 2510.12211), MiniOneRec (2510.24431).

A group is the positive and K titles that the model found by beam search. With R the reward of a response, A its
advantage, r = policy log-prob - reference log-prob, and the mean over the 1 + K responses of a group:

    R = 1 for the positive, -1 / log2(rank + 1) for the others      A = (R - mean R) / std R
    loss = - mean(A * exp(r - stop(r))) + kl * mean(r^2 / 2)

The gradient of the first term is -mean(A * grad log-prob), REINFORCE with the mean of the group as its baseline (Shao
et al., arXiv 2402.03300, without clipping: an update to a draw). That of the second is the gradient of KL(policy ||
reference) in expectation over the policy's own samples; beams are no samples, so here it is a penalty of the same form.

Ranks are those of the search. In the sources a group whose positive was not found has rewards of 0 throughout, and so
no gradient: ``target=generated`` keeps to that, and counts such groups as ``constant_reward``. The ranks' formula is
the papers' as published code and reports of it give it (the code of MiniOneRec also divides the penalties by their
sum); the papers themselves were not at hand.
"""

from typing import ClassVar

import torch
from torch import Tensor

from dmpo_dist.config.objective import RankRewardConfig
from dmpo_dist.objectives.groups import Groups
from dmpo_dist.objectives.likelihood import widen
from dmpo_dist.objectives.preference import SUMS, Preference


class RankReward(RankRewardConfig, Preference):
    """Advantages of rank rewards times log-probs, and a penalty on the distance from the reference."""

    takes_rewards: ClassVar[bool] = True
    """Whether groups that the model found titles for come with rewards, as their ``scores``."""

    @property
    def needs_reference(self) -> bool:
        return self.kl > 0

    @property
    def sums(self) -> tuple[str, ...]:
        """As of ``Preference``, and ``constant_reward`` (groups without a gradient) and ``kl`` (mean r^2 / 2)."""
        return (*SUMS, "constant_reward", "kl")

    def initial(self, policy: Tensor, groups: Groups) -> Tensor | None:
        """(G,) minus the mean advantage, 0 but for ``length_normalize``; None without a reference."""
        if not self.needs_reference:
            return None
        policy = widen(policy)
        return self.group_losses(torch.zeros_like(policy), policy, groups.negative, groups)

    def group_losses(self, rewards: Tensor, policy: Tensor, negatives: Tensor, groups: Groups) -> Tensor:
        """(G,) the formula above; ``rewards`` (N,) are r, divided by the tokens with ``length_normalize``."""
        all_ = torch.ones_like(groups.is_positive)
        advantages, constant = self._advantages(policy.detach(), groups)  # (N,), (G,)
        lengths = groups.lengths.to(rewards.dtype) if self.length_normalize else torch.ones_like(rewards)
        ratio = (rewards - rewards.detach()) * lengths  # (N,) r - stop(r): 0, with the gradient of a log-prob
        terms = -advantages * ratio.exp() / lengths
        if self.needs_reference:
            terms = terms + self.kl * (rewards * lengths) ** 2 / 2 / lengths
        return groups.mean(terms, all_).masked_fill(constant, 0.0)

    def __call__(
        self, policy: Tensor, reference: Tensor | None, groups: Groups, history: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, sums = super().__call__(policy, reference, groups, history)
        wide = widen(policy.detach())
        ratio = wide - widen(reference.detach()) if reference is not None else torch.zeros_like(wide)
        _, constant = self._advantages(wide, groups)
        kl = groups.mean(ratio**2 / 2, torch.ones_like(groups.is_positive)).sum()
        return loss, sums | {"constant_reward": constant.to(wide.dtype).sum(), "kl": kl}

    def _advantages(self, policy: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
        """(N,) advantages, and (G,) bool: groups in which all rewards are equal."""
        all_ = torch.ones_like(groups.is_positive)
        given = groups.scores
        rewards = rank_rewards(policy, groups) if given is None else given.to(policy.dtype)  # (N,)
        constant = groups.max(rewards, all_) == -groups.max(-rewards, all_)  # (G,)
        centred = rewards - groups.mean(rewards, all_)[groups.group_id]
        spread = groups.mean(centred**2, all_).sqrt().masked_fill(constant, 1.0)  # (G,)
        return centred / spread[groups.group_id], constant


def rank_rewards(policy: Tensor, groups: Groups) -> Tensor:
    """(N,) 1 for the positive, -1 / log2(rank + 1) for the others, by their ranks among a group's ``policy`` (N,).

    Equal log-probs have one rank, the best of theirs. It is what ``TokenGroup.scores`` says where titles were searched.
    """
    above = (policy[None] > policy[:, None]) & (groups.group_id[None] == groups.group_id[:, None])  # (N, N)
    ranks = 1 + above.sum(1).to(policy.dtype)
    return torch.where(groups.is_positive, torch.ones_like(policy), -1 / torch.log2(ranks + 1))
