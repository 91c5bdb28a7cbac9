"""Which response belongs to which group, and what sums, means and maxima over a group are."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """The responses of a batch, flat, so that K may differ from group to group.

    Attributes:
        group_id: (N,) int64 in [0, count), the group of each response.
        is_positive: (N,) bool, exactly one in a group. Among levels it is the first response of the best one, so that
            the likelihood, the statistics and what compares one positive with negatives have one to speak of.
        lengths: (N,) int64, scored tokens of each response.
        count: G, the number of groups.
        history_lengths: (G,) int64, scored tokens of each history; None or (0,) where none are scored.
        level: (N,) int64, 0 for the best responses of a group, larger for less preferred ones; None where each group
            has one positive, at level 0, and all others are at level 1.
        scores: (N,) how much each response is preferred, positive numbers (ratings, say), or for ``RankReward`` its
            reward; None where that is not known.
        n_levels: 1 + the largest level.
    """

    group_id: Tensor
    is_positive: Tensor
    lengths: Tensor
    count: int
    history_lengths: Tensor | None = None
    level: Tensor | None = None
    scores: Tensor | None = None
    n_levels: int = 2

    @property
    def negative(self) -> Tensor:
        """(N,) bool: every response below the best level."""
        return ~self.is_positive if self.level is None else self.level > 0

    def stages(self) -> Iterator[tuple[Tensor, Tensor]]:
        """For each level but the last, best first: (N,) bool of the responses at it, and (N,) bool of those below it.

        A group whose levels end earlier has nobody at a later one; its last level stands below, so that no group is
        empty there.
        """
        level = self.negative.long() if self.level is None else self.level
        last = self.max(level, torch.ones_like(self.is_positive))[self.group_id]  # (N,) of the response's group
        for number in range(self.n_levels - 1):
            at = (level == number) & (number < last)
            yield at, level > (last - 1).clamp(max=number)

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
        """(G,) maximum over the selected responses of each group, the lowest number where there are none."""
        lowest = -torch.inf if values.is_floating_point() else torch.iinfo(values.dtype).min
        out = values.new_full((self.count,), lowest)
        return out.scatter_reduce(0, self.group_id, torch.where(where, values, torch.full_like(values, lowest)), "amax")

    def logsumexp(self, values: Tensor, where: Tensor) -> Tensor:
        """(G,) log of the sum of exp over the selected responses of each group, of which there must be one."""
        # Subtracting each group's largest value keeps exp from overflowing; it cancels, so it needs no gradient.
        largest = self.max(values.detach(), where)  # (G,)
        shifted = torch.where(where, values - largest[self.group_id], torch.zeros_like(values))  # (N,)
        return self.sum(shifted.exp(), where).log() + largest

    def check(self) -> None:
        """Raise ValueError unless every group has exactly one positive, at level 0, and at least one negative."""
        ones = torch.ones_like(self.group_id)
        positives, negatives = self.sum(ones, self.is_positive), self.sum(ones, self.negative)
        if (positives != 1).any():
            group = int((positives != 1).nonzero()[0])
            raise ValueError(f"group {group} has {int(positives[group])} positives; exactly one is needed")
        if (negatives < 1).any():
            raise ValueError(f"group {int((negatives < 1).nonzero()[0])} has no negatives; at least one is needed")
        if self.level is not None and (self.level[self.is_positive] != 0).any():
            raise ValueError("a positive stands below level 0, which is the best")

    @property
    def has_lists(self) -> bool:
        """Whether a group has several responses at the best level, or more than two levels; waits for the device."""
        return self.level is not None and bool((self.level != (~self.is_positive).long()).any())


def boundary_negatives(policy: Tensor, groups: Groups) -> Tensor:
    """(N,) bool: negatives with log pi(y_n) >= log pi(y_w), or a group's hardest ones where there are none."""
    over = groups.negative & (policy >= groups.positive(policy)[groups.group_id])
    hardest = groups.max(policy, groups.negative)[groups.group_id]
    any_over = groups.max(over.to(policy.dtype), groups.negative)[groups.group_id] > 0
    return torch.where(any_over, over, groups.negative & (policy == hardest))
