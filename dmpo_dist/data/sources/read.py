"""Where an interaction log comes from: one reader per kind of source."""

from collections.abc import Collection
from pathlib import Path

import pandas as pd

from dmpo_dist.config.data import Source
from dmpo_dist.data.cleaning import assemble, implicit_note
from dmpo_dist.data.rules import LOG_COLUMNS, Repeats, Rules
from dmpo_dist.data.schema import Interactions
from dmpo_dist.data.sources.amazon import read_amazon
from dmpo_dist.data.sources.movielens import read_movielens
from dmpo_dist.data.sources.recbole import read_recbole
from dmpo_dist.data.sources.simulator import simulate
from dmpo_dist.data.tables import as_strings, fields_over_lines, pick, read_table, suffix_kind
from dmpo_dist.data.titles import with_articles_first
from dmpo_dist.errors import UserError

READY_ROWS = ("preferences", "sdpo", "dmpo_released")
ADVICE = "set data.source.columns.{column} to the right one"
TITLES_ADVICE = ADVICE + ", or name a second file with the titles, data.source.items_path"
ITEMS_ADVICE = "set data.source.items_columns.{column} to the right one"


def load_interactions(source: Source, seed: int, repeats: Repeats = "first") -> Interactions:
    """The log behind ``source``, whose kind must be known; ``seed`` matters to the simulator alone.

    Raises:
        UserError: a missing or malformed file; the message names the file, the row and the value.
    """
    if source.kind == "simulator":
        return simulate(source.simulator, seed)
    if source.kind in READY_ROWS:
        raise UserError(
            f"data.source.kind={source.kind} holds finished rows, not interactions; run `dmpo data prepare`"
        )
    rules = Rules.of(source, repeats)
    if source.kind == "huggingface":
        return _own_log(*_hub_table(source), source, rules)
    path = existing(source.path, f"data.source.kind={source.kind} needs data.source.path")
    if source.kind == "movielens":
        return _as_people_write(read_movielens(path, rules), source)
    if source.kind == "amazon":
        return read_amazon(path, source.category, source.columns | source.items_columns, rules)
    if source.kind == "recbole":
        return _as_people_write(read_recbole(path, source.columns | source.items_columns, rules), source)
    return _own_log(read_table(path, source.kind, source.separator), path, source, rules)


def _as_people_write(log: Interactions, source: Source) -> Interactions:
    return with_articles_first(log) if source.articles == "first" else log


def existing(path: Path | None, what: str) -> Path:
    """``path``, which must be there; ``what`` ends in the name of its key."""
    if path is None:
        raise UserError(f"{what}; set it to the file or folder to read")
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; correct {what.split()[-1]}")
    return path


def _hub_table(source: Source) -> tuple[pd.DataFrame, Path]:
    """A split of a Hugging Face dataset: a hub id, a folder of data files or what ``save_to_disk`` wrote."""
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    if source.path is None:
        raise UserError("data.source.kind=huggingface needs data.source.path; set it to a hub id or a folder")
    name = str(source.path)
    try:
        saved = any((source.path / file).is_file() for file in ("state.json", "dataset_dict.json"))
        dataset = load_from_disk(name) if saved else load_dataset(name, source.subset)
    except Exception as error:  # what a loading script, a hub or an arrow file trips over
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name}: `datasets` cannot load it ({reason}); correct data.source.path or data.source.subset"
        ) from None
    splits = dataset if isinstance(dataset, DatasetDict) else {"train": dataset}
    if source.split not in splits:
        raise UserError(f"{name}: no split {source.split!r}, it has {', '.join(splits)}; set data.source.split")
    table = splits[source.split]
    assert isinstance(table, Dataset)
    return as_strings(table.with_format("arrow")[:].to_pandas(integer_object_nulls=True)), source.path


def column_names(source: Source) -> dict[str, str]:
    """Our column -> the log's, with the names of further texts of the items."""
    return {column: column for column in LOG_COLUMNS} | source.columns


def log_columns(there: Collection[str], names: dict[str, str], source: Source) -> dict[str, str]:
    """Our column -> the log's, of those to read from a log that has the columns ``there``.

    Ratings and genres may be missing unless they are named, and with a second file for the items so may their texts.
    """
    columns = {column: names[column] for column in ("user", "item", "timestamp")}
    if "rating" in source.columns or names["rating"] in there:
        columns["rating"] = names["rating"]
    return columns if source.items_path else columns | _text_columns(there, names, source.columns)


def _own_log(frame: pd.DataFrame, path: Path, source: Source, rules: Rules) -> Interactions:
    """A table with one row per event."""
    names, items, items_path = column_names(source), None, path
    columns = log_columns(frame.columns, names, source)
    pick(frame, {ours: theirs for ours, theirs in columns.items() if ours != "title"}, path, ADVICE)
    events, notes = pick(frame, columns, path, TITLES_ADVICE), implicit_note(columns, list(frame.columns))
    if (source.kind or suffix_kind(path) or "csv") == "csv":  # other kinds have no quotation marks
        notes += fields_over_lines(frame)
    if source.items_path is not None:
        items, items_path = read_items(source)
    return assemble(events, items, path, items_path, path.stem, notes, rules)


def read_items(source: Source) -> tuple[pd.DataFrame, Path]:
    """The second file's columns item, title, further texts and, where it has them, genres; and the file."""
    file = existing(source.items_path, "data.source.items_path")
    frame = read_table(file, separator=source.separator)
    names = column_names(source) | source.items_columns
    if "item" not in source.items_columns and names["item"] not in frame:
        names["item"] = "item"  # it may use our own name
    wanted = source.columns | source.items_columns
    columns = {"item": names["item"], **_text_columns(frame.columns, names, wanted)}
    return pick(frame, columns, file, ITEMS_ADVICE), file


def _text_columns(there: Collection[str], names: dict[str, str], wanted: Collection[str]) -> dict[str, str]:
    """Our column -> the file's of titles, further texts and, where they are ``wanted`` or ``there``, genres."""
    genres = ["genres"] if "genres" in wanted or names["genres"] in there else []
    further = [name for name in names if name not in LOG_COLUMNS]
    return {column: names[column] for column in ["title", *genres, *further]}


def read_users(source: Source) -> pd.DataFrame | None:
    """Columns user and those of ``source.users_columns``, one row per user; None where no file of users is named.

    Raises:
        UserError: a missing file or column, or a user without name or with two rows.
    """
    if source.users_path is None:
        return None
    file = existing(source.users_path, "data.source.users_path")
    frame = read_table(file, separator=source.separator)
    names = {"user": source.columns.get("user", "user")} | source.users_columns
    if "user" not in source.users_columns and names["user"] not in frame:
        names["user"] = "user"
    users = pick(frame, names, file, "set data.source.users_columns.{column} to the right one")
    users = users.apply(lambda column: column.str.strip())
    bad = users["user"].duplicated() | (users["user"] == "")
    if bad.any():
        row = users[bad].iloc[0]
        raise UserError(f"{file}, row {users.index[bad][0]}: user {row['user']!r} is empty or has a row already")
    return users.reset_index(drop=True)
