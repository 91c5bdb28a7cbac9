"""Explanations of single rankings as tables."""

from markupsafe import Markup

from dmpo_dist.artifacts.explanations import ExplainedRequest
from dmpo_dist.explanation.words import signed
from dmpo_dist.formats import MISSING, number
from dmpo_dist.tables import Cell, Table


def history_table(request: ExplainedRequest) -> Table:
    """The contribution of each history item to the score, in the order of the prompt."""
    largest = max((abs(item.contribution) for item in request.history), default=0.0)
    rows = [
        [
            Cell(item.title, kind="title"),
            Cell(
                number(item.contribution, signed(largest)),
                key=item.contribution,
                chart=_bar(item.contribution, largest),
            ),
            Cell(MISSING if item.rank_without is None else str(item.rank_without), key=item.rank_without),
        ]
        for item in request.history
    ]
    caption = "History, oldest first: how much the title's score falls without the item (nats), and the rank then"
    return Table(caption, ["item", "effect", "rank without"], rows, sortable=len(rows) > 2)


def _bar(value: float, largest: float) -> Markup:
    """A bar to the right of the middle where ``value`` is positive, to the left where it is negative."""
    length = 39 * abs(value) / largest if largest else 0
    start = 40 - (length if value < 0 else 0)
    return Markup(
        '<svg viewBox="0 0 80 12" class="bar" aria-hidden="true">'
        f'<rect x="{start:.1f}" y="1" width="{length:.1f}" height="10" class="{"down" if value < 0 else "up"}"></rect>'
        '<path d="M 40 0 V 12"></path></svg>'
    )
