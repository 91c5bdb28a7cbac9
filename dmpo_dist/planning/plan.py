"""A plan: the memory and time of one configuration on one cluster."""

from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import Any

from dmpo_dist.batching.plan import Schedule
from dmpo_dist.config import RunConfig
from dmpo_dist.data.store import PreparedData
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.quantize import require_trainable
from dmpo_dist.modeling.routing import Route
from dmpo_dist.planning.gpus import Gpu
from dmpo_dist.planning.memory import WIDTHS, Rank, Term, Zero, peak_bytes, phase_bytes
from dmpo_dist.planning.model import Blueprint, Row, blueprint
from dmpo_dist.planning.speed import Duration, OptimizerStep
from dmpo_dist.planning.trace import Trace
from dmpo_dist.training.budget import LIMITS
from dmpo_dist.training.engine import resolve_config
from dmpo_dist.training.job import Job, Kind
from dmpo_dist.training.schedule import epochs_begun, total_steps

RESERVED = 0.05
"""Share of a device's memory to keep free, as the allocator loses some between blocks; assumed."""
SMALLEST_BUDGET = 256
NO_TRACE = Trace(0, 0)


@dataclass(frozen=True)
class Cluster:
    """``nodes`` of ``per_node`` devices called ``name``."""

    name: str
    gpu: Gpu
    nodes: int
    per_node: int

    @property
    def world_size(self) -> int:
        """N, the number of devices."""
        return self.nodes * self.per_node

    @property
    def capacity(self) -> int:
        """Bytes of a device that a plan may take."""
        return int(self.gpu.memory * (1 - RESERVED))


@dataclass(frozen=True)
class Lengths:
    """Tokens of a group's prompt and of each response, and how many groups the data holds.

    Attributes:
        history: tokens of the prompt whose likelihood is trained too, if the stage's loss asks for that; None counts
            all but the first.
        longest: tokens of prompt and longest response of the longest group; None where all are alike.
        counted: number of the groups that these are means of; 0 where they were not counted.
        others: responses of a preference step beside the first; None takes ``train.negatives``. Lists of several levels
            have more, and ready-made rows may have fewer.
        stored: most negatives that the data holds for a group; None where that is not known.
    """

    prompt: int
    response: int
    groups: int | None
    history: int | None = None
    longest: int | None = None
    counted: int = 0
    others: int | None = None
    stored: int | None = None


@dataclass(frozen=True)
class Plan:
    """The memory and time of a configuration on a cluster.

    Attributes:
        config: the configuration, with ``token_budget`` resolved to a number.
        cluster: the cluster.
        blueprint: the model.
        route: the attention backend.
        zero: how the model is partitioned.
        step: everything that the time of a step depends on.
        steps: optimizer steps of the run, None where neither the configuration nor the data tells.
        kind: which stage is planned.
        reference_seconds: of the pass before the first step in which a cached reference scores every group; 0 without.
    """

    config: RunConfig
    cluster: Cluster
    blueprint: Blueprint
    route: Route
    zero: Zero
    step: OptimizerStep
    steps: int | None
    kind: Kind = "preference"
    reference_seconds: float = 0.0

    @property
    def job(self) -> Job:
        """The stage that is planned."""
        return _job(self.config, self.kind)

    @cached_property
    def rank(self) -> Rank:
        """Everything that a rank's memory depends on; runs the model on the meta device."""
        return make_rank(
            self.config, self.step.row, self.cluster.world_size, self.cluster.gpu.cuda, self.route.backend, self.kind
        )

    @cached_property
    def terms(self) -> list[Term]:
        """The terms of a device's memory."""
        return self.rank.device_terms()

    @cached_property
    def host_terms(self) -> list[Term]:
        """The terms of a node's host memory."""
        return self.rank.host_terms(self.cluster.per_node)

    @property
    def peak(self) -> int:
        """The peak memory of a device in bytes."""
        return peak_bytes(self.terms)

    @property
    def phase(self) -> str:
        """The phase in which the peak is reached."""
        phases = phase_bytes(self.terms)
        return max(phases, key=phases.__getitem__)

    @property
    def fits(self) -> bool:
        return self.peak <= self.cluster.capacity

    @cached_property
    def may_fit(self) -> bool:
        """Whether everything except activations fits: a cheap test, as it needs no trace of the model."""
        rank = make_rank(self.config, self.step.row, self.cluster.world_size, self.cluster.gpu.cuda, None, self.kind)
        return peak_bytes(rank.device_terms()) <= self.cluster.capacity

    @cached_property
    def durations(self) -> list[Duration]:
        """The parts of a step's time."""
        return self.step.durations(self.cluster.gpu, self.cluster.nodes, self.cluster.per_node)

    @property
    def seconds(self) -> float:
        """Seconds of an optimizer step."""
        return sum(part.seconds for part in self.durations)

    @property
    def groups_per_second(self) -> float:
        """Groups per second over all devices."""
        return self.step_groups / self.seconds

    @property
    def step_groups(self) -> float:
        """Groups of a step over all devices, in the mean."""
        return self.step.groups * self.cluster.world_size

    @property
    def hours(self) -> float | None:
        """Hours of the run without its start and validation."""
        return None if self.steps is None else (self.steps * self.seconds + self.reference_seconds) / 3600


