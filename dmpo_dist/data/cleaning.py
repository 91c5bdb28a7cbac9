"""From rows of text to a checked and cleaned log, by one set of rules for small and large logs.

Readers give a view ``read`` with the columns file, row, user, item, rating, timestamp and, where no other file has the
titles, title and genres; all of them text or null but the row's number. Cleaning makes the table ``log`` of it.
"""

from pathlib import Path

import pandas as pd

from dmpo_dist.data.database import Database, literal
from dmpo_dist.data.schema import Interactions
from dmpo_dist.data.titles import without_entities
from dmpo_dist.errors import UserError

LOG_COLUMNS = ["user", "item", "rating", "timestamp", "title", "genres"]
MILLISECONDS = 1e11  # as seconds this is the year 5138
SPACE = "".join(character for character in map(chr, range(0x3001)) if character.isspace())  # what str.strip removes


def assemble(
    events: pd.DataFrame,
    items: pd.DataFrame | None,
    events_file: Path,
    items_file: Path,
    name: str,
    notes: list[str],
    duplicate_titles: str,
    tolerated: float = 0.0,
) -> Interactions:
    """Checked and cleaned tables of strings, made into ``Interactions``.

    Args:
        events, items: indexed by row number in ``events_file`` and ``items_file``; without ``items`` the events have
            titles.
        notes: what reading changed so far.
        duplicate_titles: ``error`` or ``merge``.
        tolerated: largest share of malformed events to leave out.

    Raises:
        UserError: a malformed row, with its file, number and value.
    """
    with Database() as database:
        database.show("read", events.assign(file=str(events_file), row=events.index))
        if items is not None:
            items = items.set_axis([f"{items_file}, row {row}" for row in items.index])
        notes = list(notes)
        items = clean(database, items, items_file, notes, duplicate_titles, tolerated)
        log = database.frame("SELECT user, item, rating, timestamp FROM log ORDER BY timestamp, user, item")
    return Interactions(events=log.astype({"user": "str", "item": "str"}), items=items, name=name, notes=notes)


def clean(
    database: Database,
    items: pd.DataFrame | None,
    items_file: Path,
    notes: list[str],
    duplicate_titles: str,
    tolerated: float,
) -> pd.DataFrame:
    """Make the table ``log`` (user, item, rating, timestamp) of the view ``read``; returns the items with their titles.

    Args:
        items: columns item, title and maybe genres, indexed by where each row stands; None takes them from the events.
        notes: gets a sentence for everything that was changed or left out.
        duplicate_titles, tolerated: see ``assemble``.

    Raises:
        UserError: a malformed row, with its file, number and value.
    """
    _read_rows(database)
    sound = _sound_rows(database, tolerated, notes)
    # Items are few against events, so pandas can check them. Each comes with file and row of its first sound event;
    # that is null for an item all of whose events are malformed, which counts as an item that nobody took.
    found = database.frame(
        f"""SELECT item, min(title) <> max(title) AS differs, arg_min(title, (file, row)) AS title,
        arg_min(genres, (file, row)) AS genres,
        arg_min(concat(file, ', row ', row), (file, row)) FILTER ({sound}) AS first_event
        FROM rows WHERE item <> '' GROUP BY item ORDER BY min((file, row))"""
    ).set_index("first_event")
    if items is None:
        if found["differs"].any():
            _refuse_second_title(database)
        items = found[["item", "title", "genres"]]
    items = _stripped(_decoded(items, notes))
    items = _items_of_events(found["item"][found.index.notna()], items, items_file, notes)
    items, renamed = _unique_titles(items, duplicate_titles, notes)
    _keep_first_events(database, sound, renamed, notes)
    return items.astype("str")


def _read_rows(database: Database) -> None:
    """Table ``rows``: text without space around it, numbers as numbers (null where they are not), whole seconds."""
    columns = [name for name, *_ in database.rows("DESCRIBE read")]
    database.run(f"CREATE MACRO stripped(x) AS coalesce(trim(CAST(x AS VARCHAR), {literal(SPACE)}), '')")
    # DuckDB reads 1_000 as a number, which would hide a broken field.
    database.run(
        """CREATE MACRO number(x) AS CASE WHEN NOT contains(x, '_') AND isfinite(TRY_CAST(x AS DOUBLE))
        THEN TRY_CAST(x AS DOUBLE) END"""
    )
    texts = [f"stripped({name}) AS {name}" if name in columns else f"'' AS {name}" for name in ("title", "genres")]
    database.run(
        f"""CREATE TABLE rows AS SELECT file, row, stripped(user) AS user, stripped(item) AS item,
        number(stripped(rating)) AS rating, floor(number(stripped(timestamp))) AS timestamp, {", ".join(texts)}
        FROM read"""
    )


