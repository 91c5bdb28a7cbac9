"""Where an interaction log comes from: one reader per kind of source."""

from pathlib import Path

import pandas as pd

from dmpo_dist.config.data import Kind, Source
from dmpo_dist.data.cleaning import LOG_COLUMNS, assemble
from dmpo_dist.data.schema import Interactions
from dmpo_dist.data.sources.amazon import read_amazon
from dmpo_dist.data.sources.movielens import read_movielens
from dmpo_dist.data.sources.recbole import read_recbole
from dmpo_dist.data.sources.simulator import simulate
from dmpo_dist.data.tables import EVENT_COLUMNS, SUFFIX_KINDS, as_strings, pick, read_table
from dmpo_dist.data.titles import with_articles_first
from dmpo_dist.errors import UserError

READY_ROWS = ("preferences", "sdpo", "dmpo_released")
ADVICE = "set data.source.columns.{column} to the right one"
TITLES_ADVICE = ADVICE + ", or name a second file with the titles, data.source.items_path"


def load_interactions(source: Source, seed: int) -> Interactions:
    """The log behind ``source``; ``seed`` matters to the simulator alone.

    Raises:
        UserError: a missing or malformed file; the message names the file, the row and the value.
    """
    if source.kind == "simulator":
        return simulate(source.simulator, seed)
    if source.kind in READY_ROWS:
        raise UserError(
            f"data.source.kind={source.kind} holds finished rows, not interactions; run `dmpo data prepare`"
        )
    names = column_names(source)
    if source.kind == "huggingface":
        return _own_log(*_hub_table(source), names, source)
    path = existing(source.path, f"data.source.kind={source.kind} needs data.source.path")
    if source.kind == "movielens":
        log = read_movielens(path, source.duplicate_titles, source.tolerated_rows)
        return with_articles_first(log) if source.articles == "first" else log
    if source.kind == "amazon":
        return read_amazon(path, source.category, source.duplicate_titles, source.tolerated_rows)
    if source.kind == "recbole":
        log = read_recbole(path, source.columns, source.duplicate_titles, source.tolerated_rows)
        return with_articles_first(log) if source.articles == "first" else log
    return _own_log(read_table(path, source.kind), path, names, source)


def kind_of(path: Path) -> Kind:
    """The ``data.source.kind`` of what lies at ``path``, by its name or, for a folder, by the files in it.

    Raises:
        UserError: nothing is there, or nothing that tells its kind.
    """
    existing(path, "the log of dmpo.prepare is missing: correct log")
    suffix = path.suffix.removesuffix(".gz") or path.with_suffix("").suffix
    if path.is_file() and suffix in SUFFIX_KINDS:
        return SUFFIX_KINDS[suffix]
    by_content: dict[str, Kind] = {
        "ratings.*": "movielens",
        "u.data": "movielens",
        "*.inter": "recbole",
        "*.parquet": "parquet",
        "state.json": "huggingface",
    }
    for pattern, kind in by_content.items():
        if path.is_dir() and any(path.glob(pattern)):
            return kind
    raise UserError(f"{path}: neither its name nor what is in it tells what it is; set data.source.kind")


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
    return as_strings(table.to_pandas()), source.path


def column_names(source: Source) -> dict[str, str]:
    """Our column -> the file's."""
    unknown = sorted(set(source.columns) - set(LOG_COLUMNS))
    if unknown:
        raise UserError(f"data.source.columns.{unknown[0]}: unknown; the keys are {', '.join(LOG_COLUMNS)}")
    return {column: source.columns.get(column, column) for column in LOG_COLUMNS}


def _own_log(frame: pd.DataFrame, path: Path, names: dict[str, str], source: Source) -> Interactions:
    """A table with one row per event; ``names`` maps our columns to its own."""
    items, items_path = None, path
    events = pick(frame, {c: names[c] for c in EVENT_COLUMNS}, path, ADVICE)
    if source.items_path is None:
        events = pick(frame, _with_titles(EVENT_COLUMNS, frame, names, source), path, TITLES_ADVICE)
    else:
        items, items_path = read_items(source, names)
    return assemble(events, items, path, items_path, path.stem, [], source.duplicate_titles, source.tolerated_rows)


def read_items(source: Source, names: dict[str, str]) -> tuple[pd.DataFrame, Path]:
    """The second file's columns item, title and, where it has them, genres; and the file."""
    file = existing(source.items_path, "data.source.items_path")
    frame = read_table(file)
    names = names if names["item"] in frame else names | {"item": "item"}  # it may use our own name
    return pick(frame, _with_titles(["item"], frame, names, source), file, ADVICE), file


def _with_titles(columns: list[str], frame: pd.DataFrame, names: dict[str, str], source: Source) -> dict[str, str]:
    """Our name -> the file's of ``columns``, title and, where they are asked for or there, genres."""
    genres = ["genres"] if "genres" in source.columns or "genres" in frame else []
    return {column: names[column] for column in [*columns, "title", *genres]}
