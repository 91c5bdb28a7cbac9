"""Explanations of single rankings, and how faithful they were measured to be."""

from dmpo_dist.artifacts.explanations import ExplainedRequest, Faithfulness
from dmpo_dist.explanation.words import signed
from dmpo_dist.report.svg import Figure, IntervalRow, Line, Panel, bar, interval_chart, line_chart
from dmpo_dist.report.tables import Cell, Table
from dmpo_dist.report.words import MISSING, interval, number

SHARE = "share_removed"
"""The curves' common horizontal axis, where the file has it among them."""
NAMES = {
    "attribution": "largest contribution first", "recent": "most recent first", "random": "random order",
    "inverse": "smallest contribution first",
}  # fmt: skip


def history_table(request: ExplainedRequest) -> Table:
    """What each item of the history adds to the score, as it stands in the prompt."""
    largest = max((abs(item.contribution) for item in request.history), default=0.0)
    rows = [
        [
            Cell(item.title, kind="title"),
            Cell(
                number(item.contribution, signed(largest)), key=item.contribution, chart=bar(item.contribution, largest)
            ),
            Cell(MISSING if item.rank_without is None else str(item.rank_without), key=item.rank_without),
        ]
        for item in request.history
    ]
    caption = "History, oldest first: how much the title's score falls without the item (nats), and the rank then"
    return Table(caption, ["item", "effect", "rank without"], rows, sortable=len(rows) > 2)


def faithfulness_figures(measured: Faithfulness) -> list[Figure]:
    """The deletion curves, and the areas between them with their intervals."""
    figures = []
    curves = {name: curve for name, curve in measured.curves.items() if name != SHARE and len(curve) > 1}
    if curves:
        figures.append(_deletion(curves, measured))
    if measured.areas:
        figures.append(_areas(measured))
    return figures


def _deletion(curves: dict[str, list[float]], measured: Faithfulness) -> Figure:
    share = measured.curves.get(SHARE)
    x_name = "% of the history removed" if share else "history items removed"
    lines = []
    for style, (name, curve) in enumerate(curves.items()):
        xs = [100 * x for x in share] if share and len(share) == len(curve) else range(len(curve))
        lines.append(Line(NAMES.get(name, name), [(float(x), y) for x, y in zip(xs, curve, strict=True)], style))
    words = "; ".join(f"{line.label} ends at {line.points[-1][1]:.3g}" for line in lines)
    chart = line_chart([Panel(lines)], f"Change of the title's {measured.value} in nats: {words}", x_name)
    legend = [(line.label, line.style) for line in lines]
    return Figure(f"Change of the title's {measured.value} (nats)", chart, legend)


def _areas(measured: Faithfulness) -> Figure:
    rows, words = [], []
    for name, area in measured.areas.items():
        low, high = area.get("low"), area.get("high")
        value = area.get("area", area.get("value", 0.0))
        colour = 4 if low is None or high is None or low <= 0 <= high else 0 if low > 0 else 1
        first, _, second = name.partition("_vs_")
        rows += [IntervalRow(f"{first}, against"), IntervalRow(second or name, value, low, high, colour)]
        words.append(f"{name.replace('_', ' ')} {number(value, '+.3f')} {interval(low, high, '+.3f')}")
    users = f" over {measured.users} users" if measured.users else ""
    chart = interval_chart(rows, f"Areas between deletion curves: {'; '.join(words)}", zero=True)
    note = "Above 0: taking items away in the first order pulls the title down faster than in the second."
    return Figure(f"Areas between the curves{users}", chart, note=note)