def _sound_rows(database: Database, tolerated: float, notes: list[str]) -> str:
    """The SQL condition for the rows to keep: all but malformed ones, which are refused where they are too many."""
    late = f"abs(timestamp) > {MILLISECONDS}"
    count, stamped, late_ones, files = database.rows(
        f"SELECT count(*), count(timestamp), count_if(timestamp > {MILLISECONDS}), count(DISTINCT file) FROM rows"
    )[0]
    milliseconds = stamped > 0 and 2 * late_ones >= stamped  # of most rows, so that no single one is at fault
    faults = ["user = ''", "item = ''", "timestamp IS NULL", "rating IS NULL", *([] if milliseconds else [late])]
    malformed = " OR ".join(faults)
    found = _first(database, malformed)
    if found and found[2] > tolerated * count:
        _refuse_malformed(database, faults)
    if milliseconds:
        median = database.value("SELECT median(timestamp) FROM rows")
        file = database.value("SELECT min(file) FROM rows")
        raise UserError(
            f"{file if files == 1 else Path(file).parent}: the median timestamp is {median:.0f}, which as seconds lies "
            "after the year 5000; these look like milliseconds or finer: divide the column to seconds since 1970"
        )
    if found is None:
        return "true"
    file, row, bad = found
    notes.append(
        f"{bad} malformed rows skipped (no user or item, or no number where one must be), the first in "
        f"{'' if files == 1 else f'{file}, '}row {row}."
    )
    return f"NOT ({malformed})"


def _first(database: Database, condition: str) -> tuple[str, int, int] | None:
    """File and number of the first of ``rows`` for which the SQL ``condition`` holds, and for how many it does."""
    found = database.rows(f"SELECT file, row, count(*) OVER () FROM rows WHERE {condition} ORDER BY file, row LIMIT 1")
    return found[0] if found else None


def _refuse_malformed(database: Database, faults: list[str]) -> None:
    """Raise UserError for the first row with the first of ``faults`` that occurs."""
    fault, (file, row, count) = next((fault, found) for fault in faults if (found := _first(database, fault)))
    column = next(column for column in LOG_COLUMNS if column in fault)
    text = database.value(f"SELECT stripped({column}) FROM read WHERE file = {literal(file)} AND row = {row}")
    if column in ("user", "item"):
        raise UserError(f"{file}, row {row}: column {column!r} is empty; fill it or remove the row")
    if "NULL" not in fault:
        raise UserError(f"{file}, row {row}: timestamp {float(text):.0f} is out of range; write seconds since 1970")
    more = f" ({count} such rows)" if count > 1 else ""
    unit = ", in seconds since 1970" if column == "timestamp" else ""
    raise UserError(
        f"{file}, row {row}: {column} {text!r} is not a number{more}; write a number{unit} or remove the row"
    )


def _refuse_second_title(database: Database) -> None:
    """Raise UserError for the first row that gives an item another title than a row before."""
    file, row, item, title, first = database.rows(
        """SELECT * FROM (
            SELECT file, row, item, title, first_value(title) OVER (PARTITION BY item ORDER BY file, row) AS first
            FROM rows
        ) WHERE title <> first ORDER BY file, row LIMIT 1"""
    )[0]
    raise UserError(
        f"{file}, row {row}: item {item!r} has title {title!r} here and {first!r} before; give an item one title"
    )


def _decoded(items: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """``items`` with HTML entities in titles decoded: they say how a page was written, not what the thing is called."""
    titles = items["title"].map(without_entities)
    changed = int((titles != items["title"]).sum())
    if changed:
        notes.append(f"HTML entities decoded in {changed} titles.")
    return items.assign(title=titles)


def _stripped(items: pd.DataFrame) -> pd.DataFrame:
    """Fields without space around them, and genres even where the file has none."""
    items = items if "genres" in items else items.assign(genres="")
    return items.apply(lambda column: column.str.strip())


def _items_of_events(taken: pd.Series, items: pd.DataFrame, items_file: Path, notes: list[str]) -> pd.DataFrame:
    """The items somebody took, each with a sound title; ``taken`` and ``items`` are indexed by where they stand."""
    empty = items["item"] == ""
    if empty.any():
        raise UserError(f"{items.index[empty][0]}: column 'item' is empty; fill it or remove the row")
    twice = items["item"].duplicated()
    if twice.any():
        raise UserError(
            f"{items.index[twice][0]}: item {items['item'][twice].iloc[0]!r} occurs a second time; keep one row per "
            "item"
        )
    missing = ~taken.isin(items.loc[items["title"] != "", "item"])
    if missing.any():
        raise UserError(
            f"{taken.index[missing][0]}: item {taken[missing].iloc[0]!r} has no title in {items_file.name}; add its "
            "title or remove its rows"
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


def _unique_titles(items: pd.DataFrame, duplicate_titles: str, notes: list[str]) -> tuple[pd.DataFrame, dict[str, str]]:
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
            "differ, or set data.source.duplicate_titles=merge"
        )
    notes.append(f"{int(again.sum())} items merged into another item of the same title.")
    return items[~again].reset_index(drop=True), dict(zip(items["item"], first, strict=True))


def _keep_first_events(database: Database, sound: str, renamed: dict[str, str], notes: list[str]) -> None:
    """Table ``log``: the first event in time of each (user, item), the first in the file among those of one second."""
    database.show("renamed", pd.DataFrame({"old": list(renamed), "new": list(renamed.values())}, dtype="str"))
    rows = database.value(f"SELECT count(*) FROM rows WHERE {sound}")
    database.run(
        f"""CREATE TABLE log AS SELECT user, coalesce(new, item) AS item,
        arg_min(rating, (timestamp, file, row)) AS rating, CAST(min(timestamp) AS BIGINT) AS timestamp
        FROM rows LEFT JOIN renamed ON item = old WHERE {sound} GROUP BY ALL"""
    )
    database.run("DROP TABLE rows")
    repeated = rows - database.value("SELECT count(*) FROM log")
    if repeated:
        notes.append(f"{repeated} repeated (user, item) events dropped, the first in time kept.")
