"""IPO (Azar et al., arXiv 2310.12036, eq. 17), averaged over the K pairs of a group.

mean_n (h_n - 1 / (2 beta))^2 with h_n = (r_w - r_n) / beta, the difference of log-ratios; beta is the paper's tau.
"""

from torch import Tensor

from dmpo_dist.config.objective import IpoConfig
from dmpo_dist.objectives.groups import Groups
from dmpo_dist.objectives.preference import Preference


class Ipo(IpoConfig, Preference):
    """The positive a fixed distance ahead of each of its negatives, and no further."""

    def preference_loss(self, rewards: Tensor, negatives: Tensor, groups: Groups) -> Tensor:
        ahead = (groups.positive(rewards)[groups.group_id] - rewards) / self.beta  # (N,) h
        return groups.mean((ahead - 1 / (2 * self.beta)) ** 2, negatives)
