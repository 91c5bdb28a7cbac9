"""The names of a log's columns, and what cleaning does about rows that leave a choice."""

import difflib
from dataclasses import dataclass
from typing import Literal

from dmpo_dist.config.data import Source
from dmpo_dist.errors import UserError

Repeats = Literal["first", "last", "keep"]
LOG_COLUMNS = ["user", "item", "rating", "timestamp", "title", "genres"]
OUR_COLUMNS = ("file", "row")
"""Names under which cleaning keeps where a row stands; no text of an item may have them."""
NEARLY_EQUAL = 0.8
"""Similarity (of difflib) from which a name of a column is taken for a misspelt one."""


@dataclass(frozen=True)
class Rules:
    """What cleaning does about rows that leave a choice.

    Attributes:
        duplicate_titles, distinguish_by, untitled, tolerated: see ``Source``; ``tolerated`` is its ``tolerated_rows``.
        repeats: see ``DataConfig``.
        fields: names of further texts of the items.
    """

    duplicate_titles: Literal["error", "merge"] = "error"
    distinguish_by: str | None = None
    untitled: float = 0.0
    tolerated: float = 0.0
    repeats: Repeats = "first"
    fields: tuple[str, ...] = ()

    @classmethod
    def of(cls, source: Source, repeats: Repeats) -> "Rules":
        """The rules that a configuration asks for.

        Raises:
            UserError: a further text has a name that is probably a misspelt column, or titles are to be distinguished
                by a field that the items do not have.
        """
        fields = tuple(sorted({*source.columns, *source.items_columns} - {*LOG_COLUMNS}))
        for name in fields:
            if name in OUR_COLUMNS:
                raise UserError(f"data.source.columns.{name}: dmpo has a column of that name; call the text otherwise")
            if meant := difflib.get_close_matches(name, LOG_COLUMNS, n=1, cutoff=NEARLY_EQUAL):
                raise UserError(
                    f"data.source.columns.{name}: {meant[0]!r} is probably meant; the names of columns are "
                    f"{', '.join(LOG_COLUMNS)}, and a further text of the items needs a name less like those"
                )
        if source.distinguish_by not in (None, "item", "genres", *fields):
            raise UserError(
                f"data.source.distinguish_by={source.distinguish_by}: items have item, "
                f"{', '.join(('genres', *fields))}; name another column in data.source.columns or items_columns, as in "
                f"{{{source.distinguish_by}: its column}}"
            )
        return cls(
            source.duplicate_titles, source.distinguish_by, source.untitled, source.tolerated_rows, repeats, fields
        )
