"""S-DPO (Chen et al., arXiv 2406.09215): softplus(logsumexp_n(r_n - r_w))."""

import torch
from torch import Tensor

from dmpo_dist.config.objective import SdpoConfig
from dmpo_dist.objectives.groups import Groups
from dmpo_dist.objectives.preference import Preference


class Sdpo(SdpoConfig, Preference):
    """The positive against a softmax over its negatives."""

    def preference_loss(self, rewards: Tensor, negatives: Tensor, groups: Groups) -> Tensor:
        # Subtracting each group's largest negative keeps exp from overflowing; it cancels, so it needs no gradient.
        largest = groups.max(rewards.detach(), negatives)  # (G,)
        shifted = torch.where(negatives, rewards - largest[groups.group_id], torch.zeros_like(rewards))  # (N,)
        log_sum = groups.sum(shifted.exp(), negatives).log() + largest  # (G,)
        return self.smoothed(log_sum - groups.positive(rewards))
