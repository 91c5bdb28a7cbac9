"""Files of ready rows: JSON lines, a JSON list or Parquet, and folders with one file per split."""

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from dmpo_dist.data.splits import SPLITS
from dmpo_dist.data.tables import read_json_lines
from dmpo_dist.errors import UserError
from dmpo_dist.parsing import parse_json, parsing, require_plain

EXTENSIONS = (".jsonl", ".json", ".parquet")
OTHER_NAMES = {
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "eval": "validation",
}
"""What others call a split -> our name."""


def read_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """Numbered rows: lines of JSONL, elements of a JSON list, or rows of Parquet, from 1.

    Raises:
        UserError: an unknown format or a file that cannot be read as what its name says.
    """
    readers: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
        ".jsonl": read_json_lines,
        ".json": _read_json,
        ".parquet": _read_parquet,
    }
    if file.suffix not in readers:
        raise UserError(f"{file}: unknown format {file.suffix!r}; ready rows come as {', '.join(EXTENSIONS)}")
    try:
        yield from readers[file.suffix](file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error}); convert the file") from None


def first_keys(file: Path) -> set[str]:
    """The keys of the first row of a file of rows; raises as ``read_rows`` does."""
    if file.suffix == ".parquet":
        try:
            return set(pq.read_schema(file).names)
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: not a readable Parquet file ({error})") from None
    return {key for _, row in islice(read_rows(file), 1) if isinstance(row, dict) for key in row}


def split_files(folder: Path) -> dict[str, Path]:
    """The files named train, validation and test in ``folder``; the last two may be missing.

    Raises:
        UserError: no training file, two of one split, or one that has another name for a split.
    """
    for file in row_files(folder):
        if name := OTHER_NAMES.get(file.stem):
            raise UserError(
                f"{file}: rows of that split are read from {name}{file.suffix}; rename the file, or move it away"
            )
    files = {}
    for split in SPLITS:
        found = [folder / f"{split}{ext}" for ext in EXTENSIONS if (folder / f"{split}{ext}").is_file()]
        if len(found) > 1:
            raise UserError(f"{folder}: both {found[0].name} and {found[1].name} exist; keep one file per split")
        if found:
            files[split] = found[0]
    if "train" not in files:
        wanted = ", ".join(f"train{ext}" for ext in EXTENSIONS)
        raise UserError(f"{folder}: no training rows; looked for {wanted} (and validation, test beside it)")
    return files


def row_files(folder: Path) -> list[Path]:
    """The files in ``folder`` that have a format of rows, by name."""
    return sorted(file for file in folder.iterdir() if file.suffix in EXTENSIONS and file.is_file())


def shorten(value: Any) -> str:
    """A value as an error message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_json(file: Path) -> Iterator[tuple[int, Any]]:
    text = file.read_text(encoding="utf-8-sig").strip()
    try:
        rows = _one_after_another(text) if text.startswith("{") else parse_json(text)
    except (ValueError, RecursionError) as error:
        row = f", row {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(
            f"{file}{row}: not valid JSON ({error}); a .json file is one list of objects, one object per line is .jsonl"
        ) from None
    if not isinstance(rows, list):
        raise UserError(f"{file}: holds a {type(rows).__name__}; it must be a list of objects, one per row")
    yield from enumerate(rows, start=1)


def _one_after_another(text: str) -> Any:
    """The objects of ``text``, which follow each other with or without space between; a single one is returned bare."""
    decoder, rows, end = json.JSONDecoder(), [], 0
    while end < len(text):
        row, end = decoder.raw_decode(text, end)
        rows.append(row)
        while text[end : end + 1].isspace():
            end += 1
    require_plain(rows, most=None)
    return rows if len(rows) > 1 else rows[0]


def _read_parquet(file: Path) -> Iterator[tuple[int, Any]]:
    with parsing(file, "is it a Parquet file, and whole?"):
        rows = pq.read_table(file).to_pylist()
    yield from enumerate(rows, start=1)
