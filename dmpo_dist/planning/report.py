"""The output of ``dmpo plan``."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from dmpo_dist.planning.memory import PHASES, Term, phase_bytes
from dmpo_dist.planning.plan import RESERVED, Plan
from dmpo_dist.planning.recommend import Advice
from dmpo_dist.planning.verify import TOLERANCE, Outcome

BYTES = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
SECONDS = {"h": 3600.0, "min": 60.0, "s": 1.0, "ms": 1e-3, "\u00b5s": 1e-6}


def amount(size: float, units: Mapping[str, float]) -> str:
    """``size`` in the largest of ``units`` (name -> size) that is not larger than it, such as 1.23 GiB."""
    unit = next((name for name, one in units.items() if abs(size) >= one), [*units][-1])
    value = size / units[unit]
    return f"{value:,.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f} {unit}" if value else f"0 {unit}"


def show_plan(plan: Plan, explain: bool, console: Console, assumed: str = "", lengths: str = "") -> None:
    """Print the model, the memory of a device and of a node, and the time of a step and of the run.

    Args:
        assumed: a text on the properties of the cluster that were assumed, and the flags to give them.
        lengths: a text on where the lengths of prompt and response come from.
    """
    _show_run(plan, assumed, lengths, console)
    console.print()
    console.print(_memory_table(plan.terms, explain))
    _show_memory(plan, explain, console)
    console.print()
    _show_time(plan, explain, console)


def _show_run(plan: Plan, assumed: str, lengths: str, console: Console) -> None:
    config, model, cluster = plan.config, plan.config.model, plan.cluster
    row, sizes = plan.step.row, plan.blueprint.sizes
    lora = f" ({model.lora.variant} r={model.lora.r})" if model.lora else ""
    parameters = f"{sizes.total / 1e6:,.1f} M parameters, {sizes.trainable / 1e6:,.1f} M trained"
    _line(console, "model", f"{model.path}: {parameters}{lora}")
    reference = plan.blueprint.reference if plan.rank.reference_copy or plan.step.reference else "not run in a step"
    quantization = "" if model.quantization == "none" else f", {model.quantization}"
    recompute = ", gradient checkpointing" if model.gradient_checkpointing else ""
    _line(
        console,
        "run",
        f"dmpo {plan.job.section}, {config.deepspeed}, {model.dtype}{quantization}{recompute}, reference: {reference}",
    )
    _line(console, "attention", f"{plan.route.backend}: {plan.route.reason}")
    groups = f"{row.groups} group{'s' * (row.groups > 1)}"
    responses = f"{row.negatives + 1} response{'s' * (row.negatives > 0)} of {row.response}"
    scored = f" ({row.scored} of its tokens trained too)" if row.scored else ""
    _line(console, "row", f"{row.tokens} tokens: {groups} of prompt {row.prompt}{scored}, {responses}")
    if lengths:
        _line(console, "", lengths)
    rows = f"{plan.step.micro_batches} row{'s' * (plan.step.micro_batches > 1)}"
    devices = f"{cluster.nodes} x {cluster.per_node} {cluster.name}"
    _line(console, "on", f"{devices}, {rows} a device in a step of {plan.step_groups:.4g} groups")
    if assumed:
        _line(console, "", assumed)


def _show_memory(plan: Plan, explain: bool, console: Console) -> None:
    cluster, host = plan.cluster, sum(term.bytes for term in plan.host_terms)
    short = plan.peak - cluster.capacity
    verdict = f"fits, {amount(-short, BYTES)} left" if plan.fits else f"does NOT fit, {amount(short, BYTES)} too much"
    usable = f"{amount(cluster.capacity, BYTES)} usable ({1 - RESERVED:.0%} of {amount(cluster.gpu.memory, BYTES)})"
    _line(console, "device", f"peak {amount(plan.peak, BYTES)} in {plan.phase} of {usable}: {verdict}")
    terms = "; ".join(f"{t.name} {amount(t.bytes, BYTES)}" for t in plan.host_terms)
    _line(console, "host", f"up to {amount(host, BYTES)} a node: {terms}")
    for term in plan.host_terms if explain else ():
        _line(console, "", f"{term.name} = {term.formula} = {term.numbers} = {amount(term.bytes, BYTES)}")


def _show_time(plan: Plan, explain: bool, console: Console) -> None:
    parts = ", ".join(f"{part.name} {amount(part.seconds, SECONDS)}" for part in plan.durations)
    _line(console, "step", f"{amount(plan.seconds, SECONDS)}: {parts}")
    for part in plan.durations if explain else ():
        _line(console, "", f"{part.name} = {part.numbers} = {amount(part.seconds, SECONDS)}")
    mfu = plan.cluster.gpu.mfu_at(plan.step.shape.hidden)
    assumption = f"an assumed MFU of {mfu:.2g} for this width, no communication hidden, kernel launches not counted"
    _line(console, "speed", f"{plan.groups_per_second:,.1f} groups/s at {assumption}")
    run_time = f"unknown: give --groups, {plan.job.section}.steps or a data.path that exists"
    if plan.hours is not None:
        once = amount(plan.reference_seconds, SECONDS)
        cached = f" with {once} for the reference once (reference.cache)" if plan.reference_seconds else ""
        run_time = f"{amount(plan.hours * 3600, SECONDS)} for {plan.steps} steps{cached}, without validation"
    _line(console, "run time", run_time)


def show_advice(title: str, advice: Advice, console: Console) -> None:
    """Print the changes, their reasons, and the memory and speed that they lead to."""
    console.print()
    plan = advice.plan
    _line(console, title, " ".join(advice.change.keys))
    for key, reason in zip(advice.change.keys, advice.change.reasons, strict=True):
        _line(console, "", f"{key}: {reason}")
    memory = f"{amount(plan.peak, BYTES)} of {amount(plan.cluster.capacity, BYTES)}"
    _line(console, "", f"then {memory}, {plan.groups_per_second:,.1f} groups/s")


def show_outcomes(outcomes: Sequence[Outcome], console: Console) -> None:
    """Print predicted and measured peaks."""
    table = Table("configuration", "row", "predicted MiB", "measured MiB", "error", f"within {TOLERANCE:.0%}")
    for o in outcomes:
        sizes = (f"{x / 2**20:,.0f}" for x in (o.predicted, o.measured))
        table.add_row(o.case.name, f"{o.case.row.tokens} tokens", *sizes, f"{o.error:+.1%}", "yes" if o.good else "NO")
    console.print(table)


def as_dict(plan: Plan, advice: Advice | None) -> dict[str, Any]:
    """The plan as JSON; bytes and seconds."""
    return {
        "model": plan.config.model.path,
        "parameters": plan.blueprint.sizes.total,
        "trainable": plan.blueprint.sizes.trainable,
        "gpu": plan.cluster.name,
        "nodes": plan.cluster.nodes,
        "gpus_per_node": plan.cluster.per_node,
        "deepspeed": plan.config.deepspeed,
        "stage": plan.job.section,
        "token_budget": plan.job.stage.token_budget,
        "attention": plan.route.backend,
        "attention_reason": plan.route.reason,
        "fits": plan.fits,
        "peak_bytes": plan.peak,
        "capacity_bytes": plan.cluster.capacity,
        "phases": phase_bytes(plan.terms),
        "device": _dicts(plan.terms),
        "host": _dicts(plan.host_terms),
        "step_seconds": plan.seconds,
        "step": [vars(part) for part in plan.durations],
        "groups_per_second": plan.groups_per_second,
        "steps": plan.steps,
        "reference_seconds": plan.reference_seconds,
        "hours": plan.hours,
        "recommendation": advice
        and {
            "changes": advice.change.keys,
            "reasons": advice.change.reasons,
            "peak_bytes": advice.plan.peak,
            "groups_per_second": advice.plan.groups_per_second,
        },
    }


def _dicts(terms: Iterable[Term]) -> list[dict[str, Any]]:
    return [vars(term) | {"phases": [phase for phase in PHASES if phase in term.phases]} for term in terms]


def _memory_table(terms: Sequence[Term], explain: bool) -> Table:
    """A row for each term, a column for each phase."""
    headers = ["on a device", *(phase.replace("_", "-") for phase in PHASES)]
    table = Table(*headers, *(["how"] if explain else []))
    for term in terms:
        cells = [amount(term.bytes, BYTES) if phase in term.phases else "" for phase in PHASES]
        how = [f"{term.formula} = {term.numbers}"] if explain else []
        table.add_row(term.name, *cells, *how)
    table.add_section()
    table.add_row("sum", *(amount(size, BYTES) for size in phase_bytes(terms).values()), *([""] if explain else []))
    for column in table.columns[1 : 1 + len(PHASES)]:
        column.justify = "right"
    return table


def _line(console: Console, name: str, text: str) -> None:
    console.print(f"{name:<10} {text}", highlight=False, markup=False, soft_wrap=True)
