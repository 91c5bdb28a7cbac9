"""SimPO (Meng et al., arXiv 2405.14734, eq. 6), averaged over the K pairs of a group.

mean_n softplus(r_n - r_w + gamma) with r = beta * log pi(y) / |y|: no reference, and log-probs by the token.
"""

from torch import Tensor

from dmpo_dist.config.objective import SimpoConfig
from dmpo_dist.objectives.groups import Groups
from dmpo_dist.objectives.preference import Preference


class Simpo(SimpoConfig, Preference):
    """The positive a target margin ahead of each of its negatives, by the mean log-prob of a token."""

    def preference_loss(self, rewards: Tensor, negatives: Tensor, groups: Groups) -> Tensor:
        margins = rewards - groups.positive(rewards)[groups.group_id] + self.gamma  # (N,)
        return groups.mean(self.smoothed(margins), negatives)
