"""S-DPO (Chen et al., arXiv 2406.09215): softplus(logsumexp_n(r_n - r_w))."""

from torch import Tensor

from dmpo_dist.config.objective import SdpoConfig
from dmpo_dist.objectives.groups import Groups
from dmpo_dist.objectives.preference import Preference


class Sdpo(SdpoConfig, Preference):
    """The positive against a softmax over its negatives."""

    def preference_loss(self, rewards: Tensor, negatives: Tensor, groups: Groups) -> Tensor:
        return self.smoothed(groups.logsumexp(rewards, negatives) - groups.positive(rewards))
