"""Parquet shards, read by DuckDB without ever being in memory whole."""

from collections.abc import Callable
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow.parquet as pq

from dmpo_dist.config.data import Source
from dmpo_dist.data.cleaning import clean, implicit_note
from dmpo_dist.data.database import Database, first_line, literal, quoted
from dmpo_dist.data.rules import Rules
from dmpo_dist.data.sources.read import ADVICE, column_names, existing, log_columns, read_items
from dmpo_dist.data.tables import require_columns, require_once
from dmpo_dist.errors import UserError
from dmpo_dist.parsing import parsing


def clean_shards(
    database: Database, source: Source, rules: Rules, echo: Callable[[str], None]
) -> tuple[pd.DataFrame, str, list[str]]:
    """Make the table ``log`` of the shards behind ``source``; its items, its name and what was changed.

    Raises:
        UserError: no or damaged files, a missing column or a malformed row.
    """
    folder = existing(source.path, "data.source.kind=parquet needs data.source.path")
    shards = sorted(folder.glob("*.parquet")) if folder.is_dir() else [folder]
    if not shards:
        raise UserError(f"{folder}: no *.parquet files; set data.source.path to the folder of shards")
    files = f"[{', '.join(literal(str(shard)) for shard in shards)}]"
    types, names = _column_types(database, files, shards[0].parent), column_names(source)
    for shard in shards:
        with parsing(shard, "is it a Parquet file, and whole?"):
            require_once(pq.read_schema(shard).names, shard)
    columns = log_columns(list(types), names, source)
    require_columns(columns, list(types), folder, ADVICE)
    texts = [f"{_as_text(quoted(theirs), types[theirs])} AS {quoted(ours)}" for ours, theirs in columns.items()]
    database.run(
        f"""CREATE VIEW read AS SELECT filename AS file, file_row_number + 1 AS row, {", ".join(texts)}
        FROM read_parquet({files}, union_by_name=true, filename=true, file_row_number=true)"""
    )
    echo(f"{database.value('SELECT count(*) FROM read'):,} rows read from {len(shards)} files")
    items, items_file, notes = None, folder, implicit_note(columns, list(types))
    if source.items_path is not None:
        items, items_file = read_items(source)
        items = items.set_axis([f"{items_file}, row {row}" for row in items.index])
    items = clean(database, items, items_file, notes, rules)
    return items, folder.resolve().name, notes


def _column_types(database: Database, files: str, folder: Path) -> dict[str, str]:
    """Name and SQL type of every column that occurs in one of ``files``."""
    try:
        described = database.rows(f"DESCRIBE SELECT * FROM read_parquet({files}, union_by_name=true)")
    except duckdb.Error as error:
        raise UserError(f"{folder}: not readable Parquet files ({first_line(error)})") from None
    return {name: kind for name, kind, *_ in described}


def _as_text(column: str, kind: str) -> str:
    """SQL for a column of type ``kind`` as text: moments in seconds since 1970."""
    if kind.startswith(("TIMESTAMP", "DATE")):
        return f"CAST(CAST(floor(epoch({column})) AS BIGINT) AS VARCHAR)"
    if kind in ("FLOAT", "DOUBLE"):  # whole numbers without a point, as in a log that is read at once
        whole = f"CASE WHEN {column} = floor({column}) THEN TRY_CAST({column} AS BIGINT) END"
        return f"coalesce(CAST({whole} AS VARCHAR), CAST({column} AS VARCHAR))"
    return f"CAST({column} AS VARCHAR)"
