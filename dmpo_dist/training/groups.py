"""The batch of token groups each step trains on."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeVar

from dmpo_dist.batching.layout import Cost, Layout, group_cost, lay_out
from dmpo_dist.batching.plan import MicroBatch, Schedule, Step, deal
from dmpo_dist.batching.targets import Targets
from dmpo_dist.data.schema import above_last
from dmpo_dist.data.store import PreparedData
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.errors import UserError
from dmpo_dist.objectives.groups import Groups
from dmpo_dist.objectives.loss import Loss
from dmpo_dist.training.job import Job

T = TypeVar("T")


def groups_of(targets: Targets) -> Groups:
    """What a loss is told of the groups of a layout."""
    return Groups(
        targets.group_id, targets.is_positive, targets.response_lengths, targets.n_groups, targets.history_lengths,
        targets.level, targets.scores, targets.n_levels,
    )  # fmt: skip


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


def candidate_columns(stored: int, count: int, start: int, above: int = 1) -> list[int]:
    """The positive (0) and ``count`` of ``stored`` negatives from the ``start``-th on, cyclically; all if fewer.

    Among levels the ``above`` responses that stand above the last level are in every step, and the negatives that are
    chosen among are those of the last one.
    """
    return [*range(above), *(above + (start + i) % stored for i in range(min(count, stored)))]


def with_negatives(group: TokenGroup, count: int, start: int) -> TokenGroup:
    """``group`` with the candidates that ``candidate_columns`` names."""
    above = above_last(group.levels)
    return group.taking(candidate_columns(len(group.branches) - above, count, start, above))


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


def require_levels(loss: Loss, name: str, data: PreparedData) -> None:
    """Whether ``loss`` can be trained on rows as those of ``data``.

    Args:
        name: what it is called.

    Raises:
        UserError: rows with several positives or more than two levels for a loss that compares one positive with
            negatives, or rows without scores for one that needs them.
    """
    lists = sum(data.lists())
    if lists and not getattr(loss, "takes_levels", False):
        raise UserError(
            f"objective.name={name} compares one positive with its negatives, but {lists} of {len(data.train)} "
            f"training groups of {data.path} have several positives or more than two levels; set "
            "objective.name=mult_dpo, plackett_luce or recpo, or prepare rows of one positive (data.levels=none)"
        )
    if not getattr(loss, "needs_scores", False):
        return
    scores = data.train["scores"][:] if "scores" in data.train.features else [[]] * len(data.train)
    without = sum(not of_row or min(of_row) <= 0 for of_row in scores)
    if without:
        raise UserError(
            f"objective.name={name} takes its margins from the scores of responses, but {without} of {len(data.train)} "
            f"training groups of {data.path} have none, or one that is not above 0; prepare the data with "
            "data.levels=ratings, write 'scores' beside 'ranked', or set objective.margin_weight=0"
        )
