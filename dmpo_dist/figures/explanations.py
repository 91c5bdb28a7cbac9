"""Faithfulness of explanations: deletion curves, and the areas between them."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from dmpo_dist.figures.intervals import IntervalRow, interval_drawing
from dmpo_dist.figures.style import BLACK, GREY, PALE, Drawing, Look, save_grid
from dmpo_dist.verdicts import Judged, judge

SHARE = "share_removed"
"""The curves' common horizontal axis."""
ORDERS = {
    "attribution": ("largest contribution first", Look(BLACK)),
    "recent": ("newest first", Look(BLACK, dash="--")),
    "random": ("random order", Look(PALE)),
    "inverse": ("smallest contribution first", Look(GREY, dash="-.")),
}
"""Orders are no models, so they have none of their colours."""
AREAS = {
    "attribution_vs_random": ("attribution", "against a random order"),
    "attribution_vs_random_after_first": ("attribution", "same, without the first step"),
    "attribution_vs_recent": ("attribution", "against newest first"),
    "recent_vs_random": ("recent", "against a random order"),
    "inverse_vs_random": ("inverse", "against a random order"),
}
"""Area -> its first order, and what that is compared with, in words."""
AREAS_NOTE = (
    "Above 0: the title's score falls faster when items are taken away in the order of the heading. Filled: a clear "
    "difference, by the interval and by the sign test over users; a ring: none."
)


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


def area_words(name: str) -> tuple[str, str]:
    """An area's first order, and what it is compared with: ``newest first``, ``against a random order``."""
    first, _, second = name.partition("_vs_")
    order, against = AREAS.get(name, (first, f"against {second.replace('_', ' ')}"))
    return _order(order)[0], against


def area_verdicts(areas: Mapping[str, Mapping[str, float]]) -> dict[str, Judged]:
    """The verdict on each area of an explanation's faithfulness, by its interval and its sign test."""
    judged = judge((area.get("low"), area.get("high"), area.get("sign_test_p")) for area in areas.values())
    return dict(zip(areas, judged, strict=True))


def _area_rows(areas: Mapping[str, Mapping[str, float]]) -> list[IntervalRow]:
    """A row for each area, below a heading for its first order."""
    rows, heading, verdicts = [], "", area_verdicts(areas)
    for name in sorted(areas, key=lambda name: [*AREAS, name].index(name)):
        area, (first, against) = areas[name], area_words(name)
        if first != heading:
            rows.append(IntervalRow(first))
            heading = first
        value, low, high = (area.get(key) for key in ("area", "low", "high"))
        rows.append(IntervalRow(against, value, low, high, BLACK, hollow=not verdicts[name].clear))
    return rows


def _order(name: str) -> tuple[str, Look]:
    return ORDERS.get(name, (name, Look(GREY)))
