"""Read an interaction log: MovieLens folders, CSV files with a column map, or the simulator."""

import csv
import warnings
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd

from dmpo_dist.config import Source
from dmpo_dist.data.schema import Interactions
from dmpo_dist.data.simulator import simulate
from dmpo_dist.errors import UserError

EVENT_COLUMNS = ["user", "item", "rating", "timestamp"]
CSV_COLUMNS = [*EVENT_COLUMNS, "title", "genres"]
MILLISECONDS = 1e11  # as seconds this is the year 5138
GENRES_100K = (
    "unknown Action Adventure Animation Children Comedy Crime Documentary Drama Fantasy Film-Noir Horror Musical "
    "Mystery Romance Sci-Fi Thriller War Western"
).split()
MOVIELENS_TERMS = (
    "MovieLens data by GroupLens (F. M. Harper and J. A. Konstan, 2015, doi 10.1145/2827872): non-commercial use, "
    "to be cited; see the README that came with it."
)


def load_interactions(source: Source, seed: int) -> Interactions:
    """The log behind ``source``; ``seed`` matters to the simulator alone.

    Raises:
        UserError: a missing or malformed file; the message names the file, the row and the value.
    """
    if source.kind == "simulator":
        return simulate(source.simulator, seed)
    if source.kind == "preferences":
        raise UserError("data.source.kind=preferences holds finished rows, not interactions; run `dmpo data prepare`")
    path = _existing(source.path, f"data.source.kind={source.kind} needs data.source.path")
    if source.kind == "movielens":
        return _movielens(path, source.duplicate_titles)
    return _csv_log(path, source)


def _movielens(folder: Path, duplicate_titles: str) -> Interactions:
    if not folder.is_dir():
        raise UserError(f"{folder}: data.source.kind=movielens wants the unpacked folder, not a file")
    layouts = {
        ("ratings.csv", "movies.csv"): _latest,
        ("u.data", "u.item"): _hundred_k,
        ("ratings.dat", "movies.dat"): _one_m,
    }
    for files, reader in layouts.items():
        if all((folder / name).is_file() for name in files):
            ratings_file, items_file = (folder / name for name in files)
            events, items = reader(ratings_file, items_file)
            name = f"MovieLens {folder.resolve().name.removeprefix('ml-')}"
            return _assemble(events, items, ratings_file, items_file, name, [MOVIELENS_TERMS], duplicate_titles)
    wanted = "; ".join(" and ".join(files) for files in layouts)
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing"
    raise UserError(f"{folder}: no MovieLens layout known here; looked for {wanted}; found {found}")


