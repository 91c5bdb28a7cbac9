"""What sections of a page are made of."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dmpo_dist.tables import Table

Kind = Literal["heading", "text", "note", "warning", "lines", "code", "figures", "table", "explained", "folded"]


@dataclass(frozen=True)
class Block:
    """One thing on the page, from top to bottom.

    Attributes:
        content: a text (heading, text, note, warning, code), several (lines), Drawings (figures), a Table (table), an
            ExplainedPart (explained) or further blocks (folded).
        summary: of folded blocks, what is seen of them before they are opened.
    """

    kind: Kind
    content: Any
    summary: str = ""


def heading(name: str, names: Mapping[str, Any]) -> list[Block]:
    """The name of one of several things; a single one needs none."""
    return [Block("heading", name)] if len(names) > 1 else []


def folded_table(summary: str, table: Table) -> Block:
    """A table that is seen when the summary is opened."""
    return Block("folded", [Block("table", table)], summary)
