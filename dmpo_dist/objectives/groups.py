"""Which response belongs to which group, and what sums, means and maxima over a group are."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """The responses of a batch, flat, so that K may differ from group to group.

    Attributes:
        group_id: (N,) int64 in [0, count), the group of each response.
        is_positive: (N,) bool, exactly one in a group; the others are its negatives.
        lengths: (N,) int64, scored tokens of each response.
        count: G, the number of groups.
        history_lengths: (G,) int64, scored tokens of each history; None or (0,) where none are scored.
    """

    group_id: Tensor
    is_positive: Tensor
    lengths: Tensor
    count: int
    history_lengths: Tensor | None = None

    @property
    def negative(self) -> Tensor:
        """(N,) bool: every negative."""
        return ~self.is_positive

    def positive(self, values: Tensor) -> Tensor:
        """(G,) the value of each group's positive among ``values`` (N,); indexed by ``group_id`` it is (N,) again."""
        return self.sum(values, self.is_positive)

    def sum(self, values: Tensor, where: Tensor) -> Tensor:
        """(G,) sum of ``values`` (N,) over the responses of each group selected by ``where`` (N,) bool."""
        out = values.new_zeros(self.count)
        return out.index_add(0, self.group_id, torch.where(where, values, torch.zeros_like(values)))

    def mean(self, values: Tensor, where: Tensor) -> Tensor:
        """(G,) mean over the selected responses of each group, of which there must be one."""
        return self.sum(values, where) / self.sum(torch.ones_like(values), where)

    def max(self, values: Tensor, where: Tensor) -> Tensor:
        """(G,) maximum over the selected responses of each group, -inf where there are none."""
        low = torch.full_like(values, -torch.inf)
        out = values.new_full((self.count,), -torch.inf)
        return out.scatter_reduce(0, self.group_id, torch.where(where, values, low), "amax")

    def check(self) -> None:
        """Raise ValueError unless every group has exactly one positive and at least one negative."""
        ones = torch.ones_like(self.group_id)
        positives, negatives = self.sum(ones, self.is_positive), self.sum(ones, self.negative)
        if (positives != 1).any():
            group = int((positives != 1).nonzero()[0])
            raise ValueError(f"group {group} has {int(positives[group])} positives; exactly one is needed")
        if (negatives < 1).any():
            raise ValueError(f"group {int((negatives < 1).nonzero()[0])} has no negatives; at least one is needed")


def boundary_negatives(policy: Tensor, groups: Groups) -> Tensor:
    """(N,) bool: negatives with log pi(y_n) >= log pi(y_w), or a group's hardest ones where there are none."""
    over = groups.negative & (policy >= groups.positive(policy)[groups.group_id])
    hardest = groups.max(policy, groups.negative)[groups.group_id]
    any_over = groups.max(over.to(policy.dtype), groups.negative)[groups.group_id] > 0
    return torch.where(any_over, over, groups.negative & (policy == hardest))
