"""RecPO (Ouyang et al., arXiv 2506.02261): S-DPO with a margin for each negative, by ratings and times.

softplus(logsumexp_n(r_n - r_w + margin_weight * u_w / u_n)), where u is how much a response is preferred: the rating s
over a power of the delay t, u = s / t^0.5. Rows bring u as their scores (``data.levels``, ``data.score_decay``). With
margin_weight = 0 it is S-DPO. On rows with levels the first response of the best one is the positive and all lower
levels are negatives, as in the authors' data, whose best-scored title is compared with every other one.

The formula of the margin is that of a published summary of the paper (lambda * phi(s_p, t_p) / phi(s_d, t_d), lambda 2)
and the one that the authors' code has as ``ratio``; the paper itself was not at hand.
"""

from typing import ClassVar

from torch import Tensor

from dmpo_dist.config.objective import RecpoConfig
from dmpo_dist.objectives.groups import Groups
from dmpo_dist.objectives.preference import Preference


class Recpo(RecpoConfig, Preference):
    """The positive ahead of each negative by a margin that grows with how much it is preferred."""

    takes_levels: ClassVar[bool] = True

    @property
    def needs_scores(self) -> bool:
        return self.margin_weight > 0

    def preference_loss(self, rewards: Tensor, negatives: Tensor, groups: Groups) -> Tensor:
        if self.needs_scores:
            if groups.scores is None:
                raise ValueError("Recpo needs scores; give them, or set margin_weight=0, which is S-DPO")
            scores = groups.scores.to(rewards.dtype)
            rewards = rewards + self.margin_weight * self._ratio(scores, groups)
        return self.smoothed(groups.logsumexp(rewards, negatives) - groups.positive(rewards))

    def _ratio(self, scores: Tensor, groups: Groups) -> Tensor:
        """(N,) the positive's score over each negative's; 0 for the positive, which has no margin over itself."""
        return (groups.positive(scores)[groups.group_id] / scores).masked_fill(groups.is_positive, 0.0)
