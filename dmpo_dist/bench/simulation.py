"""`dmpo bench simulate`: fit the model of planning/simulate.py to measured cells, or apply it to 1 to 4,096 GPUs."""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from dmpo_dist.artifacts.files import write_json
from dmpo_dist.bench.scaling import CELLS
from dmpo_dist.errors import UserError
from dmpo_dist.figures.style import GREY, PALETTE, log_scale
from dmpo_dist.planning.flops import Shape, shape_of, shared_work, step_flops
from dmpo_dist.planning.gpus import GPUS, Gpu, find_gpu
from dmpo_dist.planning.simulate import Machine, Workload, calibrate, daly_interval, simulate, young_interval

COUNTS = tuple(2**power for power in range(13))
PER_NODE = 8
# (key in a row of ``simulate``, heading in the table, format) of the table's columns
COLUMNS = (
    ("gpus", "GPUs", ","), ("step_seconds", "step s", ".3f"), ("groups_per_second", "groups/s", ",.1f"),
    ("efficiency", "efficiency", ".2f"), ("communication_share", "exposed", ".0%"), ("goodput", "goodput", ".1%"),
    ("checkpoint_interval", "interval s", ",.0f"), ("young", "Young", ",.0f"), ("daly", "Daly", ",.0f"),
)  # fmt: skip
CONSTANTS = {
    "flops": "a FLOP",
    "micro_batches": "a micro-batch",
    "gathers": "a gathered module",
    "messages": "a message",
    "bytes": "a byte",
}
PANELS = {
    "useful_groups_per_second": "Groups per second that last",
    "efficiency": "Efficiency of a GPU",
    "communication_share": "Share of a step in exposed collectives",
    "goodput": "Goodput: share of the time that lasts",
    "checkpoint_interval": "Best checkpoint interval (s)",
}


def named_gpu(name: str) -> Gpu:
    """The device with this key, or the first with this name on its data sheet, such as H100.

    Raises:
        UserError: not in the table.
    """
    return find_gpu(next((key for key, gpu in GPUS.items() if gpu.sheet == name), name), PER_NODE)


def read_cells(folder: Path) -> list[dict[str, Any]]:
    """The cells that `dmpo bench scaling` measured in ``folder``.

    Raises:
        UserError: too few cells to fit the constants of the model.
    """
    cells = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((folder / CELLS).glob("*.json"))]
    cells = [cell for cell in cells if not cell["offload"]]
    if len(cells) < 6:
        raise UserError(
            f"--cells {folder}: holds {len(cells)} measured cells without offload, and 6 are needed; run dmpo bench "
            "scaling into it"
        )
    return cells


def show_calibration(cells: Sequence[dict[str, Any]], console: Console) -> None:
    """Print for each cell the measured time, the fitted time, and the time predicted by a fit without this cell.

    There are two tables: by the clock (rank 0's median step), and by the CPU seconds of a rank, which exclude waiting
    and other programs.
    """
    works = [
        Workload(
            flops=cell["flops"],
            groups=cell["groups"] / cell["workers"],
            micro_batches=cell["micro_batches"],
            parameters=cell["parameters"],
            trained=cell["trained_parameters"],
            parameter_bytes=cell["bytes_per_parameter"],
            layers=cell["layers"],
            zero=cell["zero"],
        )
        for cell in cells
    ]
    kinds: dict[str, Callable[[dict[str, Any]], float]] = {
        "clock": lambda cell: statistics.median(cell["step_seconds"]),
        "CPU": lambda cell: cell["cpu_seconds"],
    }
    for kind, seconds in kinds.items():
        fit = calibrate(works, [cell["workers"] for cell in cells], [seconds(cell) for cell in cells])
        headings = ("cell", "measured ms", "fitted ms", "left out ms", "error")
        table = Table(
            *headings, title=f"A step by the {kind}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
        )
        errors = []
        for cell, fitted, predicted in zip(cells, fit.fitted, fit.held_out, strict=True):
            measured = seconds(cell)
            errors.append(abs(predicted / measured - 1))
            times = [f"{1000 * value:.0f}" for value in (measured, fitted, predicted)]
            name = f"{cell['workers']} x ZeRO-{cell['zero']}, {cell['groups']} groups"
            table.add_row(name, *times, f"{predicted / measured - 1:+.0%}")
        console.print(table)
        constants = ", ".join(f"{CONSTANTS[name]} {value:.3g}" for name, value in fit.coefficients.items())
        console.print(f"fitted seconds: {constants}", highlight=False)
        console.print(
            f"error of a cell left out of the fit: median {statistics.median(errors):.0%}, largest {max(errors):.0%}",
            highlight=False,
        )


def read_shape(model_config: Path, lora_rank: int) -> Shape:
    """The shape of a dense decoder by its config.json.

    Raises:
        UserError: the file cannot be read, or is not of a dense decoder.
    """
    try:
        return shape_of(AutoConfig.from_pretrained(model_config), lora_rank)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"--model-config {model_config}: {str(error).splitlines()[0]}; give the config.json of a dense decoder"
        ) from None


