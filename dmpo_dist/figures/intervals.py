"""Interval plots: a row per figure with its 95 % interval."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from dmpo_dist.figures.style import GREY, Chart, draw_chart, hover, short
from dmpo_dist.formats import interval, number

ROW_HEIGHT, FRAME_HEIGHT = 0.3, 0.5  # inches


@dataclass(frozen=True)
class IntervalRow:
    """A figure with its interval; without a value, a heading of the rows below it."""

    label: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    colour: str = GREY
    hollow: bool = False


def interval_chart(
    title: str, rows: Sequence[IntervalRow], zero: bool = False, note: str = "", unit: str = ""
) -> Chart:
    """A chart of ``rows``, one at least with a value; its description names them all.

    Args:
        zero: the figures are differences: show where none is, and signs.
    """
    form = _form(zero)
    words, heading = [], ""
    for row in rows:
        if row.value is None:
            heading = f"{row.label} "
        else:
            words.append(f"{heading}{row.label} {number(row.value, form)} {interval(row.low, row.high, form)}".strip())
    height = FRAME_HEIGHT + ROW_HEIGHT * len(rows)
    return draw_chart(
        title, f"{title}: {'; '.join(words)}", lambda axes: draw_intervals(axes, rows, zero, unit), [height], note
    )


def draw_intervals(axes: Axes, rows: Sequence[IntervalRow], zero: bool, unit: str = "") -> None:
    """Draw the rows from top to bottom, each figure also as a number beside its interval."""
    form = _form(zero)
    for place, row in enumerate(rows):
        if row.value is None:
            continue
        if row.low is not None and row.high is not None:
            axes.plot([row.low, row.high], [place, place], color=row.colour, linewidth=2.2, solid_capstyle="butt")
        face = "white" if row.hollow else row.colour
        (dot,) = axes.plot(row.value, place, "o", color=row.colour, markerfacecolor=face, markersize=6)
        hover(dot, [f"{row.label} {number(row.value, form)} {interval(row.low, row.high, form)}".strip()])
        axes.text(1.02, place, number(row.value, form), transform=axes.get_yaxis_transform(), va="center_baseline")
    if zero:
        axes.axvline(0, color=GREY, linewidth=1)
    axes.set_yticks(range(len(rows)), [short(row.label) for row in rows])
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        if row.value is None:
            label.set_fontweight("bold")
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.margins(x=0.06)
    axes.locator_params(axis="x", nbins=4)
    axes.set_xlabel(unit)


def _form(zero: bool) -> str:
    return "+.3f" if zero else ".3f"
