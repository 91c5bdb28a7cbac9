"""A run of ``dmpo bench speed`` as a table, a JSON and a PNG."""

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from dmpo_dist.artifacts.files import write_whole
from dmpo_dist.figures.style import BLUE, ORANGE, PALE, add_legend, drawing, save_png
from dmpo_dist.tables import Table, terminal, texts

RIVALS = {"trl": "TRL DPOTrainer", "unshared": "our separate rows"}
BAR = 0.38


def show(result: dict[str, Any], console: Console) -> None:
    """Print the figures of all implementations, then the ratios and their ceilings."""
    figures, ratios = [], []
    for cell in result["cells"]:
        shape = [cell["prompt"], cell["negatives"], f"{cell['vocab']:,}"]
        for name, f in cell["implementations"].items():
            rates = [f"{f[kind]:,.0f}" for kind in ("logical_tokens_per_second", "physical_tokens_per_second")]
            figures.append(
                [*shape, name, f"{f['groups_per_second']:.3g}", *rates, f"{f['reuse']:.2f}", f"{f['padding']:.0%}",
                 f"{f['peak_memory_mib']:,.1f}", f"{f['mfu']:.0%}"]
            )  # fmt: skip
        for rival, label in RIVALS.items():
            if cell[f"speedup_{rival}"] is not None:
                speedup, ceiling = cell[f"speedup_{rival}"], cell[f"ceiling_{rival}"]
                low, high = cell[f"speedup_{rival}_quartiles"]
                ratios.append(
                    [*shape, label, f"{speedup:.2f}", f"{low:.2f} \u2013 {high:.2f}", f"{ceiling:.2f}",
                     f"{speedup / ceiling:.0%}", f"{cell[f'memory_ratio_{rival}']:.1f}"]
                )  # fmt: skip
    columns = ["P", "K", "vocab", "implementation", "groups/s", "logical tok/s"]
    columns += ["physical", "reuse", "padding", "peak MiB", "MFU"]
    console.print(terminal(Table("Implementations", columns, texts(figures), 4, note=_conditions(result))))
    title = "Ours against the others: above 1, ours is faster or smaller"
    columns = ["P", "K", "vocab", "against", "speed-up", "quartiles", "ceiling", "share", "memory"]
    console.print(terminal(Table(title, columns, texts(ratios), 4)))
    for line in _notes(result):
        console.print(line, highlight=False)