def make_plan(config: RunConfig, cluster: Cluster, lengths: Lengths, kind: Kind = "preference") -> Plan:
    """Plan a stage with ``config``; a ``token_budget`` of ``auto`` takes the largest row that fits.

    Raises:
        UserError: a model that cannot be planned, settings that cannot be trained, a group longer than a row.
    """
    budget = _job(config, kind).stage.token_budget
    if budget != "auto":
        return _plan(config, cluster, lengths, budget, kind)
    budget = LIMITS["cuda" if cluster.gpu.cuda else "cpu"]
    group = _row(config, lengths, 0, kind).group_tokens
    plan = None
    while budget >= max(SMALLEST_BUDGET, group):
        plan = _plan(config, cluster, lengths, budget, kind)
        if plan.fits:
            break
        budget //= 2
    return plan or _plan(config, cluster, lengths, group, kind)


def make_rank(
    config: RunConfig, row: Row, world_size: int, cuda: bool, backend: str | None, kind: Kind = "preference"
) -> Rank:
    """The memory of a rank that trains rows like ``row``; without a backend no activations are counted."""
    model, job = blueprint(config.model), _job(config, kind)
    zero = _zero(job, world_size)
    copies = model.reference == "model_copy" and job.loss.needs_reference and config.reference.cache == "off"
    return Rank(
        sizes=model.sizes,
        zero=zero,
        world_size=world_size,
        width=WIDTHS[config.model.dtype],
        nf4=config.model.quantization == "nf4",
        double_quantization=config.model.double_quantization,
        reference_copy=copies,
        cuda=cuda,
        trace=model.trace(row, backend, cuda, not cuda and zero.stage in (1, 2)) if backend else NO_TRACE,
        tokens=row.tokens,
    )


def data_groups(config: RunConfig, asked: int | None) -> int | None:
    """Number of training groups: ``asked``, else that of the prepared data; None where there is neither."""
    if asked is not None or config.data.path is None or not config.data.path.exists():
        return asked
    return len(PreparedData.for_training(config.data).train)


def _plan(config: RunConfig, cluster: Cluster, lengths: Lengths, budget: int, kind: Kind) -> Plan:
    model, job = blueprint(config.model), _job(config, kind)
    require_trainable(config.model, model.reference != "model_copy")
    batch, world = job.stage.global_batch_size, cluster.world_size
    smallest = smallest_step(job, lengths.groups)
    if smallest < world:
        of = "" if lengths.groups is None else f" a step of {smallest} out of {lengths.groups} groups,"
        raise UserError(
            f"{job.section}.global_batch_size={batch} gives{of} fewer groups than the {world} devices of "
            f"{cluster.nodes} nodes of {cluster.per_node}; raise it to at least {world}, or lower --nodes or "
            "--gpus-per-node"
        )
    mean = batch if lengths.groups is None else lengths.groups / _schedule(job, lengths.groups).steps_per_epoch
    route = model.route(cluster.gpu.cuda, config.model.max_length, config.model.attention)
    row = _row(config, lengths, budget, kind, route.backend != "unshared")
    _require_room(row, lengths, budget, job)
    on_rank = ceil(mean / world)
    row = _row(config, lengths, min(budget, on_rank * row.group_tokens), kind, row.shared)
    zero = _zero(job, world)
    step = OptimizerStep(
        shape=model.shape,
        sizes=model.sizes,
        zero=zero,
        row=row,
        micro_batches=ceil(on_rank / row.groups),
        groups=mean / world,
        full=model.reference == "model_copy",
        reference=job.loss.needs_reference and config.reference.cache == "off",
        recompute=config.model.gradient_checkpointing,
        nf4=config.model.quantization == "nf4",
        dtype=config.model.dtype,
        beams=config.train.on_policy.beams if kind == "preference" and config.train.on_policy else 0,
    )
    resolved = changed(config, **{f"{job.section}__token_budget": budget})
    once = _reference_seconds(job, lengths, step, cluster)
    return Plan(resolved, cluster, model, route, zero, step, _steps(job, lengths.groups), kind, once)


