"""DMPO (Bai et al., arXiv 2405.16127): softplus(mean_n r_n - r_w)."""

from torch import Tensor

from dmpo_dist.config.objective import DmpoConfig
from dmpo_dist.objectives.groups import Groups
from dmpo_dist.objectives.preference import Preference


class Dmpo(DmpoConfig, Preference):
    """The positive against the mean of its negatives."""

    def preference_loss(self, rewards: Tensor, negatives: Tensor, groups: Groups) -> Tensor:
        return self.smoothed(groups.mean(rewards, negatives) - groups.positive(rewards))
