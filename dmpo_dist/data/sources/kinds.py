"""What lies at a path: the kind of source is told by names of files and, for ready rows, by the first row."""

from collections.abc import Callable
from pathlib import Path

from dmpo_dist.config.data import DataConfig, Kind, Source
from dmpo_dist.data.sources.read import READY_ROWS
from dmpo_dist.data.sources.rowfiles import EXTENSIONS, first_keys
from dmpo_dist.data.tables import suffix_kind
from dmpo_dist.errors import UserError

BY_CONTENT: dict[str, Kind] = {
    "ratings.*": "movielens",
    "u.data": "movielens",
    "*.inter": "recbole",
    "meta_*.json*": "amazon",
    "*_dpo_ranking_*.json": "dmpo_released",
    "dataset_dict.json": "huggingface",
    "state.json": "huggingface",
}
FILE_READERS = ("csv", "jsonl", "parquet", "huggingface")
LOGS = (*FILE_READERS, "recbole", "amazon", "movielens")
HEARD_BY: dict[str, tuple[str, ...]] = {
    "columns": (*FILE_READERS, "recbole", "amazon"),
    "items_path": FILE_READERS,
    "items_columns": (*FILE_READERS, "recbole", "amazon"),
    "users_path": LOGS,
    "separator": ("csv",),
    "duplicate_titles": LOGS,
    "distinguish_by": LOGS,
    "untitled": LOGS,
    "tolerated_rows": LOGS,
    "category": ("amazon", "dmpo_released"),
    "subset": ("huggingface",),
    "split": ("huggingface",),
    "released_negatives": ("dmpo_released",),
    "prompts": ("dmpo_released",),
}
"""Key of ``data.source`` -> the kinds whose reading heeds it; all others have no effect there."""
READ_FROM_FILES = ("columns", "items_path", "items_columns", "users_path", "users_columns", "distinguish_by")
"""Keys that say something about files, so that a missing path is an oversight."""


def with_kind(config: DataConfig, echo: Callable[[str], None]) -> DataConfig:
    """``config`` with its kind of source: what lies at ``data.source.path``, or the simulator where nothing is named.

    Args:
        echo: is told what was found, and that a simulated world is not the user's.

    Raises:
        UserError: nothing is at the path, nothing that tells its kind, or a key that this kind does not take.
    """
    source = config.source
    kind = source.kind or _found_kind(source)
    if kind == "simulator":
        world = source.simulator
        echo(f"SIMULATED WORLD: {world.users:,} made-up users and {world.items:,} made-up titles; "
             "for a log of your own set data.source.path")  # fmt: skip
    elif source.kind is None:
        echo(f"{source.path}: read as data.source.kind={kind}")
    _require_used(source, kind)
    if config.levels != "none" and kind in READY_ROWS:
        raise UserError(
            f"data.levels={config.levels} ranks the likes of a log, but {kind} rows say by themselves what is "
            "preferred; leave it out, and write levels as 'ranked': [[best], [next, ...], ...] (docs/DATA.md)"
        )
    if config.stream and kind != "parquet":
        raise UserError(f"data.stream=true reads Parquet shards, but {source.path} is {kind}; set data.stream=false")
    if source.articles == "first" and kind not in ("movielens", "recbole"):
        raise UserError(
            f"data.source.articles=first has no effect on {kind}; leave it out, or give data.source.articles=as_is "
            "where a recipe sets it"
        )
    return config.model_copy(update={"source": source.model_copy(update={"kind": kind})})


def _found_kind(source: Source) -> Kind:
    if source.path is not None:
        return kind_of(source.path)
    given = [key for key in READ_FROM_FILES if getattr(source, key)]
    if given:
        raise UserError(f"data.source.{given[0]} is set but data.source.path is not; set it to the file or folder")
    return "simulator"


def _require_used(source: Source, kind: Kind) -> None:
    """Raise UserError for a key that says something about what ``kind`` does not read."""
    defaults = Source()
    for key, kinds in HEARD_BY.items():
        value = getattr(source, key)
        if value != getattr(defaults, key) and kind not in kinds:
            neutral = getattr(defaults, key)
            instead = f", give data.source.{key}={neutral} where a recipe sets it" if isinstance(neutral, str) else ""
            raise UserError(
                f"data.source.{key}={value} has no effect on {kind}; leave it out{instead}, or set data.source.kind"
            )
    if source.items_columns and source.items_path is None and kind in FILE_READERS:
        raise UserError("data.source.items_columns names columns of data.source.items_path, which is not set")


def kind_of(path: Path) -> Kind:
    """The ``data.source.kind`` of what lies at ``path``.

    Raises:
        UserError: nothing is there, or nothing that tells its kind.
    """
    if not path.exists():
        raise UserError(
            f"{path}: no such file or folder; correct data.source.path, or for a hub id set "
            "data.source.kind=huggingface"
        )
    if path.is_file():
        kind = _kind_of_rows(path) or suffix_kind(path) or ("csv" if path.suffix in (".txt", ".dat") else None)
        if kind:
            return kind
    for pattern, kind in BY_CONTENT.items():
        if path.is_dir() and any(path.glob(pattern)):
            return kind
    ready = [path / f"train{extension}" for extension in EXTENSIONS]
    kinds = [kind for file in ready if file.is_file() and (kind := _kind_of_rows(file))]
    if kinds:
        return kinds[0]
    if path.is_dir() and any(path.glob("*.parquet")):
        return "parquet"
    raise UserError(f"{path}: neither its name nor what is in it tells what it is; set data.source.kind")


def _kind_of_rows(file: Path) -> Kind | None:
    """The kind of ready rows in ``file``, by the keys of its first row; None where it holds something else."""
    keys = first_keys(file) if file.suffix in EXTENSIONS else set()
    if {"chosen", "rejected"} <= keys or "ranked" in keys:
        return "preferences"
    return "sdpo" if {"itemList", "trueSelection"} <= keys else None
