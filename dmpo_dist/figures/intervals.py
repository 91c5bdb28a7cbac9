"""Interval plots: a row per figure with its 95 % interval."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from matplotlib.axes import Axes

from dmpo_dist.figures.style import GREY, Drawing, hover, short
from dmpo_dist.formats import interval, number

ROW_HEIGHT, FRAME_HEIGHT = 0.3, 0.5  # inches


@dataclass(frozen=True)
class IntervalRow:
    """A figure with its interval; a row without a value is the heading of the rows below it.

    ``hollow`` draws a ring: a difference that is not clear, or a bound that no model is held to.
    """

    label: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    colour: str = GREY
    hollow: bool = False

    def words(self, form: str) -> str:
        """``label +0.086 [+0.011, +0.149]``."""
        return f"{self.label} {number(self.value, form)} {interval(self.low, self.high, form)}".strip()


def interval_drawing(
    title: str, rows: Sequence[IntervalRow], zero: bool = False, note: str = "", unit: str = ""
) -> Drawing:
    """The rows from top to bottom; the text for blind readers lists them all.

    Args:
        rows: at least one has a value.
        zero: whether the figures are differences, which have signs and a line at 0.
    """
    form = "+.3f" if zero else ".3f"
    words, heading = [], ""
    for row in rows:
        if row.value is None:
            heading = f"{row.label} "
        else:
            words.append(f"{heading}{row.words(form)}")
    height = FRAME_HEIGHT + ROW_HEIGHT * len(rows)
    draw = partial(_draw, rows=rows, zero=zero, form=form, unit=unit)
    return Drawing(title, f"{title}: {'; '.join(words)}", draw, height, note)


def _draw(axes: Axes, rows: Sequence[IntervalRow], zero: bool, form: str, unit: str) -> None:
    """Draw the rows; the number of each figure is written beside its interval."""
    for y, row in enumerate(rows):
        if row.value is None:
            continue
        if row.low is not None and row.high is not None:
            width = 1.3 if row.hollow else 2.2
            axes.plot([row.low, row.high], [y, y], color=row.colour, linewidth=width, solid_capstyle="butt")
        face = "white" if row.hollow else row.colour
        (dot,) = axes.plot(row.value, y, "o", color=row.colour, markerfacecolor=face, markersize=6)
        hover(dot, [row.words(form)])
        axes.text(1.02, y, number(row.value, form), transform=axes.get_yaxis_transform(), va="center_baseline")
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
