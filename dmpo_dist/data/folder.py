"""The prepared folder: checked for leaks, fingerprinted, written whole or not at all."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from datasets import Dataset

from dmpo_dist.artifacts.dataset import DatasetCard, LeakFinding
from dmpo_dist.artifacts.files import whole_folder, write_whole
from dmpo_dist.config.data import DataConfig
from dmpo_dist.data.card import data_card
from dmpo_dist.data.groups import Rows
from dmpo_dist.data.leaks import Finding, check_leaks, finding_lines, findings_to_json, leak_message, leaks
from dmpo_dist.data.splits import SPLITS
from dmpo_dist.data.store import FORMAT_VERSION, ROW_FEATURES, PreparedData
from dmpo_dist.errors import UserError

CHECKED_ROWS = 20_000  # of each split, for the leak check of data that was not made in memory


class SplitRows(Protocol):
    """Rows to count and to go over, in memory or read as they are needed."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Mapping[str, Any]]: ...


def check(path: Path, echo: Callable[[str], None]) -> None:
    """Look for leaks in the prepared folder ``path``.

    Raises:
        UserError: it is no such folder, or there is a leak.
    """
    data = PreparedData.load(path)
    rows = {split: sample_rows(getattr(data, split)) for split in SPLITS}
    found = leaks(_say_findings(rows, data.interactions, data.card, echo))
    if found:
        raise UserError(f"{path}: {leak_message(found)}")


def sample_rows(rows: Dataset) -> list[dict[str, Any]]:
    """At most ``CHECKED_ROWS`` rows, at equal distances."""
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(CHECKED_ROWS, len(rows))).astype(int))
    return rows.select(chosen).to_list() if len(rows) else []


def rewrite(data: PreparedData, changed: Rows, note: str, output: Path, echo: Callable[[str], None]) -> PreparedData:
    """Write ``data`` to ``output`` with other rows in the splits ``changed``; ``note`` goes into the card.

    Raises:
        UserError: ``output`` exists or cannot be written.
    """
    require_free(output)
    rows = {split: changed[split] if split in changed else getattr(data, split).to_list() for split in SPLITS}
    found = {"items": data.items, "interactions": data.interactions}
    tables = {name: table for name, table in found.items() if table is not None}
    changed_card = {"notes": [*data.card.notes, note], "fingerprint": fingerprint(rows, data.items)}
    card = data.card.model_copy(update=changed_card)
    card.leaks = checked_for_leaks(rows, data.interactions, card, echo, allow=True)
    write_folder(output, rows, tables, card)
    return PreparedData.load(output)


def require_free(output: Path) -> None:
    if output.exists() or output.is_symlink():
        raise UserError(f"{output}: exists already and is left as it is; remove it or choose another data.path")


def _say_findings(
    rows: Rows, events: pd.DataFrame | None, card: DatasetCard, echo: Callable[[str], None]
) -> list[Finding]:
    leave_one_out = card.config.get("split") == "leave_one_out"
    findings = check_leaks(rows, events, card.shown_at, leave_one_out)
    for line in finding_lines(findings):
        echo(line)
    return findings


def checked_for_leaks(
    rows: Rows, events: pd.DataFrame | None, card: DatasetCard, echo: Callable[[str], None], allow: bool
) -> list[LeakFinding]:
    """The findings for the card; raises UserError for leaks that are not allowed."""
    findings = _say_findings(rows, events, card, echo)
    found = leaks(findings)
    if found and not allow:
        raise UserError(leak_message(found) + "; mend the source, or pass --allow-leaks to write it all the same")
    return findings_to_json(findings)


def fingerprint(rows: Mapping[str, Iterable[Mapping[str, Any]]], items: pd.DataFrame | None) -> str:
    """sha256 over items and rows in order; equal on every machine for equal content.

    Oracle scores are left out: no model sees them, and their last bits depend on the machine's linear algebra.
    """
    digest = hashlib.sha256()

    def add(record: object) -> None:
        digest.update(json.dumps(record, ensure_ascii=True, separators=(",", ":"), sort_keys=True).encode() + b"\n")

    for item in [] if items is None else items[["item", "title", "genres"]].itertuples(index=False, name=None):
        add(item)
    for split in SPLITS:
        add(split)
        for row in rows[split]:
            add({key: value for key, value in row.items() if key != "oracle"})
    return digest.hexdigest()


def make_card(
    config: DataConfig,
    seed: int,
    name: str,
    notes: list[str],
    rows: Mapping[str, SplitRows],
    tables: Mapping[str, pd.DataFrame],
    log: Mapping[str, Any] | None = None,
) -> DatasetCard:
    """The card of ``rows`` and ``tables``, but for the findings of the leak check.

    Args:
        log: cuts and drops, of rows that were made from a log (see ``facts_of``).
    """
    content = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "seed": seed,
        "counts": {split: len(rows[split]) for split in SPLITS},
        "users": {split: len({row["user"] for row in rows[split]}) for split in SPLITS},
        "cuts": None,
        "dropped": {split: {} for split in SPLITS},
        "notes": notes,
        "items": "items" in tables,
        "interactions": "interactions" in tables,
        "fingerprint": fingerprint(rows, tables.get("items")),
        "config": config.model_dump(mode="json"),
    }
    return DatasetCard.model_validate(content | dict(log or {}))


def write_folder(output: Path, rows: Rows, tables: dict[str, pd.DataFrame], card: DatasetCard) -> None:
    """Write rows, tables and card to ``output``, which appears whole or not at all."""
    with whole_folder(output) as partial:
        for split in (split for split in SPLITS if rows[split]):
            columns = {name: [row[name] for row in rows[split]] for name in ROW_FEATURES}
            save_split(Dataset.from_dict(columns, features=ROW_FEATURES), partial / split)
        for name, table in tables.items():
            table.to_parquet(partial / f"{name}.parquet", index=False)
        write_card(partial, card)


def save_split(rows: Dataset, folder: Path) -> None:
    """Save a split; an empty one has no folder, as ``datasets`` cannot read it back."""
    if len(rows):
        rows.save_to_disk(str(folder))


def write_card(folder: Path, card: DatasetCard) -> None:
    """The card for programs and for people."""
    card.write(folder)
    write_whole(folder / "card.md", data_card(card))
