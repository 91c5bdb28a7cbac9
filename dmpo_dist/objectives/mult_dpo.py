"""Mult-DPO and Mult2-DPO (Zhu et al., arXiv 2606.10078, eqs. 14 and 24): several positives, or levels of them.

For each level g but the last, with k_g responses at it:

    -sum_{i at g} r_i + k_g * log sum_{j at g or below} exp(r_j)

It is the likelihood that k_g independent draws give each response of the level once (a multinomial), and an upper bound
of the Plackett-Luce loss with the order within a level summed out. With one positive against negatives it is S-DPO.
The equations are those of a published summary of the paper with its numbering; the paper itself was not at hand.
"""

from typing import ClassVar

from torch import Tensor

from dmpo_dist.config.objective import MultDpoConfig
from dmpo_dist.objectives.groups import Groups
from dmpo_dist.objectives.preference import Preference


class MultDpo(MultDpoConfig, Preference):
    """Every response of a level drawn by a softmax over its own level and those below."""

    takes_levels: ClassVar[bool] = True

    def preference_loss(self, rewards: Tensor, negatives: Tensor, groups: Groups) -> Tensor:
        loss = rewards.new_zeros(groups.count)
        for at, below in groups.stages():
            total = groups.logsumexp(rewards, at | below)  # (G,)
            loss = loss + groups.sum(total[groups.group_id] - rewards, at)
        return loss
