"""Small vector charts for a page: the text stays text, colours come from the page's style sheet.

A chart is WIDTH units wide and as wide as its column on the screen: about one unit a pixel on a phone, so that its labels
are read there. Elements are made by ElementTree, which escapes whatever text the data holds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal
from xml.etree.ElementTree import Element, SubElement, tostring

from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from dmpo_dist.report.words import number

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 36
LABEL, VALUE, ROW = 124, 46, 24  # of an interval chart: the columns beside the plot, the height of a row
LETTERS = 18  # of a label that fits its column
COLOURS, DASHES = 5, 3
"""How many the style sheet has: classes c0..c4 and d0..d2 tell COLOURS x DASHES lines apart."""
MARKED_POINTS = 24
DODGE, MOST_DODGE = 4, 16  # between the whiskers of two lines at one place, and of all of them

Scale = Callable[[float], float]


@dataclass(frozen=True)
class Line:
    """One series of a line chart.

    Attributes:
        label: for the legend.
        points: (x, y), x rising.
        style: which of the COLOURS x DASHES looks.
        raw: the same before smoothing, drawn pale behind it.
        whiskers: (x, low, high) at some of the points.
        marked: whether each point has a dot, where there are few.
    """

    label: str
    points: Sequence[tuple[float, float]]
    style: int = 0
    raw: Sequence[tuple[float, float]] = ()
    whiskers: Sequence[tuple[float, float, float]] = ()
    marked: bool = True


@dataclass(frozen=True)
class Panel:
    """One plot of a line chart; several stand below each other on one horizontal axis.

    Attributes:
        lines: what to draw.
        name: of the vertical axis, needed where there are several.
        mark: x of a vertical line.
    """

    lines: Sequence[Line]
    name: str = ""
    mark: float | None = None


@dataclass(frozen=True)
class IntervalRow:
    """A figure with its interval; one without a value is a heading."""

    label: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    style: int = 0
    hollow: bool = False


@dataclass(frozen=True)
class Figure:
    """A chart with what the page says around it.

    Attributes:
        title: above it.
        chart: the svg element.
        legend: label and style of each series; empty where there is one.
        note: below it.
    """

    title: str
    chart: Markup
    legend: Sequence[tuple[str, int]] = field(default_factory=tuple)
    note: str = ""


def style_class(style: int) -> str:
    """The style sheet's classes for a series."""
    return f"c{style % COLOURS} d{style // COLOURS % DASHES}"


def line_chart(panels: Sequence[Panel], alt: str, x_name: str, x_scale: Literal["linear", "log"] = "linear") -> Markup:
    """Lines over a common horizontal axis; on a logarithmic one every x of the data is a tick where there is room.

    Args:
        panels: one or more, with a point at least.
        alt: what a reader who cannot see it should know.
    """
    xs = sorted({x for panel in panels for line in panel.lines for x, _ in line.points})
    scale, ticks = _horizontal(xs, x_scale)
    height = TOP + len(panels) * (HEIGHT - TOP - BOTTOM) + (len(panels) - 1) * 26 + BOTTOM
    svg = _chart(height, alt)
    for place, panel in enumerate(panels):
        top = TOP + place * (HEIGHT - TOP - BOTTOM + 26) + (12 if panel.name else 0)
        bottom = TOP + (place + 1) * (HEIGHT - TOP - BOTTOM) + place * 26
        if panel.name:
            _text(svg, panel.name, 0, top - 9, "name")
        _panel(svg, panel, scale, top, bottom)
    for tick in ticks:
        _text(svg, _short(tick), scale(tick), height - BOTTOM + 15, "middle")
    _text(svg, x_name, (LEFT + WIDTH - RIGHT) / 2, height - 4, "middle name")
    return _done(svg)


def interval_chart(rows: Sequence[IntervalRow], alt: str, zero: bool = False) -> Markup:
    """A row per figure: label, whisker from low to high, and the figure; headings part groups of rows.

    Args:
        rows: one at least with a value.
        alt: what a reader who cannot see it should know.
        zero: show where no difference is, and signs.
    """
    values = [v for row in rows for v in (row.value, row.low, row.high) if v is not None]
    low, high = _padded([*values, 0.0] if zero else values)
    scale, ticks = _linear(low, high, LABEL, WIDTH - VALUE), _ticks(low, high, 4)
    height = TOP + ROW * len(rows) + 22
    svg = _chart(height, alt)
    for tick in ticks:
        _line(svg, scale(tick), TOP, scale(tick), height - 22, "zero" if zero and tick == 0 else "grid")
        _text(svg, _short(tick), scale(tick), height - 7, "middle")
    for place, row in enumerate(rows):
        y = TOP + ROW * (place + 0.5)
        if row.value is None:
            _text(svg, row.label, 0, y + 4, "group")
            continue
        _label(svg, row.label, y + 4)
        group = SubElement(svg, "g", {"class": f"c{row.style % COLOURS}"})
        if row.low is not None and row.high is not None:
            _line(group, scale(row.low), y, scale(row.high), y, "whisker")
        radius = {"cx": _n(scale(row.value)), "cy": _n(y), "r": "4", "class": "hollow" if row.hollow else "dot"}
        SubElement(group, "circle", radius)
        _text(svg, number(row.value, "+.3f" if zero else ".3f"), WIDTH, y + 4, "end")
    return _done(svg)


