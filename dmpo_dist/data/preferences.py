"""Ready preference rows in TRL's format: ``prompt``, ``chosen`` and ``rejected`` as plain strings."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from dmpo_dist.data.splits import SPLITS
from dmpo_dist.errors import UserError

KEYS = ("prompt", "chosen", "rejected")
EXTENSIONS = (".jsonl", ".json", ".parquet")
MIN_GROUPS_TO_SPLIT = 50
HELD_OUT = 0.1  # share of a single file's prompts for validation, and again for test


@dataclass(frozen=True)
class Preference:
    """A prompt with one chosen and K distinct rejected responses."""

    prompt: str
    chosen: str
    rejected: tuple[str, ...]


@dataclass(frozen=True)
class Preferences:
    """Preference groups by split, and one-sentence notes on what reading merged or dropped."""

    splits: dict[str, list[Preference]]
    name: str
    notes: list[str]


def load_preferences(path: Path | None, seed: int) -> Preferences:
    """Read a file, or a folder with files named train, validation and test, in JSONL, JSON or Parquet.

    A single file of at least 50 groups gives 10 % of its prompts each to validation and test (a seeded draw; equal
    prompts stay together); a smaller one is all training. Rows with equal prompt and chosen become one group.

    Raises:
        UserError: no such file, unknown format, or a bad row; the message names file and row.
    """
    if path is None:
        raise UserError("data.source.kind=preferences needs data.source.path; set it to the file or folder to read")
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; correct data.source.path")
    if path.is_file():
        groups, notes = _read_groups(path)
        splits = _split(groups, seed)
        if not splits["test"]:
            notes.append(f"{len(groups)} groups are too few to hold any out: all are training groups.")
        return Preferences(splits, path.stem, notes)
    splits: dict[str, list[Preference]] = {split: [] for split in SPLITS}
    notes = []
    for split, file in _split_files(path).items():
        splits[split], file_notes = _read_groups(file)
        notes += [f"{file.name}: {note}" for note in file_notes]
    return Preferences(splits, path.resolve().name, notes + _overlap_notes(splits))


def _split_files(folder: Path) -> dict[str, Path]:
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


def _read_groups(file: Path) -> tuple[list[Preference], list[str]]:
    rows = [_parse_row(row, f"{file}, row {number}") for number, row in _read_rows(file)]
    if not rows:
        raise UserError(f"{file}: holds no rows; it must have objects with {', '.join(KEYS)}")
    merged: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        merged.setdefault((row.prompt, row.chosen), []).extend(row.rejected)
    groups = [Preference(p, c, tuple(dict.fromkeys(rejected))) for (p, c), rejected in merged.items()]
    notes = []
    if len(groups) < len(rows):
        notes.append(f"{len(rows)} rows merged into {len(groups)} groups of equal prompt and chosen.")
    repeated = sum(map(len, merged.values())) - sum(len(g.rejected) for g in groups)
    if repeated:
        notes.append(f"{repeated} repeated rejected responses dropped.")
    return groups, notes


def _read_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """Numbered rows: lines of JSONL, elements of a JSON list, or rows of Parquet, from 1."""
    readers: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".parquet": _read_parquet,
    }
    if file.suffix not in readers:
        raise UserError(f"{file}: unknown format {file.suffix!r}; preference rows come as {', '.join(EXTENSIONS)}")
    try:
        yield from readers[file.suffix](file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error}); convert the file") from None


def _read_jsonl(file: Path) -> Iterator[tuple[int, Any]]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{file}, row {number}: not valid JSON ({error}); each line is one object") from None
            yield number, row


def _read_json(file: Path) -> Iterator[tuple[int, Any]]:
    text = file.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{file}, row {error.lineno}: not valid JSON ({error.msg}); a .json file is one list of objects, one object "
            "per line is .jsonl"
        ) from None
    if not isinstance(rows, list):
        raise UserError(f"{file}: holds a {type(rows).__name__}; it must be a list of objects with {', '.join(KEYS)}")
    yield from enumerate(rows, start=1)


def _read_parquet(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        table = pq.read_table(file)
    except ValueError as error:  # pyarrow's errors for malformed files are ValueErrors
        raise UserError(f"{file}: not a readable Parquet file ({error})") from None
    yield from enumerate(table.to_pylist(), start=1)


def _parse_row(row: Any, where: str) -> Preference:
    if not isinstance(row, dict):
        raise UserError(f"{where}: {_short(row)} is not an object with {', '.join(KEYS)}")
    for key in KEYS:
        if row.get(key) is None:
            exist = ", ".join(map(repr, row)) or "no keys"
            raise UserError(f"{where}: no {key!r} (the row has {exist}); write the prompt apart from the responses")
    rejected = row["rejected"] if _is_strings(row["rejected"]) else [row["rejected"]]
    if not rejected:
        raise UserError(f"{where}: 'rejected' is an empty list; a preference needs at least one rejected response")
    for key, value in [("prompt", row["prompt"]), ("chosen", row["chosen"]), *(("rejected", r) for r in rejected)]:
        _check_text(value, key, where)
    if row["chosen"] in rejected:
        raise UserError(f"{where}: chosen {_short(row['chosen'])} is also rejected; remove it from one side")
    return Preference(row["prompt"], row["chosen"], tuple(rejected))


def _is_strings(value: Any) -> bool:
    return isinstance(value, list) and not any(isinstance(element, dict) for element in value)


def _check_text(value: Any, key: str, where: str) -> None:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        raise UserError(
            f"{where}: {key!r} is a list of messages; conversational rows are not supported: write plain strings "
            "(apply the chat template to the prompt, keep the last message of each side as the response)"
        )
    if not isinstance(value, str):
        raise UserError(
            f"{where}: {key!r} is {_short(value)}; it must be a string{' or a list of strings' * (key == 'rejected')}"
        )
    if not value.strip():
        raise UserError(f"{where}: {key!r} is an empty string; fill it or remove the row")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _split(groups: list[Preference], seed: int) -> dict[str, list[Preference]]:
    prompts = list(dict.fromkeys(g.prompt for g in groups))
    held_out = int(len(prompts) * HELD_OUT)
    if len(groups) < MIN_GROUPS_TO_SPLIT or held_out == 0:
        return {"train": groups, "validation": [], "test": []}
    order = np.random.default_rng(seed).permutation(len(prompts)).tolist()
    split_of = {
        prompts[i]: "validation" if n < held_out else "test" if n < 2 * held_out else "train"
        for n, i in enumerate(order)
    }
    return {split: [g for g in groups if split_of[g.prompt] == split] for split in SPLITS}


def _overlap_notes(splits: dict[str, list[Preference]]) -> list[str]:
    """Prompts that occur in training too would flatter the evaluation: say how many."""
    train = Counter(g.prompt for g in splits["train"])
    shared = {split: sum(g.prompt in train for g in splits[split]) for split in ("validation", "test")}
    return [f"{n} of {len(splits[s])} {s} prompts occur in training too." for s, n in shared.items() if n]
