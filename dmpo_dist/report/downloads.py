"""The tables of a page as files: CSV with every digit, LaTeX as it is printed."""

import base64
import re
import unicodedata
from dataclasses import dataclass

import pandas as pd
from markupsafe import Markup

from dmpo_dist.tables import Cell, Table, html

MOST_LETTERS = 48  # of a file's name
FORMULA = re.compile(r"[=+\-@\t\r]")
"""A text that begins so is run by spreadsheets; an apostrophe before it keeps it a text."""


@dataclass(frozen=True)
class TableFiles:
    """A table's name without an ending, and its two files."""

    name: str
    csv: str
    latex: str


def table_files(table: Table, number: int) -> TableFiles:
    """The files of the ``number``-th table of a page."""
    plain = unicodedata.normalize("NFKD", table.caption).encode("ascii", "ignore").decode().lower()
    name = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:MOST_LETTERS].strip("-")
    return TableFiles(f"{number:02d}-{name or 'table'}", as_csv(table), as_latex(table))


def with_downloads(table: Table, files: TableFiles) -> Markup:
    """The table for the page, and below it links that save its files: they are in the links, nothing is loaded."""
    links = [
        Markup('<a download="{}.{}" href="data:{};base64,{}">{}</a>').format(
            files.name, ending, kind, base64.b64encode(content.encode("utf-8", errors="replace")).decode(), label
        )
        for ending, kind, content, label in (
            ("csv", "text/csv", files.csv, "CSV"),
            ("tex", "application/x-tex", files.latex, "LaTeX"),
        )
    ]
    return Markup('{}\n<p class="files">{} {}</p>').format(html(table), *links)


def as_csv(table: Table) -> str:
    """Numbers with all their digits; the second line of cells is a column of its own."""
    rows, below = _full_rows(table), _has_below(table)
    columns: dict[str, list[object]] = {}
    for index, heading in enumerate(table.columns):
        cells = [row[index] for row in rows]
        columns[_free(heading or "name", columns)] = [_csv_value(cell, index < table.text_columns) for cell in cells]
        if below[index]:
            columns[_free(f"{heading}: note".strip(), columns)] = [_csv_text(cell.below) for cell in cells]
    return pd.DataFrame(columns).to_csv(index=False, lineterminator="\n")


def as_latex(table: Table) -> str:
    """A ``tabular`` with rules of booktabs, names escaped; what is bold on the page is bold."""
    rows, below = _full_rows(table), _has_below(table)
    texts = [
        [_plain(f"{cell.text} ({cell.below})" if cell.below and below[i] else cell.text) for i, cell in enumerate(row)]
        for row in rows
    ]
    strong = [["textbf: --rwrap;" if cell.kind in ("strong", "target") else "" for cell in row] for row in rows]
    frame = pd.DataFrame(texts, columns=range(len(table.columns)))
    styler = frame.style.format(escape="latex").hide(axis="index")
    styler = styler.format_index(lambda index: _plain(table.columns[index]), escape="latex", axis="columns")
    styler = styler.apply(lambda _: pd.DataFrame(strong, index=frame.index, columns=frame.columns), axis=None)
    letters = "l" * table.text_columns + "r" * (len(table.columns) - table.text_columns)
    return styler.to_latex(column_format=letters, hrules=True)


def _full_rows(table: Table) -> list[list[Cell]]:
    """All rows with a cell in each column."""
    return [[*row, *[Cell("")] * (len(table.columns) - len(row))] for row in table.rows]


def _has_below(table: Table) -> list[bool]:
    return [any(len(row) > i and row[i].below for row in table.rows) for i in range(len(table.columns))]


def _csv_value(cell: Cell, is_text: bool) -> object:
    return _csv_text(cell.text) if is_text or cell.key is None else cell.key


def _csv_text(text: str) -> str:
    plain = _plain(text)
    number = re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?", plain)
    return f"'{plain}" if FORMULA.match(plain) and not number else plain


def _plain(text: str) -> str:
    """In one line, with the minus sign of programs, without what no file can hold."""
    return " ".join("".join(c if c.isprintable() else " " for c in text.replace("\u2212", "-")).split())


def _free(name: str, taken: dict[str, list[object]]) -> str:
    """``name``, or ``name 2`` where it is a column's already."""
    plain = _csv_text(name)
    count = 1
    while (plain if count == 1 else f"{plain} {count}") in taken:
        count += 1
    return plain if count == 1 else f"{plain} {count}"
