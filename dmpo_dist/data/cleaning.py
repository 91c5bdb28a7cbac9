"""From rows of text to a checked and cleaned log, by one set of rules for small and large logs.

Readers give a view ``read`` with the columns file, row, user, item, timestamp, rating where the log has ratings and,
where no other file has the items, title, genres and further fields; all of them text or null but the row's number.
Cleaning makes the table ``log`` of it.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import pandas as pd

from dmpo_dist.data.database import Database, literal, quoted
from dmpo_dist.data.item_rules import distinguished, items_of_events, stripped, titled, unique_titles
from dmpo_dist.data.rules import LOG_COLUMNS, Repeats, Rules
from dmpo_dist.data.schema import Interactions
from dmpo_dist.data.titles import without_entities
from dmpo_dist.errors import UserError

TEXTS = " texts"
"""Ends the name of a column that counts the different texts of an item."""
LIKE = 5.0
"""The rating of an interaction in a log without ratings: a like."""
COMPACT_DATE = (
    "timestamp BETWEEN 19000101 AND 21001231 AND TRY_CAST(timestamp AS BIGINT) // 100 % 100 BETWEEN 1 AND 12 "
    "AND timestamp % 100 BETWEEN 1 AND 31"
)
"""A number that reads as year, month and day."""
MILLISECONDS = 1e11  # as seconds this is the year 5138
SPACE = "".join(character for character in map(chr, range(0x3001)) if character.isspace())  # what str.strip removes


def implicit_note(columns: Mapping[str, str], there: Collection[str]) -> list[str]:
    """What to say of a log without ratings; nothing where ``columns`` (our name -> the log's) has them.

    Args:
        there: all columns of the log, one of which may hold ratings under a name of its own.
    """
    if "rating" in columns:
        return []
    others = [repr(name) for name in there if name not in columns.values()]
    advice = f" If one of {', '.join(others)} holds ratings, set data.source.columns.rating." if others else ""
    return [f"No column 'rating': every interaction is a like (rating {LIKE:g}).{advice}"]


def assemble(
    events: pd.DataFrame,
    items: pd.DataFrame | None,
    events_file: Path,
    items_file: Path,
    name: str,
    notes: list[str],
    rules: Rules,
) -> Interactions:
    """Checked and cleaned tables of strings, made into ``Interactions``.

    Args:
        events, items: indexed by row number in ``events_file`` and ``items_file``; without ``items`` the events have
            titles.
        notes: what reading changed so far.

    Raises:
        UserError: a malformed row, with its file, number and value.
    """
    with Database() as database:
        database.show("read", events.assign(file=str(events_file), row=events.index))
        if items is not None:
            items = items.set_axis([f"{items_file}, row {row}" for row in items.index])
        notes = list(notes)
        items = clean(database, items, items_file, notes, rules)
        log = database.frame("SELECT user, item, rating, timestamp FROM log ORDER BY timestamp, user, item")
    return Interactions(events=log.astype({"user": "str", "item": "str"}), items=items, name=name, notes=notes)


def clean(
    database: Database,
    items: pd.DataFrame | None,
    items_file: Path,
    notes: list[str],
    rules: Rules,
) -> pd.DataFrame:
    """Make the table ``log`` (user, item, rating, timestamp) of the view ``read``; returns the items with their titles.

    Args:
        items: columns item, title and maybe genres, indexed by where each row stands; None takes them from the events.
        notes: gets a sentence for everything that was changed or left out.

    Raises:
        UserError: a malformed row, with its file, number and value.
    """
    _read_rows(database, rules.fields)
    sound = _sound_rows(database, rules.tolerated, notes)
    # Items are few against events, so pandas can check them. Each comes with file and row of its first sound event;
    # that is null for an item all of whose events are malformed, which counts as an item that nobody took.
    texts = ["genres", *rules.fields]
    firsts = ", ".join(
        f"coalesce(arg_min({quoted(name)}, (file, row)) FILTER ({quoted(name)} <> ''), '') AS {quoted(name)}, "
        f"count(DISTINCT {quoted(name)}) FILTER ({quoted(name)} <> '') AS {quoted(name + TEXTS)}"
        for name in texts
    )
    found = database.frame(
        f"""SELECT item, min(title) FILTER (title <> '') <> max(title) AS differs,
        coalesce(arg_min(title, (file, row)) FILTER (title <> ''), '') AS title, {firsts},
        arg_min(concat(file, ', row ', row), (file, row)) FILTER ({sound}) AS first_event
        FROM rows WHERE item <> '' GROUP BY item ORDER BY min((file, row))"""
    ).set_index("first_event")
    if items is None:
        if found["differs"].any():
            _refuse_second_title(database)
        for name in texts:
            if several := int((found[name + TEXTS] > 1).sum()):
                notes.append(f"{several} items have several texts in {name}, the first kept.")
        items = found[["item", "title", *texts]]
    taken = found["item"][found.index.notna()]
    items = stripped(_decoded(items, notes))
    taken, sound = titled(database, taken, items, items_file, sound, rules.untitled, notes)
    items = items_of_events(taken, items, items_file, notes)
    items = distinguished(items, rules.distinguish_by, notes)
    items, renamed = unique_titles(items, rules.duplicate_titles, notes)
    _keep_events(database, sound, renamed, rules.repeats, notes)
    return items.astype("str")


def _read_rows(database: Database, fields: tuple[str, ...]) -> None:
    """Table ``rows``: text without space around it, numbers as numbers (null where they are not), whole seconds.

    A moment may also be a date of ISO 8601, in UTC where it names no time zone. Without ratings all rows are likes.
    """
    columns = [name for name, *_ in database.rows("DESCRIBE read")]
    database.run("SET TimeZone = 'UTC'")
    database.run(f"CREATE MACRO stripped(x) AS coalesce(trim(CAST(x AS VARCHAR), {literal(SPACE)}), '')")
    # DuckDB reads 1_000 as a number, which would hide a broken field.
    database.run(
        """CREATE MACRO number(x) AS CASE WHEN NOT contains(x, '_') AND isfinite(TRY_CAST(x AS DOUBLE))
        THEN TRY_CAST(x AS DOUBLE) END"""
    )
    database.run(
        """CREATE MACRO seconds(x) AS
        floor(coalesce(number(x), CASE WHEN x ~ '\\d{4}[-/].*' THEN epoch(TRY_CAST(x AS TIMESTAMPTZ)) END))"""
    )
    names = ("title", "genres", *fields)
    texts = [f"{f'stripped({quoted(n)})' if n in columns else repr('')} AS {quoted(n)}" for n in names]
    rating = "number(stripped(rating))" if "rating" in columns else f"{LIKE}::DOUBLE"
    database.run(
        f"""CREATE TABLE rows AS SELECT file, row, stripped(user) AS user, stripped(item) AS item,
        {rating} AS rating, seconds(stripped(timestamp)) AS timestamp, {", ".join(texts)} FROM read"""
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
    dates, file = database.rows(f"SELECT count_if({COMPACT_DATE}), min(file) FILTER ({COMPACT_DATE}) FROM rows")[0]
    if stamped and dates == stamped:
        raise UserError(
            f"{file}: the timestamps look like dates without hyphens, as in 20240531, and would be read as seconds of "
            "the year 1970; write them as 2024-05-31"
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
    what, wanted = "a number", "a number"
    if column == "timestamp":
        what, wanted = "a moment", "seconds since 1970, or a date as in 2024-05-31 or 2024-05-31T18:00:00+02:00,"
    raise UserError(f"{file}, row {row}: {column} {text!r} is not {what}{more}; write {wanted} or remove the row")


def _refuse_second_title(database: Database) -> None:
    """Raise UserError for the first row that gives an item another title than a row before."""
    file, row, item, title, first = database.rows(
        """SELECT * FROM (
            SELECT file, row, item, title, first_value(title) OVER (PARTITION BY item ORDER BY file, row) AS first
            FROM rows WHERE title <> ''
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


def _keep_events(database: Database, sound: str, renamed: dict[str, str], repeats: Repeats, notes: list[str]) -> None:
    """Table ``log``: the first or last event in time of each (user, item), or with ``keep`` one of each second.

    Among those of one second the first in the file counts, or with ``last`` the last.
    """
    database.show("renamed", pd.DataFrame({"old": list(renamed), "new": list(renamed.values())}, dtype="str"))
    rows = database.value(f"SELECT count(*) FROM rows WHERE {sound}")
    end = "max" if repeats == "last" else "min"
    moment = "timestamp" if repeats == "keep" else f"{end}(timestamp)"
    database.run(
        f"""CREATE TABLE log AS SELECT user, coalesce(new, item) AS item,
        arg_{end}(rating, (timestamp, file, row)) AS rating, CAST({moment} AS BIGINT) AS timestamp
        FROM rows LEFT JOIN renamed ON item = old WHERE {sound} GROUP BY ALL"""
    )
    database.run("DROP TABLE rows")
    repeated = rows - database.value("SELECT count(*) FROM log")
    if repeated:
        kept = "one of each second" if repeats == "keep" else f"the {repeats} in time"
        notes.append(f"{repeated} repeated (user, item) events dropped, {kept} kept.")
