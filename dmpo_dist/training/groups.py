"""The batch of token groups each step trains on."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

from dmpo_dist.batching.layout import Cost, Layout, group_cost, lay_out
from dmpo_dist.batching.plan import MicroBatch, Schedule, Step, deal
from dmpo_dist.batching.targets import Targets
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.errors import UserError
from dmpo_dist.objectives.groups import Groups
from dmpo_dist.training.job import Job

T = TypeVar("T")


def groups_of(targets: Targets) -> Groups:
    """What a loss is told of the groups of a layout."""
    return Groups(
        targets.group_id, targets.is_positive, targets.response_lengths, targets.n_groups, targets.history_lengths
    )


@dataclass(frozen=True)
class Batches:
    """The steps of a run.

    Attributes:
        groups: all training groups with every stored negative.
        schedule: which groups belong to which step.
        negatives: K, 0 for SFT.
        world_size, token_budget: how a step is divided.
        shared: whether prompts are shared (decides cost and layout).
        of_epoch: makes a group as it is trained on, by index and epoch, where its prompt is not the same in all epochs.
    """

    groups: Sequence[TokenGroup]
    schedule: Schedule
    negatives: int
    world_size: int
    token_budget: int
    shared: bool
    of_epoch: Callable[[int, int], TokenGroup] | None = None

    def step(self, index: int) -> Step:
        """Step ``index``, dealt to all ranks."""
        epoch = self.schedule.epoch_of(index)
        members = self.schedule.groups(index)
        costs = [self._cost(self.group(g, epoch)) for g in members]
        return deal(members, costs, self.world_size, self.token_budget, epoch)

    def layout(self, micro_batch: MicroBatch, epoch: int) -> Layout:
        """The micro-batch laid out for one forward pass."""
        return lay_out([self.group(g, epoch) for g in micro_batch.groups], self.shared)

    def group(self, index: int, epoch: int) -> TokenGroup:
        """Group ``index`` with the K negatives of ``epoch``: the next K of those stored, around the end."""
        if self.of_epoch:
            return self.of_epoch(index, epoch)
        return with_negatives(self.groups[index], self.negatives, epoch * self.negatives)

    def _cost(self, group: TokenGroup) -> Cost:
        return group_cost(group, self.shared)


def candidate_columns(stored: int, count: int, start: int) -> list[int]:
    """The positive (0) and ``count`` of ``stored`` negatives from the ``start``-th on, cyclically; all if fewer."""
    return [0, *(1 + (start + i) % stored for i in range(min(count, stored)))]


def with_negatives(group: TokenGroup, count: int, start: int) -> TokenGroup:
    """``group`` with the candidates that ``candidate_columns`` names."""
    chosen = candidate_columns(len(group.branches) - 1, count, start)
    return TokenGroup(
        group.prefix,
        tuple(group.branches[i] for i in chosen),
        tuple(group.scored_from[i] for i in chosen),
        group.prefix_scored,
    )


def ahead(make: Callable[[int], T], first: int, last: int) -> Iterator[T]:
    """``make(first)`` to ``make(last - 1)``, each made in a thread while the one before is in use."""
    with ThreadPoolExecutor(1, thread_name_prefix="dmpo-data") as pool:
        pending = [pool.submit(make, index) for index in range(first, min(first + 2, last))]
        for index in range(first, last):
            yield pending.pop(0).result()
            if index + 2 < last:
                pending.append(pool.submit(make, index + 2))


def make_schedule(job: Job, n_groups: int, world_size: int) -> Schedule:
    """The order of ``n_groups`` groups.

    Raises:
        UserError: there are none, or a step has fewer than there are ranks.
    """
    schedule = Schedule(n_groups, job.stage.global_batch_size, job.config.seed)
    if schedule.smallest_step < world_size:
        raise UserError(
            f"{job.section}.global_batch_size={job.stage.global_batch_size} gives a step of {schedule.smallest_step} "
            f"out of {n_groups} preference groups, fewer than {world_size} workers; raise it or lower cluster.workers"
        )
    return schedule


def require_negatives(
    stored: Sequence[int], wanted: int, fixed_rows: bool, section: Literal["sft", "train"] = "train"
) -> None:
    """Raise UserError if no (``fixed_rows``: ready-made, ragged) or not every group has stored ``wanted`` negatives."""
    have = max(stored) if fixed_rows else min(stored)
    if have < wanted:
        raise UserError(
            f"{section}.negatives={wanted}, but the prepared data holds {have} negatives per group; lower "
            f"{section}.negatives, or prepare the data again with a higher data.negatives_per_group"
        )