def bar(value: float, largest: float) -> Markup:
    """A bar for a table cell, to the right of its middle where positive and to the left where negative."""
    width, height = 80, 12
    svg = Element("svg", {"viewBox": f"0 0 {width} {height}", "class": "bar", "aria-hidden": "true"})
    length = abs(value) / largest * (width / 2 - 1) if largest else 0
    x = width / 2 - (length if value < 0 else 0)
    colour = "c1" if value < 0 else "c0"
    SubElement(svg, "rect", {"x": _n(x), "y": "1", "width": _n(length), "height": "10", "class": f"{colour} fill"})
    _line(svg, width / 2, 0, width / 2, height, "zero")
    return _done(svg)


def swatch(style: int) -> Markup:
    """The line of a legend entry."""
    svg = Element("svg", {"viewBox": "0 0 24 8", "class": "swatch", "aria-hidden": "true"})
    _line(svg, 1, 4, 23, 4, f"line {style_class(style)}")
    return _done(svg)


def _panel(svg: Element, panel: Panel, x: Scale, top: float, bottom: float) -> None:
    values = [v for line in panel.lines for _, v in (*line.points, *line.raw)]
    values += [v for line in panel.lines for _, *ends in line.whiskers for v in ends]
    low, high = _padded(values)
    y, ticks = _linear(low, high, bottom, top), _ticks(low, high, 5)
    for tick in ticks:
        _line(svg, LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid")
        _text(svg, _short(tick), LEFT - 6, y(tick) + 4, "end")
    if panel.mark is not None and LEFT <= x(panel.mark) <= WIDTH - RIGHT:
        _line(svg, x(panel.mark), top, x(panel.mark), bottom, "mark")
    whiskered = [line for line in panel.lines if line.whiskers]
    apart = min(DODGE, MOST_DODGE / max(1, len(whiskered)))
    for line in panel.lines:
        shift = apart * (whiskered.index(line) - (len(whiskered) - 1) / 2) if line.whiskers else 0.0
        _draw_line(svg, line, lambda value, shift=shift: x(value) + shift, y)


def _draw_line(svg: Element, line: Line, x: Scale, y: Scale) -> None:
    group = SubElement(svg, "g", {"class": style_class(line.style)})
    if line.raw:
        _polyline(group, line.raw, x, y, "raw")
    _polyline(group, line.points, x, y, "line")
    for at, low, high in line.whiskers:
        _line(group, x(at), y(low), x(at), y(high), "whisker")
    if line.marked and len(line.points) <= MARKED_POINTS:
        for at, value in line.points:
            dot = SubElement(group, "circle", {"cx": _n(x(at)), "cy": _n(y(value)), "r": "3", "class": "dot"})
            SubElement(dot, "title").text = f"{line.label}, {_short(at)}: {value:.4g}"


def _horizontal(xs: Sequence[float], kind: Literal["linear", "log"]) -> tuple[Scale, list[float]]:
    left, right = LEFT + 6, WIDTH - RIGHT - 6
    if kind == "log" and xs[0] > 0:
        inner = _linear(math.log(xs[0]), math.log(xs[-1]), left, right)
        ticks = [xs[0]]
        for x in xs[1:]:
            if inner(math.log(x)) - inner(math.log(ticks[-1])) >= 26:
                ticks.append(x)
        return lambda value: inner(math.log(value)), ticks
    scale = _linear(min(xs[0], 0), xs[-1], left, right)
    return scale, _ticks(min(xs[0], 0), xs[-1], 6, whole=xs[-1] > 6)


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """A range with some room around the values, also where they are all one."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.5 * (abs(high) or 1.0)
    return low - room, high + room


def _ticks(low: float, high: float, most: int, whole: bool = False) -> list[float]:
    """Round numbers within the range."""
    ticks = MaxNLocator(nbins=most, integer=whole).tick_values(low, high)
    return [float(f"{tick:.10g}") for tick in ticks if low <= tick <= high]


def _linear(low: float, high: float, start: float, end: float) -> Scale:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _chart(height: float, alt: str) -> Element:
    box = f"0 0 {WIDTH} {_n(height)}"
    return Element("svg", {"viewBox": box, "class": "chart", "role": "img", "aria-label": alt})


def _line(parent: Element, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
    SubElement(parent, "line", {"x1": _n(x1), "y1": _n(y1), "x2": _n(x2), "y2": _n(y2), "class": kind})


def _polyline(parent: Element, points: Sequence[tuple[float, float]], x: Scale, y: Scale, kind: str) -> None:
    places = " ".join(f"{_n(x(a))},{_n(y(b))}" for a, b in points)
    SubElement(parent, "polyline", {"points": places, "class": kind})


def _text(parent: Element, text: str, x: float, y: float, kind: str) -> Element:
    element = SubElement(parent, "text", {"x": _n(x), "y": _n(y), "class": kind})
    element.text = text
    return element


def _label(svg: Element, text: str, y: float) -> None:
    """A row's name, cut where its column ends and whole in its tooltip."""
    if len(text) <= LETTERS:
        _text(svg, text, LABEL - 8, y, "end")
        return
    element = _text(svg, "", LABEL - 8, y, "end")
    SubElement(element, "title").text = text
    element[0].tail = text[: LETTERS - 1] + "…"


def _done(svg: Element) -> Markup:
    return Markup(tostring(svg, encoding="unicode"))


def _short(value: float) -> str:
    return number(value / 1000, "g") + "k" if abs(value) >= 10_000 else number(value, ".4g")


def _n(value: float) -> str:
    """A coordinate, to a tenth of a unit."""
    return f"{value:.1f}".removesuffix(".0")
