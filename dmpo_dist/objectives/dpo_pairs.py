"""DPO (Rafailov et al., arXiv 2305.18290), averaged over the K pairs of a group: mean_n softplus(r_n - r_w)."""

from torch import Tensor

from dmpo_dist.config.objective import DpoPairsConfig
from dmpo_dist.objectives.groups import Groups
from dmpo_dist.objectives.preference import Preference


class DpoPairs(DpoPairsConfig, Preference):
    """The positive against each of its negatives."""

    def preference_loss(self, rewards: Tensor, negatives: Tensor, groups: Groups) -> Tensor:
        return groups.mean(self.smoothed(rewards - groups.positive(rewards)[groups.group_id]), negatives)
