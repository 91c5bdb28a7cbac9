"""The input of `dmpo rank`: users with their histories, and the catalogue."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from dmpo_dist.data.splits import likes
from dmpo_dist.data.store import PreparedData
from dmpo_dist.data.tables import read_delimited, read_json_lines, read_table, require_once
from dmpo_dist.data.titles import as_in_data
from dmpo_dist.errors import UserError
from dmpo_dist.parsing import parsing

SEPARATOR, ESCAPED = "|", r"\|"
BETWEEN_TITLES = r"(?<!\\)\|"
NAMED = 5
"""An error names at most this many of the rows with a mistake."""


@dataclass(frozen=True)
class RankingRequest:
    """A user to rank titles for.

    Attributes:
        user: no other request has the same one.
        history: titles, oldest first; at least one.
        candidates: the titles to rank; None for the whole catalogue.
        taken: titles that the user took beside those of the history, which is cut to its newest likes; they are left
            out of the whole catalogue as the history is.
        taken_items: item ids of all that the user took, the history among it; none where they are not known.
    """

    user: str
    history: tuple[str, ...]
    candidates: tuple[str, ...] | None
    taken: tuple[str, ...] = ()
    taken_items: tuple[str, ...] = ()

    @property
    def left_out(self) -> set[str]:
        """What no user is recommended again, under ``ranking.exclude_history``."""
        return {*self.history, *self.taken}


@dataclass(frozen=True)
class Catalogue:
    """Distinct titles, (R,) int64 how often each was taken, and their item ids; None where these are not known."""

    titles: tuple[str, ...]
    counts: np.ndarray | None
    ids: tuple[str, ...] | None = None


def read_requests(path: Path) -> list[RankingRequest]:
    """Read Parquet, JSON lines or CSV with the columns user and history, and optionally candidates.

    History and candidates are lists; in CSV there is ``|`` between titles, which within a title is written with a
    backslash before it. Without the column candidates the whole catalogue is ranked.

    Raises:
        UserError: no such file or column, no rows, a repeated user, an empty history, no candidates or a repeated
            candidate; the message names file, user and row.
    """
    columns, rows = _read(path, "--requests", ("user", "history"), ("candidates",))
    users = [None if user is None else _text(user).strip() for user in columns["user"]]
    histories = _lists(columns["history"], path, "history", rows)
    candidates = _lists(columns["candidates"], path, "candidates", rows) if "candidates" in columns else None
    _refuse(path, "no user", [f"row {row}" for user, row in zip(users, rows, strict=True) if not user], "fill it in")
    labels = [f"{user!r} (row {row})" for user, row in zip(users, rows, strict=True)]
    counts = Counter(users)
    twice = [label for label, user in zip(labels, users, strict=True) if counts[user] > 1]
    _refuse(path, "a user who occurs more than once", twice, "the output has one row a user: keep one row of each")
    empty = [label for label, history in zip(labels, histories, strict=True) if not history]
    _refuse(path, "an empty history", empty, "a prompt needs at least one title: remove these rows or fill them")
    if candidates is not None:
        none = [label for label, row in zip(labels, candidates, strict=True) if not row]
        advice = "give each user candidates, or leave the column out to rank a whole catalogue"
        _refuse(path, "no usable candidates", none, advice)
        equal = [
            f"{label}: {Counter(row).most_common(1)[0][0]!r}"
            for label, row in zip(labels, candidates, strict=True)
            if len(set(row)) < len(row)
        ]
        _refuse(path, "a candidate that occurs twice", equal, "keep one of each")
    lists = candidates or [None] * len(users)
    return [RankingRequest(str(u), h, c) for u, h, c in zip(users, histories, lists, strict=True)]


def read_catalogue(path: Path) -> Catalogue:
    """Read Parquet, JSON lines or CSV with the column title and optionally item (ids) and popularity (a count).

    A folder of prepared data is a catalogue, too.

    Raises:
        UserError: no such file or column, no titles, an empty or repeated title or id, or a popularity that is none.
    """
    if path.is_dir():
        return _prepared(path)
    columns, rows = _read(path, "--catalogue", ("title",), ("popularity", "item"))
    titles = ["" if title is None else as_in_data(_text(title)) for title in columns["title"]]
    _refuse(
        path, "no title", [f"row {row}" for title, row in zip(titles, rows, strict=True) if not title], "fill it in"
    )
    counts = Counter(titles)
    twice = [f"{t!r} (row {row})" for t, row in zip(titles, rows, strict=True) if counts[t] > 1]
    _refuse(path, "a title that occurs more than once", twice, "a response must name one item: make the titles differ")
    popularity = None
    if "popularity" in columns:
        popularity = np.array([_count(value) for value in columns["popularity"]])
        bad = [f"row {rows[i]}: {columns['popularity'][i]!r}" for i in np.flatnonzero(popularity < 0)]
        _refuse(path, "a popularity that is not a count", bad, "write how often the item was taken, 0 or more")
    return Catalogue(tuple(titles), popularity, _ids(columns.get("item"), path, rows))


def read_items(path: Path) -> pd.DataFrame:
    """The columns of a catalogue's file, its titles as ``read_catalogue`` reads them."""
    table = read_table(path)
    return table.assign(title=[as_in_data(str(title)) for title in table["title"]])


