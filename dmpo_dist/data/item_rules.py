"""Which items of a log count, and the one title that each of them has."""

from pathlib import Path

import pandas as pd

from dmpo_dist.data.database import Database
from dmpo_dist.errors import UserError


def stripped(items: pd.DataFrame) -> pd.DataFrame:
    """Fields without space around them, and genres even where the file has none."""
    items = items if "genres" in items else items.assign(genres="")
    return items.apply(lambda column: column.str.strip())


def titled(
    database: Database,
    taken: pd.Series,
    items: pd.DataFrame,
    items_file: Path,
    sound: str,
    limit: float,
    notes: list[str],
) -> tuple[pd.Series, str]:
    """``taken`` and the condition ``sound`` without items that have no title, whose events are counted.

    Raises:
        UserError: they are a larger share of the sound events than ``limit``.
    """
    missing = ~taken.isin(items.loc[items["title"] != "", "item"])
    if not missing.any():
        return taken, sound
    database.show("untitled", pd.DataFrame({"item": taken[missing].tolist()}, dtype="str"))
    sound_titled = f"({sound}) AND item NOT IN (SELECT item FROM untitled)"
    events = database.value(f"SELECT count(*) FROM rows WHERE {sound}")
    lost = events - database.value(f"SELECT count(*) FROM rows WHERE {sound_titled}")
    if lost > limit * events:
        raise UserError(
            f"{taken.index[missing][0]}: item {taken[missing].iloc[0]!r} has no title in {items_file.name}; "
            f"{int(missing.sum())} items without one have {lost} of {events} interactions, more than "
            f"data.source.untitled={limit:g}: add their titles, or raise that to leave them out"
        )
    notes.append(f"{int(missing.sum())} items without a title left out with their {lost} interactions.")
    return taken[~missing], sound_titled


def items_of_events(taken: pd.Series, items: pd.DataFrame, items_file: Path, notes: list[str]) -> pd.DataFrame:
    """The items somebody took, each with a title of one line; both arguments are indexed by where their rows stand."""
    empty = items["item"] == ""
    if empty.any():
        raise UserError(f"{items.index[empty][0]}: column 'item' is empty; fill it or remove the row")
    twice = items["item"].duplicated()
    if twice.any():
        raise UserError(
            f"{items.index[twice][0]}: item {items['item'][twice].iloc[0]!r} occurs a second time; keep one row per "
            "item"
        )
    used = items["item"].isin(taken)
    if not used.all():
        notes.append(f"{int((~used).sum())} items without interactions left out.")
    items = items[used]
    broken = items["title"].str.contains(r"[\r\n]")
    if broken.any():
        first = items[broken].iloc[0]
        raise UserError(
            f"{items_file}: the title of item {first['item']!r}, {first['title']!r}, contains a line break; titles are "
            "single lines"
        )
    return items


def distinguished(items: pd.DataFrame, field: str | None, notes: list[str]) -> pd.DataFrame:
    """Titles that several items share, with the item's ``field`` behind them: "Title (value)"."""
    if field is None:
        return items
    shared = items["title"].duplicated(keep=False) & (items[field] != "")
    if shared.any():
        what = "id" if field == "item" else field
        notes.append(f"{int(shared.sum())} titles that several items share got the item's {what} behind them.")
    return items.assign(title=items["title"].mask(shared, items["title"] + " (" + items[field] + ")"))


def unique_titles(items: pd.DataFrame, duplicate_titles: str, notes: list[str]) -> tuple[pd.DataFrame, dict[str, str]]:
    """Items with unique titles, and item -> item that stands for it (empty where nothing was merged)."""
    first = items.groupby("title", sort=False)["item"].transform("first")
    again = items["item"] != first
    if not again.any():
        return items.reset_index(drop=True), {}
    if duplicate_titles == "error":
        second = items[again].iloc[0]
        raise UserError(
            f"{items.index[again][0]}: items {first[again].iloc[0]!r} and {second['item']!r} share the title "
            f"{second['title']!r} ({int(again.sum())} such items); a response must name one item: make the titles "
            "differ by data.source.distinguish_by=FIELD, or set data.source.duplicate_titles=merge"
        )
    notes.append(f"{int(again.sum())} items merged into another item of the same title.")
    return items[~again].reset_index(drop=True), dict(zip(items["item"], first, strict=True))
