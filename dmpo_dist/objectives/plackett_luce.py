"""Plackett-Luce over ordered lists (Rafailov et al., arXiv 2305.18290, appendix A.3).

For each response i above the last level: softplus(logsumexp_{j below}(r_j - r_i)), summed. In a list of single
responses that is -log of the probability that they are chosen in this order, each out of those that are left. Of two
responses it is DPO, of one against the rest S-DPO.

Responses that share a level have no order among them. Each is then compared with the levels below alone, as S-DPO does
with its positive: summing over all orders within a level takes 2^k terms for k responses (arXiv 2606.10078). The loss
is then an upper bound of that sum's, as the k events "this response is ahead of the rest" favour each other.
"""

from typing import ClassVar

from torch import Tensor

from dmpo_dist.config.objective import PlackettLuceConfig
from dmpo_dist.objectives.groups import Groups
from dmpo_dist.objectives.preference import Preference


class PlackettLuce(PlackettLuceConfig, Preference):
    """Every response against a softmax over the levels below it."""

    takes_levels: ClassVar[bool] = True

    def preference_loss(self, rewards: Tensor, negatives: Tensor, groups: Groups) -> Tensor:
        loss = rewards.new_zeros(groups.count)
        for at, below in groups.stages():
            rest = groups.logsumexp(rewards, below)  # (G,)
            loss = loss + groups.sum(self.smoothed(rest[groups.group_id] - rewards), at)
        return loss