def check_against(
    requests: Sequence[RankingRequest],
    catalogue: Catalogue,
    path: Path,
    exclude_history: bool,
    keep_unknown: bool = False,
) -> None:
    """Raise UserError for users whose history holds all titles and, unless these are kept, for unknown candidates."""
    known = set(catalogue.titles)
    strange = [
        f"{request.user!r}: {next(t for t in request.candidates or () if t not in known)!r}"
        for request in requests
        if not keep_unknown and not known.issuperset(request.candidates or ())
    ]
    _refuse(
        path,
        "a candidate that is not in the catalogue",
        strange,
        "correct it or add it to the catalogue; dmpo rank keeps it by --keep-unknown",
    )
    if exclude_history:
        done = [repr(r.user) for r in requests if r.candidates is None and known.issubset(r.left_out)]
        _refuse(path, "no usable candidates", done, "they took all titles: set ranking.exclude_history=false")


def _prepared(folder: Path) -> Catalogue:
    data = PreparedData.load(folder)
    if data.items is None:
        raise UserError(f"{folder}: was made from ready preferences and has no catalogue; give --catalogue a file")
    titles, ids = tuple(data.items["title"].tolist()), tuple(data.items["item"].tolist())
    if data.interactions is None:
        return Catalogue(titles, None, ids)
    # Likes, as `dmpo evaluate --catalogue` counts them: one model ranks by one popularity everywhere.
    taken = likes(data.interactions, data.card.config["rating_threshold"])["item"].value_counts()
    return Catalogue(titles, data.items["item"].map(taken).fillna(0).to_numpy(np.int64), ids)


def _ids(column: list[Any] | None, path: Path, rows: list[int]) -> tuple[str, ...] | None:
    """The item ids of a catalogue's file, which must differ."""
    if column is None:
        return None
    ids = ["" if item is None else _text(item).strip() for item in column]
    counts = Counter(ids)
    bad = [f"{i!r} (row {row})" for i, row in zip(ids, rows, strict=True) if counts[i] > 1 or not i]
    _refuse(path, "an item id that is empty or occurs more than once", bad, "give each title an id of its own")
    return tuple(ids)


def _read(
    path: Path, flag: str, needed: tuple[str, ...], optional: tuple[str, ...]
) -> tuple[dict[str, list[Any]], list[int]]:
    """Columns by name, and the row number of each value in the file."""
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file; correct the path")
    if path.suffix.lower() in (".csv", ".tsv"):
        frame = read_delimited(path)
        columns, rows = {name: frame[name].tolist() for name in frame.columns}, frame.index.tolist()
    elif path.suffix.lower() == ".jsonl":
        lines = dict(read_json_lines(path))
        names = list(dict.fromkeys(name for line in lines.values() for name in line))
        columns, rows = {name: [line.get(name) for line in lines.values()] for name in names}, list(lines)
    else:
        with parsing(f"{flag} {path}", "write Parquet, or CSV or JSON lines under a name that ends in .csv or .jsonl"):
            require_once(pq.read_schema(path).names, path)
            table = pq.read_table(path)
            columns = {name: table.column(name).to_pylist() for name in table.column_names if name in needed + optional}
        rows = list(range(1, table.num_rows + 1))
    for name in needed:
        if name not in columns:
            exist = ", ".join(map(repr, columns)) or "none of ours"
            raise UserError(f"{flag} {path}: no column {name!r} (it has {exist}); it needs {', '.join(needed)}")
    if not rows:
        raise UserError(f"{flag} {path}: holds no rows; is this the right file?")
    return columns, rows


def _lists(values: list[Any], path: Path, column: str, rows: list[int]) -> list[tuple[str, ...]]:
    """Lists of stripped, non-empty titles, as preparing data writes them; a missing list is empty."""
    out = []
    for value, row in zip(values, rows, strict=True):
        if isinstance(value, str) and path.suffix.lower() in (".csv", ".tsv"):
            value = [title.replace(ESCAPED, SEPARATOR) for title in re.split(BETWEEN_TITLES, value)]
        given = [] if value is None else value
        if not isinstance(given, list) or not all(map(_is_name, given)):
            raise UserError(f"{path}, row {row}: {column} is {value!r}; it must be a list of titles or item ids")
        names = [_text(one) for one in given]
        out.append(tuple(as_in_data(name) for name in names if name.strip()))
    return out


def _is_name(value: Any) -> bool:
    """Whether ``value`` may be a title or an id: a text, or a whole number, as ids often are."""
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return isinstance(value, str) or (whole and not isinstance(value, bool))


def _text(value: Any) -> str:
    """``value`` as text, a whole number without a point, as prepared data has ids of numbers."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _count(value: Any) -> int:
    """``value`` as a count, or -1 where it is not one."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return -1
    return int(number) if number >= 0 and number.is_integer() else -1


def _refuse(path: Path, what: str, where: list[str], advice: str) -> None:
    if where:
        more = f" and {len(where) - NAMED} more" if len(where) > NAMED else ""
        raise UserError(
            f"{path}: {len(where)} row{'s' * (len(where) > 1)} with {what}: {', '.join(where[:NAMED])}{more}; {advice}"
        )
