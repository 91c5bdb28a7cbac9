"""Faithfulness of explanations: deletion curves, and the areas between them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dmpo_dist.figures.intervals import IntervalRow, draw_intervals, interval_chart
from dmpo_dist.figures.style import BLUE, GREEN, GREY, ORANGE, Chart, Look, add_legend, draw_chart, drawing, save_png

SHARE = "share_removed"
"""The curves' common horizontal axis."""
ORDERS = {
    "attribution": ("largest contribution first", Look(BLUE)),
    "recent": ("most recent first", Look(GREEN, dash="--")),
    "random": ("random order", Look(GREY)),
    "inverse": ("smallest contribution first", Look(ORANGE, dash="-.")),
}
AREAS = {
    "attribution_vs_random": ("contributions", "random"),
    "attribution_vs_random_after_first": ("contributions", "random, after the first step"),
    "attribution_vs_recent": ("contributions", "recent"),
    "recent_vs_random": ("recent", "random"),
    "inverse_vs_random": ("inverse", "random"),
}
AREAS_NOTE = "Above 0: taking items away in the first order pulls the title down faster than in the second."


@drawing()
def plot_faithfulness(result: Mapping[str, Any], output: Path) -> None:
    """Draw what ``faithfulness.summarise`` returns, with ``value``, what the curves show, into a PNG."""
    figure = Figure(figsize=(10.5, 4.4))
    left, right = figure.subplots(1, 2, width_ratios=[1.35, 1])
    _draw_deletion(left, result)
    left.set_title("History items taken away one after another")
    left.set_ylabel(f"change in nats of the title's\n{result['value']}")
    draw_intervals(right, _area_rows(result["areas"]), zero=True, unit="nats, 95 % interval")
    right.set_title(f"Area between curves, {result['users']} users")
    add_legend(figure, columns=4)
    save_png(figure, output)


def faithfulness_charts(result: Mapping[str, Any]) -> list[Chart]:
    """The same as charts, those that ``result`` has figures for."""
    charts = []
    curves = {name: curve for name, curve in result["curves"].items() if name != SHARE and len(curve) > 1}
    if curves:
        ends = "; ".join(f"{_order(name)[0]} ends at {curve[-1]:.3g}" for name, curve in curves.items())
        title = f"Change of the title's {result['value']} (nats)"
        alt = f"{title} as history items are taken away: {ends}"
        charts.append(draw_chart(title, alt, lambda axes: _draw_deletion(axes, result), [2.8]))
    if result["areas"]:
        users = f" over {result['users']} users" if result.get("users") else ""
        title = f"Areas between the curves{users}"
        charts.append(interval_chart(title, _area_rows(result["areas"]), zero=True, note=AREAS_NOTE, unit="nats"))
    return charts


def _draw_deletion(axes: Axes, result: Mapping[str, Any]) -> None:
    share = [100 * x for x in result["curves"].get(SHARE, [])]
    for name, curve in result["curves"].items():
        if name == SHARE or len(curve) < 2:
            continue
        label, look = _order(name)
        xs = share if len(share) == len(curve) else range(len(curve))
        axes.plot(xs, curve, look.dash, color=look.colour, label=label)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xlabel("% of the history removed" if share else "history items removed")
    axes.set_ylabel("nats")


def _area_rows(areas: Mapping[str, Mapping[str, float]]) -> list[IntervalRow]:
    """Two rows for each area, as its names are long: a heading, and the figure."""
    rows = []
    for name, area in areas.items():
        first, second = AREAS.get(name, (name.partition("_vs_")[0], name.partition("_vs_")[2]))
        low, high = area.get("low"), area.get("high")
        unclear = low is None or high is None or low <= 0 <= high
        colour = GREY if unclear else BLUE if low > 0 else ORANGE
        rows += [IntervalRow(f"{first}, against"), IntervalRow(second, area.get("area"), low, high, colour)]
    return rows


def _order(name: str) -> tuple[str, Look]:
    return ORDERS.get(name, (name, Look(GREY)))
