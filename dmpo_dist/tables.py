"""One table object, rendered for the terminal, Markdown or a web page."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape
from rich import box
from rich.table import Table as TerminalTable
from rich.text import Text

TERMINAL_STYLES = {"strong": "bold", "soft": "dim"}


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: the content.
        below: a second, smaller line: an interval or a remark.
        kind: "strong", "soft" (unclear or unimportant), "code" (a name), "title" (text of the data), "target" (the
            same, of the item that a user took), "warn", "leak".
        key: the value by which a page sorts the column; None sorts by ``text``.
        chart: a small picture, which only a page shows.
    """

    text: str
    below: str = ""
    kind: str = ""
    key: float | None = None
    chart: Markup | None = None


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row names the row.

    Attributes:
        caption: what it shows.
        columns: headings.
        rows: cells; a row shorter than ``columns`` is the heading of the rows below it.
        text_columns: number of columns, from the left, that hold text; the others hold numbers, aligned to the right.
        sortable: whether a page lets readers sort it.
        note: a remark below it.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    text_columns: int = 1
    sortable: bool = False
    note: str = ""


def terminal(table: Table) -> TerminalTable:
    """The table for a rich console; on a narrow console the first column is wrapped."""
    drawn = TerminalTable(
        title=table.caption or None, title_justify="left", caption=table.note or None, caption_justify="left",
        box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True,
    )  # fmt: skip
    for index, heading in enumerate(table.columns):
        text = index < table.text_columns
        drawn.add_column(heading, justify="left" if text else "right", no_wrap=index > 0, overflow="fold")
    for row in table.rows:
        drawn.add_row(*map(_terminal_cell, row))
    return drawn


def markdown(table: Table) -> str:
    """The table as GitHub's Markdown, without its caption and note."""
    count = len(table.columns)
    rule = "|" + "---|" * table.text_columns + "---:|" * (count - table.text_columns)
    rows = [[*map(_markdown_cell, row), *[""] * (count - len(row))] for row in table.rows]
    return "\n".join([_markdown_row([*map(_in_a_row, table.columns)]), rule, *map(_markdown_row, rows)])


def html(table: Table) -> Markup:
    """The table for a web page; its classes are those of the report's style sheet."""
    numbers = ["" if index < table.text_columns else "n" for index in range(len(table.columns))]
    heads = [
        Markup('<th scope="col" class="{}"><bdi>{}</bdi></th>').format(kind, heading)
        for heading, kind in zip(table.columns, numbers, strict=True)
    ]
    rows = [_html_row(row, numbers) for row in table.rows]
    return Markup(
        '<div class="scroll" role="group" aria-label="{caption}" tabindex="0">\n<table class="{kind}">\n'
        "<caption><span><bdi>{caption}</bdi></span></caption>\n<thead><tr>{heads}</tr></thead>\n"
        "<tbody>\n{rows}\n</tbody>\n</table>\n</div>"
    ).format(
        caption=table.caption,
        kind="sortable" if table.sortable else "",
        heads=Markup().join(heads),
        rows=Markup("\n").join(rows),
    )


def texts(rows: Sequence[Sequence[object]]) -> list[list[Cell]]:
    """Rows of plain values as cells without any style."""
    return [[Cell(str(value)) for value in row] for row in rows]


def _terminal_cell(cell: Cell) -> Text:
    below = [("\n" + cell.below, "dim")] if cell.below else []
    return Text.assemble((cell.text, TERMINAL_STYLES.get(cell.kind, "")), *below)


def _markdown_cell(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.kind == "strong" else cell.text
    return _in_a_row(f"{text} ({cell.below})" if cell.below else text)


def _in_a_row(text: str) -> str:
    """``text`` without what would end a Markdown cell, in names and settings that anybody may have written."""
    return " ".join(text.splitlines()).replace("|", "\\|")


def _html_row(row: Sequence[Cell], numbers: Sequence[str]) -> Markup:
    cells = [Markup('<th scope="row" class="{}">{}</th>').format(row[0].kind, _html_cell(row[0]))]
    for cell, kind in zip(row[1:], numbers[1:], strict=False):
        key = "" if cell.key is None else Markup(' data-key="{}"').format(cell.key)
        classes = f"{kind or 't'} {cell.kind}".strip()
        cells.append(Markup('<td class="{}"{}>{}</td>').format(classes, key, _html_cell(cell)))
    return Markup("<tr>{}</tr>").format(Markup().join(cells))


def _html_cell(cell: Cell) -> Markup:
    """The content of a cell; <bdi> isolates text that runs right to left, such as an Arabic title."""
    if cell.kind == "code":  # a long name or path may break after its separators
        breakable = Markup(re.sub(r"([._/]+)", r"\1<wbr>", str(escape(cell.text))))
        text = Markup("<code><bdi>{}</bdi></code>").format(breakable)
    elif cell.kind in ("warn", "leak"):
        text = Markup("<strong>{}</strong>").format(cell.text)
    else:
        text = Markup("<bdi>{}</bdi>").format(cell.text) if cell.kind in ("title", "target") else escape(cell.text)
    below = Markup(" <small><bdi>{}</bdi></small>").format(cell.below) if cell.below else ""
    return Markup("{} {}{}").format(text, cell.chart, below) if cell.chart else text + below


def _markdown_row(values: Sequence[str]) -> str:
    return "| " + " | ".join(values) + " |"
