"""The common style of all figures (colours, axes, legends), and their two outputs: a PNG file or a web page's SVG."""

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
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from dmpo_dist.artifacts.files import whole_file
from dmpo_dist.figures.svg import TOOLTIP, inline_svg, printable

# The palette of Okabe and Ito, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#555555"
YELLOW, SKY, WINE = "#E69F00", "#56B4E9", "#882255"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY, WINE)
ROSE, INDIGO, OLIVE, BROWN, CYAN = "#B0508A", "#332288", "#808000", "#8C510A", "#0097A7"  # for models, on white too
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", ":")
PALE, GRID, BLACK = "#8A8A8A", "#DDDDDD", "#1A1A1A"
MOST_LETTERS = 28  # longer names are cut in figures
LEGEND_LETTERS = 52  # width of a line of a chart's legend, in letters, its line samples included
LEGEND_LINE, TITLE_LINE = 0.21, 0.25  # inches
WIDTH = 4.7  # inches: 338 units of the page's style sheet, about one pixel each on a phone

STYLE = {
    "font.size": 8, "axes.titlesize": 10, "figure.titlesize": 10, "axes.labelsize": 9,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8, "legend.frameon": False,
    "legend.handlelength": 1.8, "legend.columnspacing": 1.2, "legend.handletextpad": 0.5,
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.6,
    "lines.linewidth": 1.7, "savefig.dpi": 160, "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
}  # fmt: skip
CHART_STYLE = {
    "font.size": 10, "axes.labelsize": 10, "xtick.labelsize": 10, "ytick.labelsize": 10, "legend.fontsize": 10,
    "figure.facecolor": "none", "axes.facecolor": "none",  # the page shows through, light or dark
    "svg.fonttype": "none", "svg.hashsalt": "dmpo", "path.simplify_threshold": 0.5,
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """How one series is drawn; colour, marker and dash together tell 49 series apart."""

    colour: str
    marker: str = "o"
    dash: str = "-"


@dataclass(frozen=True)
class Drawing:
    """One plot; a PNG shows several side by side, a web page shows each as a figure.

    Attributes:
        title: the text above the plot.
        alt: a description for readers who cannot see the plot, with its numbers.
        draw: draws on the given Axes; series with a label are put into the legend.
        height: inches without the legend; the width is always WIDTH.
        note: the text below the plot on a page.
    """

    title: str
    alt: str
    draw: Callable[[Axes], object]
    height: float = 2.6
    note: str = ""


@contextmanager
def drawing() -> Iterator[None]:
    """Figures made and saved inside have the common style."""
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in a script that the font lacks: a browser has it
        yield


@drawing()
def chart(drawn: Drawing, number: int) -> Markup:
    """The drawing as an svg element of a web page; every drawing of the page needs its own ``number``."""
    with mpl.rc_context(CHART_STYLE):
        figure = Figure()
        figure.set_size_inches(WIDTH, _paint(figure, drawn))
        saved = io.StringIO()
        figure.savefig(saved, format="svg", metadata={"Date": None})
    return Markup(inline_svg(saved.getvalue(), drawn.title, drawn.alt, f"chart-{number}"))


@drawing()
def save_grid(drawings: Sequence[Drawing], file: Path, columns: int, heading: str = "") -> None:
    """Write the drawings side by side, below ``heading``, into a PNG; its folder is made."""
    rows = max(1, -(-len(drawings) // columns))
    figure = Figure()
    heights = [2.0]
    for panel, drawn in zip(figure.subfigures(rows, columns, squeeze=False).flat, drawings, strict=False):
        heights.append(_paint(panel, drawn))
        panel.axes[0].set_title(drawn.title)
    figure.set_size_inches(WIDTH * columns, rows * (max(heights) + TITLE_LINE))
    if heading:
        figure.suptitle(heading)
    save_png(figure, file)


def save_png(figure: Figure, file: Path) -> None:
    """Write ``file``; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as part:
        figure.savefig(part, format="png")


def _paint(figure: FigureBase, drawn: Drawing) -> float:
    """Draw on an empty figure; returns the height in inches that the drawing and its legend need."""
    drawn.draw(figure.subplots())
    labels = _handles(figure)
    if len(labels) < 2:
        return drawn.height
    columns = max(1, LEGEND_LETTERS // (5 + max(map(len, labels))))
    add_legend(figure, columns)
    return drawn.height + LEGEND_LINE * (0.5 - (-len(labels) // columns))


def looks(names: Iterable[Any]) -> dict[Any, Look]:
    """A look for each name by its index in ``names``; figures that are read together must be given the same names."""
    return {
        name: Look(PALETTE[i % 7], MARKERS[(i + i // 7) % 7], DASHES[i // 7 % 3])
        for i, name in enumerate(dict.fromkeys(names))
    }


def short(name: str) -> str:
    """``name`` as a figure can show it; a long one is cut in its middle, as paths differ at their ends."""
    text = printable(name)
    return text if len(text) <= MOST_LETTERS else f"{text[:8]}\u2026{text[9 - MOST_LETTERS :]}"


def add_legend(figure: FigureBase, columns: int) -> None:
    """One legend below all panels, each label once."""
    labels = _handles(figure)
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=columns)


def log_ticks(axes: Axes, values: Iterable[float]) -> None:
    """Make the horizontal axis logarithmic, with a tick at each of ``values``."""
    axes.set_xscale("log", base=2)
    ticks = sorted({int(value) for value in values})
    axes.set_xticks(ticks, [f"{tick:d}" for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.margins(y=0.1)


def log_scale(axes: Axes) -> None:
    """Make the vertical axis logarithmic, with plain numbers: matplotlib's own labels are formulas, which are off."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def hover(artist: Artist, texts: Sequence[str]) -> None:
    """Give each marker of ``artist`` a tooltip on web pages."""
    artist.set_gid("".join(TOOLTIP + printable(text) for text in texts))


def _handles(figure: FigureBase) -> dict[str, Artist]:
    return {label: h for axes in figure.axes for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
