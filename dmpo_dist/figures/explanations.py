"""Faithfulness of explanations: deletion curves, and the areas between them."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from dmpo_dist.figures.intervals import IntervalRow, interval_drawing
from dmpo_dist.figures.style import BLUE, GREEN, GREY, ORANGE, Drawing, Look, save_grid

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
AREAS_NOTE = "Above 0: removing items in the first order lowers the title's score faster than in the second."


def plot_faithfulness(result: Mapping[str, Any], output: Path) -> None:
    """Draw the result of ``faithfulness.summarise``, with the name of the curves' quantity as ``value``, into a PNG."""
    save_grid(faithfulness_drawings(result), output, columns=2)


def faithfulness_drawings(result: Mapping[str, Any]) -> list[Drawing]:
    """The deletion curves and the areas between them, as far as ``result`` has them."""
    drawings = []
    curves = {name: curve for name, curve in result["curves"].items() if name != SHARE and len(curve) > 1}
    if curves:
        ends = "; ".join(f"{_order(name)[0]} ends at {curve[-1]:.3g}" for name, curve in curves.items())
        title = f"Change of the title's {result['value']} (nats)"
        alt = f"{title} as history items are taken away: {ends}"
        share = result["curves"].get(SHARE, [])
        drawings.append(Drawing(title, alt, partial(_draw_deletion, curves=curves, share=share)))
    if result["areas"]:
        users = f" over {result['users']} users" if result.get("users") else ""
        rows = _area_rows(result["areas"])
        drawings.append(
            interval_drawing(f"Areas between the curves{users}", rows, zero=True, note=AREAS_NOTE, unit="nats")
        )
    return drawings


def _draw_deletion(axes: Axes, curves: Mapping[str, Sequence[float]], share: Sequence[float]) -> None:
    for name, curve in curves.items():
        label, look = _order(name)
        xs = [100 * x for x in share] if len(share) == len(curve) else range(len(curve))
        axes.plot(xs, curve, look.dash, color=look.colour, label=label)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xlabel("% of the history removed (the last item stays)" if share else "history items removed")


def _area_rows(areas: Mapping[str, Mapping[str, float]]) -> list[IntervalRow]:
    """Two rows for each area, a heading and the figure, as both names would be too long for one row."""
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
