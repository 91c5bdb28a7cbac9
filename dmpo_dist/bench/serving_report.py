"""A run of ``dmpo bench serve`` as tables, a JSON and a PNG."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from rich.console import Console

from dmpo_dist.figures.style import BLUE, GREY, ORANGE, Drawing, log_scale, save_grid
from dmpo_dist.tables import Table, terminal, texts


def show(result: dict[str, Any], console: Console) -> None:
    """Print the throughputs, their ratio and the figures at each rate."""
    server = result["server"]
    rows = [
        ["server, one at a time", "", "", *_cells(server["alone"])],
        [f"server, {server['company']} at a time", f"{server['per_second']:.3g}", f"{server['cpu_seconds']:.3g}"],
    ]
    for kind, loop in result["loops"].items():
        speed, cpu = f"{1 / loop['seconds']:.3g}", f"{loop['cpu_seconds']:.3g}"
        ratios = [f"{loop['ratio']:.1f}", f"{loop['ratio_cpu']:.1f}"]
        rows.append([f"{kind} loop", speed, cpu, f"{loop['seconds']:.3g}", "", "", *ratios])
    rows = [[*row, *[""] * (8 - len(row))] for row in rows]
    columns = ["", "requests/s", "CPU s each", "p50 s", "p95 s", "p99 s", "server does", "by CPU s"]
    console.print(terminal(Table(_title(result), columns, texts(rows), 1, note=_conditions(result))))
    if result["rates"]:
        rows = [
            [f"{row['rate']:.3g}", row["sent"], row["answered"], *_cells(row["seconds"]), f"{row['goodput']:.3g}",
             f"{row['loop_seconds']['p50']:.3g}", f"{row['loop_goodput']:.3g}"]
            for row in result["rates"]
        ]  # fmt: skip
        columns = ["requests/s", "sent", "answered", "p50 s", "p95 s", "p99 s", "in time/s"]
        columns += ["plain loop p50 s", "in time/s"]
        title = f"Poisson arrivals; in time is within {result['within']:g} s"
        console.print(terminal(Table(title, columns, texts(rows), 0)))


def draw(result: dict[str, Any], file: Path) -> None:
    """Draw latency and goodput over the rate of arrivals."""
    rates = [row["rate"] for row in result["rates"]]

    def latency(axes: Axes) -> None:
        for name, dash, marker in (("p50", "-", "o"), ("p95", "--", "^"), ("p99", ":", "v")):
            axes.plot(rates, [row["seconds"][name] for row in result["rates"]], dash, color=BLUE, marker=marker,
                      markersize=4, label=f"server, {name}")  # fmt: skip
        loop = [row["loop_seconds"]["p50"] for row in result["rates"]]
        axes.plot(rates, loop, "-", color=ORANGE, marker="s", markersize=4, label="plain loop, p50")
        axes.axhline(result["within"], color=GREY, linewidth=0.8, linestyle=":")
        log_scale(axes)
        axes.set_xlabel("requests per second that arrive")
        axes.set_ylabel("seconds to the answer")

    def goodput(axes: Axes) -> None:
        axes.plot(rates, rates, color=GREY, linewidth=0.8, linestyle=":", label="all of them")
        for key, label, colour, marker in (
            ("goodput", "server", BLUE, "o"),
            ("loop_goodput", "plain loop", ORANGE, "s"),
        ):
            values = [row[key] for row in result["rates"]]
            axes.plot(rates, values, color=colour, marker=marker, markersize=4, label=label)
        axes.set_xlabel("requests per second that arrive")
        axes.set_ylabel(f"answered within {result['within']:g} s, per second")
        axes.set_ylim(bottom=0)

    alt = f"the server does {result['loops']['plain']['ratio']:.1f} times the loop's requests"
    drawings = [Drawing("Latency", alt, latency), Drawing("Goodput", alt, goodput)]
    save_grid(drawings, file, columns=2, heading=_title(result))


def _title(result: dict[str, Any]) -> str:
    return f"{result['titles']} titles behind a prompt of {result['prompt_tokens']} tokens"


def _conditions(result: dict[str, Any]) -> str:
    scaled = result["timed_titles"]
    notes = [f"{result['requests']} requests each, {result['returning']:.0%} of users who were there before"]
    notes.append(f"{result['threads']} thread{'s' * (result['threads'] > 1)}, {result['dtype']}")
    if scaled < result["titles"]:
        notes.append(f"loops were timed on {scaled} titles and scaled up")
    notes.append(f"scores differ by at most {result['difference']:.1e} nats")
    return "; ".join(notes)


def _cells(percentiles: dict[str, float | None]) -> list[str]:
    return ["-" if value is None else f"{value:.3g}" for value in percentiles.values()]
