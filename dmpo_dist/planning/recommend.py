"""Advice: the smallest change that makes a run fit into memory, or one that makes a fitting run faster."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from dmpo_dist.config import LoraConfig, RunConfig
from dmpo_dist.planning.gpus import GPUS
from dmpo_dist.planning.plan import Cluster, Lengths, Plan, changed, make_plan, smallest_step
from dmpo_dist.training.budget import LIMITS

FASTER = 0.05
"""A change is recommended only if it saves more than this share of the time."""
MOST_NODES = 64
SHIPPED = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
"""The DeepSpeed configurations of this package, the fastest first, the one with the least memory last."""
STAGES = {
    "zero1": ("the optimizer's state is divided over the ranks", 1),
    "zero2": ("optimizer state and gradients are divided over the ranks", 1),
    "zero3": ("the weights are divided over the ranks too, and gathered layer by layer", 1),
    "zero2_offload": ("the optimizer's state lies in host memory and is updated there", 2),
    "zero3_offload": ("weights and optimizer lie in host memory", 3),
}
LOWER = {"zero3": ["zero2"], "zero2_offload": ["zero2"], "zero3_offload": ["zero3", "zero2"]}
"""DeepSpeed configuration -> ones that move less data between ranks or to host memory."""


@dataclass(frozen=True)
class Change:
    """Settings to change and why.

    Attributes:
        keys: ``key=value`` for the command line; empty for no change.
        reasons: one for each key.
        size: how large the change is: 1 costs some time, 2 and 3 more time or precision, 10 trains other weights.
        values: the changes as arguments of ``changed``.
    """

    keys: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    size: int = 0
    values: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def to(cls, key: str, value: Any, reason: str, size: int = 1) -> "Change":
        """A change of one setting."""
        shown = str(value).lower() if isinstance(value, bool) else value
        return cls((f"{key}={shown}",), (reason,), size, ((key.replace(".", "__"), value),))

    def __or__(self, other: "Change") -> "Change":
        values = self.values + other.values
        return Change(self.keys + other.keys, self.reasons + other.reasons, self.size + other.size, values)

    def of(self, config: RunConfig) -> RunConfig:
        """``config`` with the change."""
        return changed(config, **dict(self.values))


@dataclass(frozen=True)
class Advice:
    """A change and the plan it leads to."""

    change: Change
    plan: Plan


def smallest_change(plan: Plan, lengths: Lengths) -> Advice | None:
    """The smallest change that makes ``plan`` fit, among equally small ones the fastest; None where none does."""
    options = sorted(_options(plan), key=lambda change: change.size)
    for size in range(options[-1].size + 2):  # a shorter row adds 1
        tried = [
            _with_row(change, plan, lengths, change.size < size)
            for change in options
            if size - 1 <= change.size <= size
        ]
        if found := [advice for advice in tried if advice is not None]:
            return min(found, key=lambda advice: advice.plan.seconds)
    return None


def faster(plan: Plan, lengths: Lengths) -> Advice | None:
    """A change that saves time, still fits into memory, and does not alter the result; ``plan`` must fit."""
    config, budget = plan.config, plan.job.stage.token_budget
    assert isinstance(budget, int)
    limit = LIMITS["cuda" if plan.cluster.gpu.cuda else "cpu"]
    rows, recompute, stages = [Change()], [Change()], [Change()]
    for size in (2 * budget, 4 * budget, 8 * budget):
        rows += (
            [Change.to(f"{plan.job.section}.token_budget", size, "longer rows, fewer collectives")]
            if size <= limit
            else []
        )
    if config.model.gradient_checkpointing:
        reason = "activations fit, nothing needs to be recomputed"
        recompute.insert(0, Change.to("model.gradient_checkpointing", False, reason))
    for name in LOWER.get(config.deepspeed, ()):
        stages.append(Change.to("deepspeed", name, "weights and optimizer fit with less moved around"))
    candidates = []
    for row, recomputing, stage in product(rows, recompute, stages):
        change = row | recomputing | stage
        candidate = make_plan(change.of(config), plan.cluster, lengths, plan.kind)
        if candidate.seconds < (1 - FASTER) * plan.seconds:
            candidates.append(Advice(change, candidate))
    # Ever longer rows save ever less. Among plans within a percent of each other the smaller change comes first.
    candidates.sort(key=lambda advice: (round(100 * advice.plan.seconds / plan.seconds), advice.change.size))
    return next((advice for advice in candidates if advice.plan.fits), None)


def elsewhere(plan: Plan, lengths: Lengths) -> list[str]:
    """Flags of clusters with more nodes or a larger GPU on which the run would fit with its smallest settings."""
    smallest = max(_options(plan), key=lambda change: change.size).of(plan.config)
    smallest = changed(smallest, **{f"{plan.job.section}__token_budget": plan.step.row.group_tokens})
    found = []
    nodes = 2 * plan.cluster.nodes
    while nodes <= MOST_NODES and nodes * plan.cluster.per_node <= smallest_step(plan.job, lengths.groups):
        cluster = Cluster(plan.cluster.name, plan.cluster.gpu, nodes, plan.cluster.per_node)
        if make_plan(smallest, cluster, lengths, plan.kind).fits:
            found.append(f"--nodes {nodes}")
            break
        nodes *= 2
    for name, gpu in sorted(GPUS.items(), key=lambda item: item[1].memory):
        cluster = Cluster(name, gpu, plan.cluster.nodes, plan.cluster.per_node)
        if gpu.memory > plan.cluster.gpu.memory and make_plan(smallest, cluster, lengths, plan.kind).fits:
            found.append(f"--gpu {name}")
            break
    return found


def _with_row(change: Change, plan: Plan, lengths: Lengths, shorter: bool) -> Advice | None:
    """The advice for ``change`` with the rows of ``plan``, or if ``shorter`` with halved rows; None if nothing fits."""
    config, tokens, least = change.of(plan.config), plan.job.stage.token_budget, plan.step.row.group_tokens
    assert isinstance(tokens, int)
    if not shorter:
        candidate = make_plan(config, plan.cluster, lengths, plan.kind)
        return Advice(change, candidate) if candidate.may_fit and candidate.fits else None
    while tokens > least:
        tokens = max(least, tokens // 2)
        row = Change.to(f"{plan.job.section}.token_budget", tokens, "shorter rows hold fewer activations")
        candidate = make_plan(row.of(config), plan.cluster, lengths, plan.kind)
        if not candidate.may_fit:
            return None
        if candidate.fits:
            return Advice(change | row, candidate)
    return None


def _options(plan: Plan) -> Iterator[Change]:
    """Every combination of changes, including no change at all; shorter rows are not among them."""
    config, full = plan.config, plan.blueprint.reference == "model_copy"
    recompute, stages, quantize, adapter = [Change()], [Change()], [Change()], [Change()]
    if not config.model.gradient_checkpointing:
        reason = "activations are recomputed, a forward pass more"
        recompute.append(Change.to("model.gradient_checkpointing", True, reason))
    for name in SHIPPED[SHIPPED.index(config.deepspeed) + 1 :] if config.deepspeed in SHIPPED else ():
        stages.append(Change.to("deepspeed", name, *STAGES[name]))
    if config.model.quantization == "none":
        quantize.append(Change.to("model.quantization", "nf4", "the frozen base takes 4 bits a weight, rounded", 2))
    if full:
        reason = "adapters are trained instead of all weights, a different model"
        adapter.append(Change(("model.lora.r=16",), (reason,), 10, (("model__lora", LoraConfig()),)))
    for one, two, three, four in product(recompute, stages, quantize, adapter):
        change = one | two | three | four
        model = change.of(config).model
        if not (full and model.lora is None and model.quantization != "none"):
            yield change  # only adapters train on a quantized base
