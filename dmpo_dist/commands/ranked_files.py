"""How ranked titles are written: Parquet and JSON lines with a row for each user, CSV with a row for each title."""

import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dmpo_dist.data.requests import Catalogue

SCHEMA = pa.schema([("user", pa.string()), ("titles", pa.list_(pa.string())), ("scores", pa.list_(pa.float64()))])


def with_ids(table: pa.Table, catalogue: Catalogue | None) -> pa.Table:
    """``table`` with a column ``items``, the ids of its titles, where ``catalogue`` has ids."""
    if catalogue is None or catalogue.ids is None:
        return table
    of_title = dict(zip(catalogue.titles, catalogue.ids, strict=True))
    ids = [[of_title.get(title) for title in titles] for titles in table["titles"].to_pylist()]
    return table.append_column("items", pa.array(ids, pa.list_(pa.string())))


def _write_parquet(file: Path, tables: Iterable[pa.Table]) -> None:
    writer = None
    for table in tables:
        writer = writer or pq.ParquetWriter(file, table.schema)
        writer.write_table(table)
    assert writer is not None, "there is a part"
    writer.close()


def _write_json_lines(file: Path, tables: Iterable[pa.Table]) -> None:
    with file.open("w", encoding="utf-8") as lines:
        for table in tables:
            lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist())


def _write_csv(file: Path, tables: Iterable[pa.Table]) -> None:
    """One row for each title, so that no list has to be put into a field."""
    with file.open("w", encoding="utf-8", newline="") as lines:
        rows = csv.writer(lines)
        for number, table in enumerate(tables):
            has_ids = "items" in table.column_names
            if number == 0:
                rows.writerow(["user", "rank", *["item"] * has_ids, "title", "score"])
            for row in table.to_pylist():
                ids = [[item] for item in row["items"]] if has_ids else [[] for _ in row["titles"]]
                for rank, (item, title, score) in enumerate(zip(ids, row["titles"], row["scores"], strict=True), 1):
                    rows.writerow([row["user"], rank, *item, title, score])


WRITERS: dict[str, Callable[[Path, Iterable[pa.Table]], None]] = {
    ".parquet": _write_parquet,
    ".jsonl": _write_json_lines,
    ".csv": _write_csv,
}
