"""The smallest change that makes a run fit, and what would make a fitting one faster."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from dmpo_dist.config import LoraConfig, RunConfig
from dmpo_dist.planning.gpus import GPUS
from dmpo_dist.planning.plan import Cluster, Lengths, Plan, changed, make_plan
from dmpo_dist.training.budget import LIMITS

FASTER = 0.05
"""Share of the time that a change must save to be worth naming."""
MOST_NODES = 64
SHIPPED = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


@dataclass(frozen=True)
class Change:
    """Settings to change and why.

    Attributes:
        keys: ``key=value`` for the command line; none where nothing needs to change.
        reasons: one for each key.
        size: how much the change asks for: time, precision, or another kind of training.
    """

    keys: tuple[str, ...]
    reasons: tuple[str, ...]
    size: int

    def __or__(self, other: "Change") -> "Change":
        return Change(self.keys + other.keys, self.reasons + other.reasons, self.size + other.size)


@dataclass(frozen=True)
class Advice:
    """A change and the plan it leads to."""

    change: Change
    plan: Plan


NOTHING = Change((), (), 0)


def smallest_change(plan: Plan, lengths: Lengths) -> Advice | None:
    """The smallest change by which ``plan`` fits, the fastest among equals; None where none helps."""
    options = sorted(_options(plan), key=lambda option: option[0].size)
    for size in range(options[-1][0].size + 2):  # a shorter row adds 1
        found = []
        for change, config in options:
            if size - 1 <= change.size <= size:
                advice = _with_row(change, config, plan, lengths, shorter=change.size < size)
                found += [advice] if advice else []
        if found:
            return min(found, key=lambda advice: advice.plan.seconds)
    return None


def faster(plan: Plan, lengths: Lengths) -> Advice | None:
    """A change that a fitting ``plan`` has room for and that saves time, without touching what is computed."""
    config, budget = plan.config, plan.config.train.token_budget
    assert isinstance(budget, int)
    limit = LIMITS["cuda" if plan.cluster.gpu.cuda else "cpu"]
    budgets = [budget, *(size for size in (2 * budget, 4 * budget, 8 * budget) if size <= limit)]
    recomputes = sorted({config.model.gradient_checkpointing, False})
    candidates = []
    for tokens, recompute, stage in product(budgets, recomputes, _lower(config.deepspeed)):
        keys = {"train__token_budget": tokens, "model__gradient_checkpointing": recompute, "deepspeed": stage}
        candidates.append(make_plan(changed(config, **keys), plan.cluster, lengths))
    worth = [other for other in candidates if other.seconds < (1 - FASTER) * plan.seconds]
    # longer rows save little by little: what saves most within a percent goes by how little changes
    for other in sorted(
        worth, key=lambda other: (round(100 * other.seconds / plan.seconds), _difference(config, other.config).size)
    ):
        if other.fits:
            return Advice(_difference(config, other.config), other)
    return None


def elsewhere(plan: Plan, lengths: Lengths) -> list[str]:
    """Where the run, as small as it can be made, would fit: more nodes of the same, or one of the other GPUs."""
    smallest = max(_options(plan), key=lambda option: option[0].size)[1]
    smallest = changed(smallest, train__token_budget=plan.step.row.group_tokens)
    found = []
    nodes = 2 * plan.cluster.nodes
    while nodes <= MOST_NODES and nodes * plan.cluster.per_node <= plan.config.train.global_batch_size:
        cluster = Cluster(plan.cluster.name, plan.cluster.gpu, nodes, plan.cluster.per_node)
        if make_plan(smallest, cluster, lengths).fits:
            found.append(f"--nodes {nodes}")
            break
        nodes *= 2
    for name, gpu in sorted(GPUS.items(), key=lambda item: item[1].memory):
        cluster = Cluster(name, gpu, plan.cluster.nodes, plan.cluster.per_node)
        if gpu.memory > plan.cluster.gpu.memory and make_plan(smallest, cluster, lengths).fits:
            found.append(f"--gpu {name}")
            break
    return found


def _with_row(change: Change, config: RunConfig, plan: Plan, lengths: Lengths, shorter: bool) -> Advice | None:
    """With the rows of ``plan``, or with the longest shorter ones that fit, halved as often as it takes."""
    tokens, least = plan.config.train.token_budget, plan.step.row.group_tokens
    assert isinstance(tokens, int)
    if not shorter:
        candidate = make_plan(config, plan.cluster, lengths)
        return Advice(change, candidate) if candidate.may_fit and candidate.fits else None
    while tokens > least:
        tokens = max(least, tokens // 2)
        candidate = make_plan(changed(config, train__token_budget=tokens), plan.cluster, lengths)
        if not candidate.may_fit:
            return None
        if candidate.fits:
            row = Change((f"train.token_budget={tokens}",), ("shorter rows hold fewer activations",), 1)
            return Advice(change | row, candidate)
    return None


def _options(plan: Plan) -> Iterator[tuple[Change, RunConfig]]:
    """Every combination of changes but shorter rows, and the configuration it gives."""
    full = plan.blueprint.reference == "model_copy"
    for choice in product(*_choices(plan.config, full)):
        change, config = NOTHING, plan.config
        for step, keys in choice:
            change, config = change | step, changed(config, **keys)
        if not (full and config.model.lora is None and config.model.quantization != "none"):
            yield change, config  # only adapters train on a quantized base


def _choices(config: RunConfig, full: bool) -> list[list[tuple[Change, dict[str, Any]]]]:
    """For each setting to leave it alone, or a change of it with the keys of ``changed``."""
    same: tuple[Change, dict[str, Any]] = (NOTHING, {})
    recompute, stages, quantize, adapter = [same], [same], [same], [same]
    if not config.model.gradient_checkpointing:
        change = Change(("model.gradient_checkpointing=true",), ("activations are recomputed, a forward pass more",), 1)
        recompute.append((change, {"model__gradient_checkpointing": True}))
    why = {
        "zero1": (1, "the optimizer's state is divided over the ranks"),
        "zero2": (1, "optimizer state and gradients are divided over the ranks"),
        "zero3": (1, "the weights are divided over the ranks too, and gathered layer by layer"),
        "zero2_offload": (2, "the optimizer's state lies in host memory and is updated there"),
        "zero3_offload": (3, "weights and optimizer lie in host memory"),
    }
    for name, (size, reason) in why.items():
        if _order(name) > _order(config.deepspeed):
            stages.append((Change((f"deepspeed={name}",), (reason,), size), {"deepspeed": name}))
    if config.model.quantization == "none":
        change = Change(("model.quantization=nf4",), ("the frozen base takes 4 bits a weight, rounded",), 2)
        quantize.append((change, {"model__quantization": "nf4"}))
    if full:
        reason = "adapters are trained instead of all weights, a different model"
        adapter.append((Change(("model.lora.r=16",), (reason,), 10), {"model__lora": LoraConfig()}))
    return [recompute, stages, quantize, adapter]


def _order(name: str) -> int:
    """Place among the shipped configurations; others stay as they are."""
    return SHIPPED.index(name) if name in SHIPPED else len(SHIPPED)


def _lower(name: str) -> list[str]:
    """This stage and those without offload that send less over the network."""
    lower = {"zero3": ["zero2"], "zero2_offload": ["zero2"], "zero3_offload": ["zero3", "zero2"]}
    return [name, *lower.get(name, [])]


def _difference(old: RunConfig, new: RunConfig) -> Change:
    keys, reasons = [], []
    if new.train.token_budget != old.train.token_budget:
        keys.append(f"train.token_budget={new.train.token_budget}")
        reasons.append("longer rows, fewer collectives")
    if new.model.gradient_checkpointing != old.model.gradient_checkpointing:
        keys.append("model.gradient_checkpointing=false")
        reasons.append("activations fit, nothing needs to be recomputed")
    if new.deepspeed != old.deepspeed:
        keys.append(f"deepspeed={new.deepspeed}")
        reasons.append("weights and optimizer fit with less moved around")
    return Change(tuple(keys), tuple(reasons), len(keys))
