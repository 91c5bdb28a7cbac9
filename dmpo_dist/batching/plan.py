"""Which groups form an optimizer step, and how ranks and micro-batches divide them.

A plan is a pure function of its arguments. The set of groups in step s depends on (costs, seed, global batch size)
alone; world size and token budget only decide who computes what. Resuming at step s is arithmetic: ``step(s)``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dmpo_dist.batching.layout import Cost
from dmpo_dist.errors import UserError

PAIR_WEIGHT = 1 / 512
"""Cost of an attention pair next to that of a token through the linear layers (of a small to medium model)."""


@dataclass(frozen=True)
class MicroBatch:
    """Groups that share a row; a filler keeps ranks in step and counts with weight 0."""

    groups: tuple[int, ...]
    filler: bool = False


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        epoch: the epoch it belongs to (which selects the negatives).
        groups: all groups of the step, over all ranks.
        micro_batches: for each rank its micro-batches, the same number on every rank.
        imbalance: cost of the busiest rank over the mean, minus 1.
    """

    epoch: int
    groups: tuple[int, ...]
    micro_batches: tuple[tuple[MicroBatch, ...], ...]
    imbalance: float


@dataclass(frozen=True)
class Schedule:
    """The order of groups: which belong to step s, for any number of epochs.

    An epoch is one seeded permutation of all groups cut into ceil(n / global_batch_size) steps whose sizes differ by
    one at most, so that every group comes exactly once and no step is a small remainder.
    """

    n_groups: int
    global_batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.n_groups < 1:
            raise UserError("there are no training groups; see the data card for what was filtered out")

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.n_groups // self.global_batch_size)

    @property
    def smallest_step(self) -> int:
        """Groups in an epoch's smallest step."""
        return self.n_groups // self.steps_per_epoch

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def groups(self, step: int) -> tuple[int, ...]:
        """The groups of optimizer step ``step`` (counted from 0 over all epochs)."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = _epoch_order(self.n_groups, self.seed, epoch)
        return tuple(int(g) for g in np.array_split(order, self.steps_per_epoch)[within])


def deal(groups: Sequence[int], costs: Sequence[Cost], world_size: int, token_budget: int, epoch: int = 0) -> Step:
    """Deal a step's groups to ranks by cost and pack each rank's share into micro-batches.

    Args:
        groups: indices of the step's groups.
        costs: cost of each of ``groups``, in the same order.
        world_size: number of ranks.
        token_budget: most tokens in a micro-batch.
        epoch: carried along.

    Raises:
        UserError: a group alone exceeds the budget.
    """
    cost = dict(zip(groups, costs, strict=True))
    largest = max(cost.values(), key=lambda c: c.tokens)
    if largest.tokens > token_budget:
        raise UserError(
            f"a preference group takes {largest.tokens} tokens, more than the token budget of {token_budget}; raise "
            "token_budget, or lower the number of negatives, model.max_length or data.max_history"
        )
    by_cost = sorted(groups, key=lambda g: (-_weight(cost[g]), g))
    loads = [0.0] * world_size
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for group in by_cost:  # longest processing time first
        rank = loads.index(min(loads))
        shares[rank].append(group)
        loads[rank] += _weight(cost[group])
    packed = [_pack(share, cost, token_budget) for share in shares]
    count = max(len(micro_batches) for micro_batches in packed)
    filler = MicroBatch((by_cost[-1],), filler=True)
    return Step(
        epoch=epoch,
        groups=tuple(groups),
        micro_batches=tuple(tuple(m) + (filler,) * (count - len(m)) for m in packed),
        imbalance=max(loads) * world_size / sum(loads) - 1,
    )


@lru_cache(maxsize=4)
def _epoch_order(n_groups: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n_groups)


def _pack(share: Sequence[int], cost: dict[int, Cost], token_budget: int) -> list[MicroBatch]:
    """First fit, largest first."""
    bins: list[list[int]] = []
    room: list[int] = []
    for group in sorted(share, key=lambda g: (-cost[g].tokens, g)):
        tokens = cost[group].tokens
        place = next((i for i, free in enumerate(room) if tokens <= free), None)
        if place is None:
            bins.append([])
            room.append(token_budget)
            place = len(bins) - 1
        bins[place].append(group)
        room[place] -= tokens
    return [MicroBatch(tuple(groups)) for groups in bins]


def _weight(cost: Cost) -> float:
    return cost.tokens + PAIR_WEIGHT * cost.pairs
