"""Blocks, of which the sections of a page consist."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dmpo_dist.tables import Table

Kind = Literal[
    "heading", "text", "note", "warning", "lines", "code", "figures", "table", "explained", "folded", "beside"
]


@dataclass(frozen=True)
class Block:
    """One element of the page; blocks follow each other from top to bottom.

    Attributes:
        kind: how the template shows it.
        content: a text (heading, text, note, warning, code), several (lines), Drawings (figures), a Table (table), an
            ExplainedPart (explained), further blocks (folded), or two lists of blocks that stand side by side on wide
            screens (beside).
        summary: the line that readers click to open folded blocks.
    """

    kind: Kind
    content: Any
    summary: str = ""


def heading(name: str, names: Mapping[str, Any]) -> list[Block]:
    """A heading with ``name``, but none where ``names`` holds a single one."""
    return [Block("heading", name)] if len(names) > 1 else []


def folded_table(summary: str, table: Table) -> Block:
    """A table that is hidden until readers open its summary."""
    return Block("folded", [Block("table", table)], summary)