def _reference_seconds(job: Job, lengths: Lengths, step: OptimizerStep, cluster: Cluster) -> float:
    """See ``Plan``; the pass scores the negatives of all epochs, as ``training.reference.ReferencePass`` does."""
    if not job.loss.needs_reference or job.config.reference.cache == "off" or lengths.groups is None:
        return 0.0
    negatives = lengths.others
    if negatives is None:
        negatives = job.config.train.negatives * epochs_begun(job.stage, _schedule(job, lengths.groups))
        negatives = min(negatives, lengths.stored or negatives)
    of_group = replace(step, row=replace(step.row, negatives=negatives), reference=True).flops()["reference"]
    gpu = cluster.gpu
    speed = gpu.peak(step.dtype) * gpu.mfu_at(step.shape.hidden) * cluster.world_size
    return of_group * lengths.groups / speed


def _require_room(row: Row, lengths: Lengths, budget: int, job: Job) -> None:
    """Raise UserError where a group, or the longest of the data, is longer than a row."""
    more = max(0, (lengths.longest or 0) - lengths.prompt - lengths.response)
    tokens = row.group_tokens + more * (1 if row.shared else row.negatives + 1)
    if tokens > budget:
        k = f", K={row.negatives}" if job.kind == "preference" else ""
        group = "the longest group of the data" if more else "a group"
        lower = " or train.negatives" if job.kind == "preference" else ""
        raise UserError(
            f"{job.section}.token_budget={budget}: {group} takes {tokens} tokens (prompt {lengths.prompt + more}, "
            f"response {lengths.response}{k}); raise it, or lower --prompt{lower}"
        )


def _zero(job: Job, world_size: int) -> Zero:
    """How ``deepspeed`` partitions the model of ``job``; raises UserError where it does not say."""
    config = job.config
    parameters = blueprint(config.model).sizes.total
    return Zero.of(resolve_config(config.deepspeed, job.stage, config.model.dtype, world_size, parameters))


def _row(config: RunConfig, lengths: Lengths, tokens: int, kind: Kind, shared: bool = True) -> Row:
    negatives, scored = 0, 0
    if kind == "preference":
        negatives = config.train.negatives if lengths.others is None else lengths.others
    if _job(config, kind).loss.scores_history:
        scored = lengths.prompt - 1 if lengths.history is None else lengths.history
    return Row(lengths.prompt, lengths.response, negatives, tokens, shared, scored)


def _job(config: RunConfig, kind: Kind) -> Job:
    return Job(kind, config, config.model.path, config.output_dir)


def _steps(job: Job, groups: int | None) -> int | None:
    if groups is None:
        return job.stage.steps
    return total_steps(job.stage, _schedule(job, groups))


def smallest_step(job: Job, groups: int | None) -> int:
    """Groups in the smallest step of an epoch, whose steps are alike and so may be smaller than asked for."""
    return job.stage.global_batch_size if groups is None else _schedule(job, groups).smallest_step


def _schedule(job: Job, groups: int) -> Schedule:
    return Schedule(groups, job.stage.global_batch_size, job.config.seed)


def changed(config: RunConfig, **keys: Any) -> RunConfig:
    """``config`` with other values of dotted keys; a dot is written as two underscores: ``model__dtype="float32"``."""
    for key, value in keys.items():
        section, _, name = key.rpartition("__")
        if section:
            part = getattr(config, section).model_copy(update={name: value})
            config = config.model_copy(update={section: part})
        else:
            config = config.model_copy(update={key: value})
    return config