def _latest(ratings_file: Path, items_file: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """latest-small, latest, 20M, 25M, 32M: two CSV files with headers."""
    advice = "this is not a MovieLens file: use data.source.kind=csv with data.source.columns"
    columns = {"user": "userid", "item": "movieid", "rating": "rating", "timestamp": "timestamp"}
    item_columns = {"item": "movieid", "title": "title", "genres": "genres"}
    ratings, items = read_text_table(ratings_file), read_text_table(items_file)
    ratings.columns, items.columns = ratings.columns.str.lower(), items.columns.str.lower()
    return _pick(ratings, columns, ratings_file, advice), _pick(items, item_columns, items_file, advice)


def _hundred_k(ratings_file: Path, items_file: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """100K: tab and pipe separated, latin-1, no headers; 19 genre flags."""
    events = read_text_table(ratings_file, sep="\t", names=EVENT_COLUMNS, encoding="latin-1")
    names = ["item", "title", "date", "video_date", "url", *GENRES_100K]
    items = read_text_table(items_file, sep="|", names=names, encoding="latin-1")
    flags = (items[GENRES_100K] == "1").to_numpy()
    genres = ["|".join(g for g, on in zip(GENRES_100K, row, strict=True) if on) for row in flags]
    return events, items[["item", "title"]].assign(genres=genres)


def _one_m(ratings_file: Path, items_file: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """1M (titles in latin-1) and 10M (in UTF-8): fields separated by ``::``, no headers."""
    events = read_text_table(ratings_file, sep="::", names=EVENT_COLUMNS)
    try:
        items_file.read_bytes().decode()
        encoding = "utf-8"
    except UnicodeDecodeError:
        encoding = "latin-1"
    return events, read_text_table(items_file, sep="::", names=["item", "title", "genres"], encoding=encoding)


def _csv_log(path: Path, source: Source) -> Interactions:
    unknown = sorted(set(source.columns) - set(CSV_COLUMNS))
    if unknown:
        raise UserError(f"data.source.columns.{unknown[0]}: unknown; the keys are {', '.join(CSV_COLUMNS)}")
    names = {column: source.columns.get(column, column) for column in CSV_COLUMNS}
    frame = read_text_table(path)
    advice = "set data.source.columns.{column} to the right one"
    events = _pick(frame, {c: names[c] for c in EVENT_COLUMNS}, path, advice)
    items_path, items_frame = path, frame
    if source.items_path is None:
        advice += ", or name a second file with the titles, data.source.items_path"
    else:
        items_path = _existing(source.items_path, "data.source.items_path")
        items_frame = read_text_table(items_path)
        if names["item"] not in items_frame:
            names["item"] = "item"  # the second file may use our own name
    wanted = ["item", "title"]
    if "genres" in source.columns or "genres" in items_frame:
        wanted.append("genres")
    items = _pick(items_frame, {c: names[c] for c in wanted}, items_path, advice)
    if source.items_path is None:
        items = _one_title_per_item(items, path)
    return _assemble(events, items, path, items_path, path.stem, [], source.duplicate_titles)


def _existing(path: Path | None, what: str) -> Path:
    if path is None:
        raise UserError(f"{what}; set it to the file or folder to read")
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; correct {what.split()[-1]}")
    return path


def read_text_table(
    path: Path, *, sep: str = ",", names: list[str] | None = None, encoding: str = "utf-8-sig"
) -> pd.DataFrame:
    """All fields as strings, indexed by row number (the file's first row, header or not, is 1), without blank rows.

    ``names`` are given for files without a header, which also know no quotes.
    """
    content = _read_bytes(path, encoding)
    if path.suffix == ".tsv":
        sep = "\t"
    if sep == "::":  # two characters would need pandas' slow parser; a tab does not occur in these files
        content, sep = content.replace(b"::", b"\t"), "\t"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header
            frame = pd.read_csv(
                BytesIO(content),
                sep=sep,
                header=None if names else 0,
                names=names,
                index_col=False,
                encoding=encoding,
                dtype=str,
                na_filter=False,
                skip_blank_lines=False,
                quoting=csv.QUOTE_NONE if names else csv.QUOTE_MINIMAL,
            )
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        raise UserError(f"{path}: malformed table; quote fields that contain {sep!r}: {str(error).strip()}") from None
    frame.index += 1 if names else 2
    blank = (frame == "").all(axis=1)
    if blank.all():
        raise UserError(f"{path}: a header but no rows; is this the right file?")
    return frame[~blank]


def _read_bytes(path: Path, encoding: str) -> bytes:
    try:
        content = path.read_bytes()
        content.decode(encoding)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}); correct the path or its permissions"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not {encoding.removesuffix('-sig')} text ({error}); convert the file") from None
    if not content.strip():
        raise UserError(f"{path}: the file is empty; is this the right file?")
    return content


def _pick(frame: pd.DataFrame, columns: dict[str, str], path: Path, advice: str) -> pd.DataFrame:
    """The columns under our names; ``advice`` says how to mend a missing one, with our name for {column}."""
    for ours, theirs in columns.items():
        if theirs not in frame.columns:
            exist = ", ".join(map(repr, frame.columns))
            todo = advice.format(column=ours)
            if ours == "rating":
                todo += "; a log without ratings wants a column of ones and data.rating_threshold=1"
            if len(frame.columns) == 1:
                todo = "fields must be separated by commas (by tabs in a .tsv file)"
            raise UserError(f"{path}: no column {theirs!r}; the file has {exist}; {todo}")
    return frame[list(columns.values())].set_axis(list(columns), axis=1)


def _assemble(
    events: pd.DataFrame,
    items: pd.DataFrame,
    events_file: Path,
    items_file: Path,
    name: str,
    notes: list[str],
    duplicate_titles: str,
) -> Interactions:
    """Checked and cleaned tables of strings, made into ``Interactions``."""
    events = _stripped(events)
    items = _stripped(items if "genres" in items else items.assign(genres=""))
    notes = list(notes)
    _check_filled(events, ["user", "item"], events_file)
    timestamps = _numbers(events["timestamp"], events_file)
    ratings = _numbers(events["rating"], events_file)
    _check_seconds(timestamps, events_file)
    items = _items_of_events(events, items, events_file, items_file, notes)
    items, renamed = _unique_titles(items, items_file, duplicate_titles, notes)
    clean = pd.DataFrame(
        {
            "user": events["user"],
            "item": events["item"].map(renamed) if renamed else events["item"],
            "rating": ratings,
            "timestamp": np.floor(timestamps).astype(np.int64),
        }
    )
    return Interactions(events=_once(clean, notes), items=items, name=name, notes=notes)


def _stripped(frame: pd.DataFrame) -> pd.DataFrame:
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


def _items_of_events(
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


def _one_title_per_item(items: pd.DataFrame, path: Path) -> pd.DataFrame:
    """One row per item, out of a row per event; the rows of an item must agree on its title."""
    items = _stripped(items)
    first = items.groupby("item")["title"].transform("first")
    differs = items["title"] != first
    if differs.any():
        row = items.index[differs][0]
        raise UserError(
            f"{path}, row {row}: item {items['item'][row]!r} has title {items['title'][row]!r} here and {first[row]!r} "
            "before; give an item one title"
        )
    return items.drop_duplicates("item")


def _unique_titles(
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
