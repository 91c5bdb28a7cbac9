"""Tables of strings, as read from whatever file, checked and cleaned into ``Interactions``."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from dmpo_dist.data.schema import Interactions
from dmpo_dist.errors import UserError

LOG_COLUMNS = ["user", "item", "rating", "timestamp", "title", "genres"]
MILLISECONDS = 1e11  # as seconds this is the year 5138


def assemble(
    events: pd.DataFrame,
    items: pd.DataFrame,
    events_file: Path,
    items_file: Path,
    name: str,
    notes: list[str],
    duplicate_titles: str,
    tolerated: float = 0.0,
) -> Interactions:
    """Checked and cleaned tables of strings, made into ``Interactions``.

    Args:
        events, items: indexed by row number in ``events_file`` and ``items_file``.
        notes: what reading changed so far.
        duplicate_titles: ``error`` or ``merge``.
        tolerated: largest share of malformed events to leave out.

    Raises:
        UserError: a malformed row, with its file, number and value.
    """
    events = stripped(events)
    items = stripped(items if "genres" in items else items.assign(genres=""))
    notes = list(notes)
    events = _without_malformed(events, tolerated, notes)
    _check_filled(events, ["user", "item"], events_file)
    timestamps = _numbers(events["timestamp"], events_file)
    ratings = _numbers(events["rating"], events_file)
    _check_seconds(timestamps, events_file)
    items = items_of_events(events, items, events_file, items_file, notes)
    items, renamed = unique_titles(items, items_file, duplicate_titles, notes)
    clean = pd.DataFrame(
        {
            "user": events["user"],
            "item": events["item"].map(renamed) if renamed else events["item"],
            "rating": ratings,
            "timestamp": np.floor(timestamps).astype(np.int64),
        }
    )
    return Interactions(events=_once(clean, notes), items=items, name=name, notes=notes)


def _without_malformed(events: pd.DataFrame, tolerated: float, notes: list[str]) -> pd.DataFrame:
    """Events less the malformed ones, where those are few enough; else all of them, for the checks to name one."""
    numbers = events[["rating", "timestamp"]].apply(pd.to_numeric, errors="coerce").astype(np.float64)
    bad = (events[["user", "item"]] == "").any(axis=1) | ~np.isfinite(numbers).all(axis=1)
    bad |= (numbers["timestamp"].abs() > MILLISECONDS) & (numbers["timestamp"].median() <= MILLISECONDS)
    if not bad.any() or bad.mean() > tolerated:
        return events
    notes.append(
        f"{int(bad.sum())} malformed rows skipped (no user or item, or no number where one must be), the first in row "
        f"{events.index[bad][0]}."
    )
    return events[~bad]


def stripped(frame: pd.DataFrame) -> pd.DataFrame:
    """Fields without space around them."""
    return frame.apply(lambda column: column.str.strip())


def _check_filled(frame: pd.DataFrame, columns: Iterable[str], path: Path) -> None:
    for column in columns:
        empty = frame[column] == ""
        if empty.any():
            raise UserError(
                f"{path}, row {frame.index[empty][0]}: column {column!r} is empty; fill it or remove the row"
            )


def _numbers(column: pd.Series, path: Path) -> pd.Series:
    values = pd.to_numeric(column, errors="coerce").astype(np.float64)
    bad = ~np.isfinite(values)
    if bad.any():
        row = column.index[bad][0]
        unit = ", in seconds since 1970" if column.name == "timestamp" else ""
        more = f" ({int(bad.sum())} such rows)" if bad.sum() > 1 else ""
        raise UserError(
            f"{path}, row {row}: {column.name} {column[row]!r} is not a number{more}; write a number{unit} or remove the row"
        )
    return values


def _check_seconds(timestamps: pd.Series, path: Path) -> None:
    median = float(timestamps.median())
    if median > MILLISECONDS:
        raise UserError(
            f"{path}: the median timestamp is {median:.0f}, which as seconds lies after the year 5000; these look like "
            "milliseconds or finer: divide the column to seconds since 1970"
        )
    late = timestamps.abs() > MILLISECONDS
    if late.any():
        row = timestamps.index[late][0]
        raise UserError(f"{path}, row {row}: timestamp {timestamps[row]:.0f} is out of range; write seconds since 1970")


def items_of_events(
    events: pd.DataFrame, items: pd.DataFrame, events_file: Path, items_file: Path, notes: list[str]
) -> pd.DataFrame:
    """The items somebody took, each with a sound title."""
    _check_filled(items, ["item"], items_file)
    twice = items["item"].duplicated()
    if twice.any():
        row = items.index[twice][0]
        raise UserError(
            f"{items_file}, row {row}: item {items['item'][row]!r} occurs a second time; keep one row per item"
        )
    missing = ~events["item"].isin(items.loc[items["title"] != "", "item"])
    if missing.any():
        row = events.index[missing][0]
        raise UserError(
            f"{events_file}, row {row}: item {events['item'][row]!r} has no title in {items_file.name}; add its title or "
            "remove its rows"
        )
    used = items["item"].isin(events["item"])
    if not used.all():
        notes.append(f"{int((~used).sum())} items without interactions left out.")
    items = items[used]
    broken = items["title"].str.contains(r"[\r\n]")
    if broken.any():
        row = items.index[broken][0]
        raise UserError(
            f"{items_file}: the title of item {items['item'][row]!r}, {items['title'][row]!r}, contains a line break; "
            "titles are single lines"
        )
    return items


def one_title_per_item(items: pd.DataFrame, path: Path) -> pd.DataFrame:
    """One row per item, out of a row per event; the rows of an item must agree on its title."""
    items = stripped(items)
    first = items.groupby("item")["title"].transform("first")
    differs = items["title"] != first
    if differs.any():
        row = items.index[differs][0]
        raise UserError(
            f"{path}, row {row}: item {items['item'][row]!r} has title {items['title'][row]!r} here and {first[row]!r} "
            "before; give an item one title"
        )
    return items.drop_duplicates("item")


def unique_titles(
    items: pd.DataFrame, path: Path, duplicate_titles: str, notes: list[str]
) -> tuple[pd.DataFrame, dict[str, str]]:
    """Items with unique titles, and item -> item that stands for it (empty where nothing was merged)."""
    first = items.groupby("title", sort=False)["item"].transform("first")
    again = items["item"] != first
    if not again.any():
        return items.reset_index(drop=True), {}
    row = items.index[again][0]
    if duplicate_titles == "error":
        raise UserError(
            f"{path}, row {row}: items {first[row]!r} and {items['item'][row]!r} share the title {items['title'][row]!r} "
            f"({int(again.sum())} such items); a response must name one item: make the titles differ, or set "
            "data.source.duplicate_titles=merge"
        )
    notes.append(f"{int(again.sum())} items merged into another item of the same title.")
    return items[~again].reset_index(drop=True), dict(zip(items["item"], first, strict=True))


def _once(events: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """The first event in time of each (user, item), sorted by (timestamp, user, item)."""
    ordered = events.sort_values("timestamp", kind="stable")
    unique = ordered.drop_duplicates(["user", "item"])
    if len(unique) < len(events):
        notes.append(f"{len(events) - len(unique)} repeated (user, item) events dropped, the first in time kept.")
    return unique.sort_values(["timestamp", "user", "item"], ignore_index=True)
