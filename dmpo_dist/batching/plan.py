"""Which groups form an optimizer step, and how ranks and micro-batches divide them.

A plan is a pure function of its arguments. The set of groups in step s depends on (number of groups, seed, global
batch size) alone; world size and token budget only decide which rank computes which of them. So a resumed run computes
the groups of step s from s and needs no saved state of a data loader.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dmpo_dist.batching.layout import Cost
from dmpo_dist.errors import UserError

PAIR_WEIGHT = 1 / 512
"""Cost of a (query, key) pair relative to a token's cost in the linear layers, for small to medium models."""


@dataclass(frozen=True)
class MicroBatch:
    """Groups that run together in one row.

    A filler is run only because collectives need every rank to run the same number of rows; its weight is 0.
    """

    groups: tuple[int, ...]
    filler: bool = False


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        epoch: the epoch it belongs to (which selects the negatives).
        groups: all groups of the step, over all ranks.
        micro_batches: for each rank its micro-batches; every rank has the same number of them.
        imbalance: cost of the busiest rank / mean cost of a rank - 1.
    """

    epoch: int
    groups: tuple[int, ...]
    micro_batches: tuple[tuple[MicroBatch, ...], ...]
    imbalance: float


@dataclass(frozen=True)
class Schedule:
    """The order of groups: which of them belong to step s, for any number of epochs.

    An epoch is a seeded permutation of all groups, cut into ceil(n / global_batch_size) steps whose sizes differ by
    one at most. So every group occurs once per epoch and no step is a small remainder.
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
    """Divide a step's groups among ranks by cost and pack each rank's share into micro-batches.

    Args:
        groups: indices of the step's groups.
        costs: cost of each of ``groups``, in the same order.
        world_size: number of ranks.
        token_budget: most tokens in a micro-batch.
        epoch: copied into the step.

    Raises:
        UserError: a single group exceeds the budget.
    """
    cost = dict(zip(groups, costs, strict=True))
    largest = max(cost.values(), key=lambda c: c.tokens)
    if largest.tokens > token_budget:
        raise UserError(
            f"a preference group takes {largest.tokens} tokens, more than the token budget of {token_budget}; raise "
            "token_budget, or lower the number of negatives, model.max_length or data.max_history"
        )
    # The step takes as long as its busiest rank. Longest processing time first: the most expensive remaining group goes
    # to the rank with the least work, which keeps the busiest rank within 4/3 of the optimum (Graham, 1969). Ties go by
    # group index and rank, so that every rank computes the same plan without talking to the others.
    by_cost = sorted(groups, key=lambda g: (-_weight(cost[g]), g))
    loads = [0.0] * world_size
    shares: list[list[int]] = [[] for _ in range(world_size)]  # rank -> its groups
    for group in by_cost:
        rank = loads.index(min(loads))
        shares[rank].append(group)
        loads[rank] += _weight(cost[group])
    packed = [_pack(share, cost, token_budget) for share in shares]  # rank -> its micro-batches
    # Collectives hang unless all ranks run equally many micro-batches. Ranks that have fewer run the cheapest group
    # again, as a filler with weight 0; a rank without any group runs fillers alone.
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
    """Bin packing by first fit, the largest groups first: few rows, each of at most ``token_budget`` tokens."""
    bins: list[list[int]] = []  # micro-batch -> its groups
    room: list[int] = []  # micro-batch -> tokens that still fit
    for group in sorted(share, key=lambda g: (-cost[g].tokens, g)):
        tokens = cost[group].tokens
        index = next((i for i, free in enumerate(room) if tokens <= free), None)
        if index is None:
            bins.append([])
            room.append(token_budget)
            index = len(bins) - 1
        bins[index].append(group)
        room[index] -= tokens
    return [MicroBatch(tuple(groups)) for groups in bins]


def _weight(cost: Cost) -> float:
    return cost.tokens + PAIR_WEIGHT * cost.pairs
