"""One look for all figures: colours, axes and legends; and the two ways out, a PNG file or a chart of a web page."""

import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dmpo_dist.figures.svg import TOOLTIP, inline_svg, printable

# Okabe-Ito: told apart by colour-blind readers and in grey.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#555555"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, "#E69F00", "#56B4E9", "#882255")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", ":")
PALE, GRID = "#999999", "#DDDDDD"
MOST_LETTERS = 28  # of a name in a figure
LEGEND_LETTERS = 52  # of one line of a chart's legend, the space for its line samples included
LEGEND_LINE = 0.21  # inches
CHART_WIDTH = 4.7  # inches: 338 units of the page's style sheet, about one pixel each on a phone

STYLE = {
    "font.size": 8, "axes.titlesize": 10, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "legend.fontsize": 8, "legend.frameon": False, "legend.handlelength": 1.8, "legend.columnspacing": 1.2,
    "legend.handletextpad": 0.5, "axes.titlelocation": "left", "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.6,
    "lines.linewidth": 1.7, "savefig.dpi": 160, "figure.constrained_layout.use": True,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
}  # fmt: skip
CHART_STYLE = {
    "font.size": 10, "axes.labelsize": 10, "xtick.labelsize": 10, "ytick.labelsize": 10, "legend.fontsize": 10,
    "figure.facecolor": "none", "axes.facecolor": "none",  # the page shows through, light or dark
    "svg.fonttype": "none", "svg.hashsalt": "dmpo", "path.simplify_threshold": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """How one series is drawn; the three together tell 49 series apart."""

    colour: str
    marker: str = "o"
    dash: str = "-"


@dataclass(frozen=True)
class Chart:
    """A figure of a web page with what stands around it.

    Attributes:
        title: stands above it.
        alt: says to readers who cannot see it what it shows, its numbers included.
        svg: the element, its ids to be made unique by ``markup``.
        note: stands below it.
    """

    title: str
    alt: str
    svg: str
    note: str = ""

    def markup(self, number: int) -> Markup:
        """The svg element; ``number`` is another for each chart of a page."""
        return Markup(self.svg.replace("chart-id-", f"chart-{number}-"))


@contextmanager
def drawing() -> Iterator[None]:
    """Figures made and saved inside have the common style."""
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in a script that the font lacks: a browser has it
        yield


@drawing()
def draw_chart(title: str, alt: str, draw: Callable[..., None], heights: Sequence[float], note: str = "") -> Chart:
    """Draw a chart of a web page.

    Args:
        draw: gets one Axes for each of ``heights`` and draws on it; series with a label are put into a legend.
        heights: of the panels from top to bottom, in inches.
    """
    with mpl.rc_context(CHART_STYLE):
        figure = Figure(figsize=(CHART_WIDTH, sum(heights)))
        draw(*figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
        labels = _handles(figure)
        if len(labels) > 1:
            columns = max(1, LEGEND_LETTERS // (5 + max(map(len, labels))))
            add_legend(figure, columns)
            figure.set_figheight(sum(heights) + LEGEND_LINE * (0.5 - (-len(labels) // columns)))
        saved = io.StringIO()
        figure.savefig(saved, format="svg", metadata={"Date": None})
    return Chart(title, alt, inline_svg(saved.getvalue(), title, alt), note)


def save_png(figure: Figure, file: Path) -> None:
    """Write ``file``; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format="png")


def looks(names: Iterable[Any]) -> dict[Any, Look]:
    """A look for each name by its place among ``names``; give the same names to all figures that are read together."""
    return {
        name: Look(PALETTE[i % 7], MARKERS[(i + i // 7) % 7], DASHES[i // 7 % 3])
        for i, name in enumerate(dict.fromkeys(names))
    }


def short(name: str) -> str:
    """A name of the data as a figure can show it: printable, and cut in its middle to MOST_LETTERS, as paths differ at the end."""
    text = printable(name)
    return text if len(text) <= MOST_LETTERS else f"{text[:8]}\u2026{text[9 - MOST_LETTERS :]}"


def add_legend(figure: Figure, columns: int) -> Artist:
    """One legend below all panels, each label once."""
    labels = _handles(figure)
    return figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=columns)


def log_ticks(axes: Axes, values: Iterable[float]) -> None:
    """A horizontal axis in powers of two whose ticks are the values that occur."""
    axes.set_xscale("log", base=2)
    ticks = sorted({int(value) for value in values})
    axes.set_xticks(ticks, [f"{tick:d}" for tick in ticks], minor=False)
    axes.minorticks_off()


def hover(artist: Artist, texts: Sequence[str]) -> None:
    """Give each marker of ``artist`` a tooltip on web pages."""
    artist.set_gid("".join(TOOLTIP + printable(text) for text in texts))


def _handles(figure: Figure) -> dict[str, Artist]:
    return {label: h for axes in figure.axes for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
