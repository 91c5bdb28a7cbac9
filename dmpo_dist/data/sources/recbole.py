"""Logs in RecBole's atomic files: ``NAME.inter`` and ``NAME.item``, tabs between fields, a header of ``field:type``."""

from pathlib import Path

import pandas as pd

from dmpo_dist.data.cleaning import assemble, implicit_note
from dmpo_dist.data.rules import LOG_COLUMNS, Rules
from dmpo_dist.data.schema import Interactions
from dmpo_dist.data.sources.movielens import MOVIELENS_TERMS
from dmpo_dist.data.tables import EVENT_COLUMNS, pick, read_delimited
from dmpo_dist.errors import UserError

TYPES = ("token", "token_seq", "float", "float_seq")
EVENT_FIELDS = {"user": "user_id", "item": "item_id", "rating": "rating", "timestamp": "timestamp"}
TITLE_FIELDS = ("movie_title", "title", "item_title", "item_name", "name")
GENRE_FIELDS = ("class", "genre", "genres", "categories", "category")
YEAR_FIELD = "release_year"
ADVICE = "set data.source.columns.{column} to the right one"


def read_recbole(folder: Path, columns: dict[str, str], rules: Rules) -> Interactions:
    """A folder of atomic files; users' features (``NAME.user``) are not used. Without ratings all events are likes.

    Args:
        columns: our column -> the file's field, where it has another name than in RecBole's own datasets; other names
            are further texts of the items.

    Raises:
        UserError: a missing or malformed file; the message names the file, the line and the field.
    """
    events_file = _atomic_file(folder)
    items_file = events_file.with_suffix(".item")
    if not items_file.is_file():
        raise UserError(f"{items_file}: no such file; titles are read from it, so put it beside {events_file.name}")
    events, types = _read_atomic(events_file)
    fields = {ours: columns.get(ours, EVENT_FIELDS[ours]) for ours in EVENT_COLUMNS}
    if "rating" not in columns and fields["rating"] not in types:
        del fields["rating"]
    events = pick(events, fields, events_file, ADVICE)
    items = _items(items_file, columns)
    notes = [MOVIELENS_TERMS] if events_file.stem.startswith("ml-") else []
    notes += implicit_note(fields, list(types))
    return assemble(events, items, events_file, items_file, events_file.stem, notes, rules)


def _atomic_file(folder: Path) -> Path:
    """The one ``.inter`` file of ``folder``; of several the one with the folder's name."""
    if not folder.is_dir():
        raise UserError(
            f"{folder}: data.source.kind=recbole wants the folder with NAME.inter and NAME.item, not a file"
        )
    found = sorted(folder.glob("*.inter"))
    named = folder / f"{folder.resolve().name}.inter"
    if len(found) != 1 and named not in found:
        there = ", ".join(file.name for file in found) or "none"
        raise UserError(f"{folder}: one file NAME.inter is needed, found {there}; put each dataset into its own folder")
    return named if named in found else found[0]


def _items(file: Path, columns: dict[str, str]) -> pd.DataFrame:
    """Columns item, title ("Toy Story (1995)" where the file has years) and genres ("Drama|War")."""
    table, types = _read_atomic(file)
    fields = {
        "item": columns.get("item", EVENT_FIELDS["item"]),
        "title": columns.get("title") or _first_of(TITLE_FIELDS, types),
    }
    genres = columns.get("genres") or next((field for field in GENRE_FIELDS if field in types), None)
    if genres:
        fields["genres"] = genres
    fields |= {ours: theirs for ours, theirs in columns.items() if ours not in LOG_COLUMNS}
    items = pick(table, fields, file, ADVICE)
    if YEAR_FIELD in types and fields["title"] != YEAR_FIELD:
        # some years are no years: ML-100K's "V", for a film released on video, whose title ends in its year already
        year = table[YEAR_FIELD].str.strip()
        dated = year.str.fullmatch(r"\d{4}") & (items["title"].str.strip() != "")
        items["title"] = items["title"].str.strip().mask(dated, items["title"].str.strip() + " (" + year + ")")
    for ours, theirs in fields.items():
        if ours not in ("item", "title") and types.get(theirs) == "token_seq":
            items[ours] = items[ours].str.split().str.join("|")
    return items


def _first_of(names: tuple[str, ...], types: dict[str, str]) -> str:
    """The first of ``names`` that the file has, or, for the message that it is missing, the first."""
    return next((name for name in names if name in types), names[0])


def _read_atomic(file: Path) -> tuple[pd.DataFrame, dict[str, str]]:
    """All fields as strings, indexed by line number, and each field's type."""
    types = _read_header(file)
    _check_widths(file, len(types))
    table = read_delimited(file, sep="\t", names=list(types)).iloc[1:]
    if table.empty:
        raise UserError(f"{file}: a header but no rows; is this the right file?")
    return table, types


def _read_header(file: Path) -> dict[str, str]:
    """Field -> type, of the first line."""
    with file.open(encoding="utf-8-sig", errors="replace") as lines:
        first = lines.readline().rstrip("\r\n")
    types: dict[str, str] = {}
    for field in first.split("\t"):
        name, colon, kind = field.rpartition(":")
        if not colon or not name:
            raise UserError(
                f"{file}, line 1: {field!r} is no header field; the first line names each field and its type, as "
                "user_id:token<tab>item_id:token<tab>rating:float<tab>timestamp:float"
            )
        if kind not in TYPES:
            raise UserError(
                f"{file}, line 1: field {name!r} has the unknown type {kind!r}; types are {', '.join(TYPES)}"
            )
        if name in types:
            raise UserError(f"{file}, line 1: field {name!r} occurs twice; rename one")
        types[name] = kind
    return types


def _check_widths(file: Path, fields: int) -> None:
    """Whether every line has as many fields as the header; pandas would fill up short ones in silence."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            found = line.count(b"\t") + 1
            if found != fields and line.strip():
                raise UserError(
                    f"{file}, line {number}: {found} fields, the header names {fields}; separate fields by one tab "
                    "each and leave empty ones in"
                )
