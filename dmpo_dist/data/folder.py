"""Writing the prepared folder: checked for leaks, fingerprinted, written completely or not at all."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from dmpo_dist.artifacts.dataset import DatasetCard, LeakFinding
from dmpo_dist.artifacts.digest import digests_of
from dmpo_dist.artifacts.files import whole_folder, write_whole
from dmpo_dist.config.data import DataConfig
from dmpo_dist.data.card import data_card
from dmpo_dist.data.leaks import Finding, check_leaks, finding_lines, findings_to_json, leak_message, leaks
from dmpo_dist.data.splits import SPLITS
from dmpo_dist.data.store import (
    FORMAT_VERSION,
    INTERACTIONS_FILE,
    USERS_FILE,
    PreparedData,
    dataset_of,
    rows_of,
)
from dmpo_dist.errors import UserError

Rows = dict[str, list[dict[str, Any]]]  # split -> rows with the columns of ``ROW_FEATURES``
CHECKED_ROWS = 20_000  # of each split, in the leak check of data that is read from disk


def check(path: Path, echo: Callable[[str], None]) -> None:
    """Compare the content of the prepared folder ``path`` with its fingerprint, and look for leaks in it.

    Raises:
        UserError: it is not a prepared folder, its content is not what was written, or it has a leak.
    """
    data = PreparedData.load(path)
    found_now = fingerprint({split: getattr(data, split) for split in SPLITS}, data.items, data.users)
    if found_now != data.fingerprint:
        raise UserError(
            f"{path}: its content has the fingerprint {found_now[:16]}, its card says {data.fingerprint[:16]}: it was "
            "changed since it was written; remove the folder and run `dmpo data prepare` again"
        )
    rows = {split: sample_rows(getattr(data, split)) for split in SPLITS}
    found = leaks(_say_findings(rows, data.interactions, data.card, echo))
    if found:
        raise UserError(f"{path}: {leak_message(found)}")


def sample_rows(rows: Dataset) -> list[dict[str, Any]]:
    """At most ``CHECKED_ROWS`` rows, spread evenly over the split."""
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(CHECKED_ROWS, len(rows))).astype(int))
    return rows.select(chosen).to_list() if len(rows) else []


def rewrite(
    data: PreparedData,
    changed: Rows,
    settings: Mapping[str, Any],
    note: str,
    output: Path,
    echo: Callable[[str], None],
) -> PreparedData:
    """Write ``data`` to ``output`` with the rows of ``changed`` in place of those splits.

    Args:
        settings: of the card, which are others for these rows.
        note: goes into the card.

    Raises:
        UserError: ``output`` exists or cannot be written.
    """
    require_free(output)
    rows = {split: dataset_of(changed[split]) if split in changed else getattr(data, split) for split in SPLITS}
    card = data.card.model_copy(deep=True)
    card.config |= settings
    for split in changed:  # these may be some of the rows alone, as of a few shots
        card.counts[split], card.users[split] = len(rows[split]), len({*rows[split]["user"]})
    card.notes, card.fingerprint = [*data.card.notes, note], fingerprint(rows, data.items, data.users)
    lists = {split: rows[split].to_list() for split in SPLITS}
    card.leaks = checked_for_leaks(lists, data.interactions, card, echo, allow=True)
    with whole_folder(output) as folder:
        if data.interactions is not None:
            data.interactions.to_parquet(folder / INTERACTIONS_FILE, index=False)
        write_rows(folder, rows, data.items, card, data.users)
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
    """The findings for the card; raises UserError for leaks unless ``allow``."""
    findings = _say_findings(rows, events, card, echo)
    found = leaks(findings)
    if found and not allow:
        raise UserError(leak_message(found) + "; mend the source, or pass --allow-leaks to write it all the same")
    return findings_to_json(findings)


def fingerprint(rows: Mapping[str, Dataset], items: pd.DataFrame | None, users: pd.DataFrame | None = None) -> str:
    """sha256 over items, users and rows in order: equal content has the same fingerprint on every machine.

    Oracle scores are left out: no model sees them, and their last bits depend on the machine's linear algebra library.
    """
    digest = hashlib.sha256()

    def add(record: object) -> None:
        digest.update(json.dumps(record, ensure_ascii=True, separators=(",", ":"), sort_keys=True).encode() + b"\n")

    for table in (items, users):
        for record in [] if table is None else table.itertuples(index=False, name=None):
            add(record)
    for split in SPLITS:
        add(split)
        for row in rows_of(rows[split]):
            add({key: value for key, value in row.items() if key != "oracle"})
    return digest.hexdigest()


def make_card(
    config: DataConfig,
    seed: int,
    name: str,
    notes: list[str],
    rows: Mapping[str, Dataset],
    items: pd.DataFrame | None,
    users: pd.DataFrame | None = None,
) -> DatasetCard:
    """The card of rows that were not made from a log."""
    content = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "seed": seed,
        "counts": {split: len(rows[split]) for split in SPLITS},
        "users": {split: len(rows[split].unique("user")) for split in SPLITS},
        "cuts": None,
        "dropped": {split: {} for split in SPLITS},
        "notes": notes,
        "items": items is not None,
        "interactions": False,
        "fingerprint": fingerprint(rows, items, users),
        "config": config.model_dump(mode="json"),
    }
    return DatasetCard.model_validate(content)


def write_rows(
    folder: Path,
    rows: Mapping[str, Dataset],
    items: pd.DataFrame | None,
    card: DatasetCard,
    users: pd.DataFrame | None = None,
) -> None:
    """Write rows, items, users' fields, ``dataset.json`` and ``card.md``; an empty split has no folder.

    The card gets the digests of these files, and of the interactions, which lie there already.
    """
    for split in SPLITS:
        if len(rows[split]):  # ``datasets`` cannot read an empty one back
            rows[split].save_to_disk(str(folder / split))
    if items is not None:
        items.to_parquet(folder / "items.parquet", index=False)
    if users is not None:
        users.to_parquet(folder / USERS_FILE, index=False)
    files = [path for split in SPLITS for path in (folder / split).glob("*")]
    card.digests = digests_of(folder, [*files, *folder.glob("*.parquet")])
    card.write(folder)
    write_whole(folder / "card.md", data_card(card))