def write_json(result: dict[str, Any], file: Path) -> None:
    """Write ``result``."""
    write_whole(file, json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@drawing()
def draw(result: dict[str, Any], file: Path) -> None:
    """Draw a PNG of speed-up and ratio of memory beside the FLOP model's ceiling, a column for each vocabulary."""
    vocabs = list(dict.fromkeys(cell["vocab"] for cell in result["cells"]))
    rivals = [name for name in RIVALS if any(cell[f"speedup_{name}"] is not None for cell in result["cells"])]
    most = max(sum(cell["vocab"] == vocab for cell in result["cells"]) for vocab in vocabs)
    size = (max(4.8, 1.4 + 0.62 * most) * len(vocabs), 3.1 * len(rivals) + 0.5)
    figure = Figure(figsize=size)
    grid = figure.subplots(len(rivals), len(vocabs), squeeze=False)
    for row, rival in enumerate(rivals):
        for column, vocab in enumerate(vocabs):
            cells = [cell for cell in result["cells"] if cell["vocab"] == vocab]
            _bars(grid[row, column], cells, rival)
            grid[row, column].set_title(f"against {RIVALS[rival]}, vocabulary {vocab:,}", fontsize=9, loc="center")
    add_legend(figure, columns=2 * len(vocabs))
    figure.suptitle(f"Speed-up of the shared-prefix step: {_device(result)}", fontsize=10)
    save_png(figure, file)


def _bars(axes: Axes, cells: list[dict[str, Any]], rival: str) -> None:
    """Draw the measured speed-up beside its ceiling, with quartiles as whiskers and the ratio of memory as a mark."""
    measured = [cell[f"speedup_{rival}"] for cell in cells]
    spread = [cell[f"speedup_{rival}_quartiles"] for cell in cells]
    ceilings = [cell[f"ceiling_{rival}"] for cell in cells]
    memory = [cell[f"memory_ratio_{rival}"] for cell in cells]
    xs = range(len(cells))
    error = [
        [max(0.0, value - low) for value, (low, _) in zip(measured, spread, strict=True)],
        [max(0.0, high - value) for value, (_, high) in zip(measured, spread, strict=True)],
    ]
    axes.bar([x - BAR / 2 for x in xs], measured, BAR, color=BLUE, label="measured", yerr=error, ecolor="black")
    axes.bar([x + BAR / 2 for x in xs], ceilings, BAR, color=PALE, label="ceiling by FLOPs")
    if rival == "trl":
        lower = [cell["ceiling_trl_head_on_completions"] for cell in cells]
        axes.plot(
            [x + BAR / 2 for x in xs], lower, "_k", markersize=10, label="ceiling, TRL's head on completions only"
        )
    axes.plot(xs, memory, "D", color=ORANGE, markersize=5, label="memory ratio")
    for x, value, (_, high) in zip(xs, measured, spread, strict=True):
        axes.annotate(
            f"{value:.1f}", (x - BAR / 2, max(value, high)), (0, 2), textcoords="offset points", ha="center", fontsize=7
        )
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xticks(list(xs), [f"P={c['prompt']}\nK={c['negatives']}" for c in cells], fontsize=7)
    axes.set_ylabel("how many times ours")
    axes.set_ylim(0, 1.25 * max(*measured, *ceilings, *memory, 1.0))
    axes.grid(visible=False)


def _device(result: dict[str, Any]) -> str:
    threads = f", {result['threads']} thread{'s' * (result['threads'] > 1)}" if result["device_type"] == "cpu" else ""
    compiled = ", ours and separate rows compiled" if result["compiled"] else ""
    return f"{result['device']}{threads}, {result['dtype']}{compiled}"


def _conditions(result: dict[str, Any]) -> str:
    versions = " ".join(f"{name} {version}" for name, version in result["versions"].items())
    peak = result["peak_flops"]
    return (
        f"{_device(result)}, {result['rounds']} rounds; {versions}; "
        f"commit {(result['commit'] or 'unknown')[:12]}\nMFU of {peak['value'] / 1e9:,.0f} GFLOP/s, {peak['source']}; "
        f"{result['flop_convention'].split(';')[0]}"
    )


def _notes(result: dict[str, Any]) -> list[str]:
    """A line for each figure that the tables do not show."""
    notes = []
    for cell in result["cells"]:
        where = f"P={cell['prompt']} K={cell['negatives']} V={cell['vocab']}"
        if result["device_type"] == "cpu":
            parts = [
                f"{cell[f'cpu_speedup_{r}']:.2f}x {label}" for r, label in RIVALS.items() if cell[f"cpu_speedup_{r}"]
            ]
            notes.append(f"{where}: by CPU seconds, which a busy machine disturbs less, {', '.join(parts)}")
        if cell["trl_batch"]:
            tried = ", ".join(
                f"{name} {seconds:.3g} s" for name, seconds in cell["trl_probe_seconds_per_group"].items()
            )
            notes.append(
                f"{where}: TRL ran {cell['trl_batch']} a batch (a group took {tried}); memory at that batch "
                f"{cell['memory_ratio_trl_fastest']:.1f}x, ceiling with TRL's head on completions alone "
                f"{cell['ceiling_trl_head_on_completions']:.2f}"
            )
        for name, probe in cell["rows"].items():
            if len(probe) > 1:
                tried = ", ".join(f"{count}: {seconds:.3g} s" for count, seconds in probe.items())
                best = min(probe, key=probe.__getitem__)
                notes.append(f"{where}: {name} ran {best} groups in a row (a group took, by groups in a row, {tried})")
        if cell["one_row"]:
            row = cell["one_row"]
            notes.append(
                f"{where}: {row['groups']} groups in one row of {row['tokens']} tokens take {row['time_ratio']:.3f} of "
                f"the time they take in a row each (by CPU seconds {row['cpu_time_ratio']:.3f})"
            )
    return notes