def make_workload(
    model_config: Path,
    prompt: int,
    response: int,
    negatives: int,
    groups: int,
    micro_batches: int,
    lora_rank: int,
    zero: int,
) -> Workload:
    """The work of one GPU in a step, in bf16.

    Raises:
        UserError: ``model_config`` cannot be read, or is not of a dense decoder.
    """
    shape = read_shape(model_config, lora_rank)
    adapters = shape.layers * sum(shape.lora_rank * (n + m) for n, m in shape.linears)
    base = shape.layers * sum(n * m for n, m in shape.linears) + 2 * shape.vocab * shape.hidden
    return Workload(
        flops=groups * step_flops(shape, shared_work(prompt, response, negatives)),
        groups=groups,
        micro_batches=micro_batches,
        parameters=base + adapters,
        trained=adapters if lora_rank else base,
        parameter_bytes=2,
        layers=shape.layers,
        zero=zero,
    )


def run_simulation(works: Sequence[Workload], machine: Machine, title: str, output: Path, console: Console) -> None:
    """Simulate every ZeRO stage of ``works`` from 1 to 4,096 GPUs; writes ``output`` (JSON) and a PNG beside it."""
    results = {work.zero: simulate(work, machine, COUNTS) for work in works}
    for zero, rows in results.items():
        table = Table(title=f"ZeRO-{zero}: {title}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for _, heading, _ in COLUMNS:
            table.add_column(heading, justify="right")
        for row in rows[::2]:
            between = machine.failure_hours * 3600 / row["gpus"]
            written = machine.checkpoint_seconds
            shown = row | {"young": young_interval(written, between), "daly": daly_interval(written, between)}
            table.add_row(*(format(shown[key], form) for key, _, form in COLUMNS))
        console.print(table)
    content = {"workloads": [asdict(work) for work in works], "machine": asdict(machine), "zero": results}
    write_json(output, content)
    picture = output.with_suffix(".png")
    draw_simulation(results, _assumptions(works[0], machine, title), picture)
    console.print(f"a model, not a measurement; written to {output} and {picture}", highlight=False)


def draw_simulation(results: dict[int, list[dict[str, Any]]], assumptions: str, file: Path) -> None:
    """Draw a PNG: a panel for each figure over the number of GPUs, a line for each ZeRO stage, and the assumptions."""
    figure = Figure(figsize=(13, 6.6), dpi=160, layout="constrained")
    *panels, last = figure.subplots(2, 3).flat
    for axes, (column, title) in zip(panels, PANELS.items(), strict=True):
        for number, (zero, rows) in enumerate(results.items()):
            values = [row[column] for row in rows]
            style = {"color": PALETTE[number], "marker": "osD^"[number], "markersize": 3}
            axes.plot([row["gpus"] for row in rows], values, label=f"ZeRO-{zero}", **style)
        _finish(axes, title, logarithmic=column in ("useful_groups_per_second", "checkpoint_interval"))
    panels[0].legend(fontsize=8, frameon=False)
    last.axis("off")
    last.text(0, 1, assumptions, va="top", fontsize=8.5, color=GREY, linespacing=1.5, transform=last.transAxes)
    figure.savefig(file, format="png")


def _finish(axes: Axes, title: str, logarithmic: bool) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xscale("log", base=2)
    axes.set_xticks(COUNTS[::2], [f"{count:,}" for count in COUNTS[::2]])
    axes.set_xlabel("GPUs", fontsize=9)
    if logarithmic:
        log_scale(axes)
    else:
        axes.set_ylim(0, 1.02)
    axes.tick_params(labelsize=8)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _assumptions(work: Workload, machine: Machine, title: str) -> str:
    """The assumptions of the simulation, a line for each, for the picture."""
    node, fabric = machine.network.node, machine.network.fabric
    lines = [
        "Assumed, not measured:",
        title,
        f"{work.flops / 1e12:,.1f} TFLOP and {work.groups:g} groups a GPU and step, in {work.micro_batches:g} "
        "micro-batches",
        f"{work.parameters / 1e9:.2f} G parameters, {work.trained / 1e6:,.1f} M trained",
        f"a GPU achieves {machine.flops_per_second / 1e12:,.0f} TFLOP/s; {1000 * machine.overhead:g} ms a micro-batch "
        "beside",
        f"in a node of {machine.network.gpus_per_node}: {node.bandwidth / 1e9:g} GB/s, {1e6 * node.latency:g} µs",
        f"between nodes: {fabric.bandwidth / 1e9:g} GB/s a GPU, {1e6 * fabric.latency:g} µs",
        f"{machine.overlap:.0%} of the collectives hidden; computing times spread by {machine.jitter:.0%}",
        f"a GPU fails every {machine.failure_hours:,.0f} h; checkpoint {machine.checkpoint_seconds:g} s, restart "
        f"{machine.restart_seconds:g} s",
        "groups a GPU stay the same (weak scaling)",
    ]
    return "\n".join(lines)
