"""From a source to a folder of preference groups: read, split, draw negatives, write."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from dmpo_dist.config_data import DataConfig, Source
from dmpo_dist.data.card import data_card, moment, summary
from dmpo_dist.data.leaks import Finding, check_leaks, finding_lines, findings_to_json, leak_message, leaks
from dmpo_dist.data.negatives import NegativeSampler
from dmpo_dist.data.preferences import Preferences, load_preferences
from dmpo_dist.data.released import load_released, load_sdpo
from dmpo_dist.data.schema import Interactions
from dmpo_dist.data.simulator import LIKE
from dmpo_dist.data.sources import READY_ROWS, load_interactions
from dmpo_dist.data.splits import SPLITS, Requests, find_requests, k_core, time_cuts
from dmpo_dist.data.store import FORMAT_VERSION, ROW_FEATURES, PreparedData
from dmpo_dist.errors import UserError

Rows = dict[str, list[dict[str, Any]]]  # split -> rows with the columns of ROW_FEATURES


def prepare(
    config: DataConfig,
    seed: int,
    output: Path,
    echo: Callable[[str], None] = print,
    allow_leaks: bool = False,
) -> PreparedData:
    """Make preference groups from ``config.source`` and write them to ``output``, which appears whole or not at all.

    Args:
        allow_leaks: write data that the leak check finds fault with; its card says so.

    Raises:
        UserError: ``output`` exists or cannot be written, the source is malformed, negatives run out, filtering
            leaves no training or test group, or the leak check finds a leak.
    """
    output = Path(output)
    _require_free(output)
    tables: dict[str, pd.DataFrame] = {}
    if config.source.kind in READY_ROWS:
        preferences = _ready_rows(config.source, seed)
        rows = {split: _preference_rows(preferences, split) for split in SPLITS}
        titles = preferences.catalogue()
        if titles is not None:
            tables["items"] = pd.DataFrame({"item": titles, "title": titles, "genres": ""})
        card = _card(config, seed, preferences.name, preferences.notes, rows, tables)
        card["shown_at"] = preferences.shown_at()
    else:
        log = _core(load_interactions(config.source, seed), config.k_core)
        rows, facts, notes = _groups_of_log(log, config, seed)
        tables = {"items": log.items, "interactions": log.events}
        card = _card(config, seed, log.name, [*log.notes, *notes], rows, tables) | facts
    for note in card["notes"]:
        echo(note)
    card["leaks"] = _checked_for_leaks(rows, tables.get("interactions"), card, echo, allow_leaks)
    echo(summary(card))
    _write(output, rows, tables, card)
    return PreparedData.load(output)


def check(path: Path, echo: Callable[[str], None]) -> None:
    """Look for leaks in the prepared folder ``path``.

    Raises:
        UserError: it is no such folder, or there is a leak.
    """
    data = PreparedData.load(path)
    rows = {split: getattr(data, split).to_list() for split in SPLITS}
    found = leaks(_say_findings(rows, data.interactions, data.card, echo))
    if found:
        raise UserError(f"{path}: {leak_message(found)}")


def rewrite(data: PreparedData, changed: Rows, note: str, output: Path, echo: Callable[[str], None]) -> PreparedData:
    """Write ``data`` to ``output`` with other rows in the splits ``changed``; ``note`` goes into the card.

    Raises:
        UserError: ``output`` exists or cannot be written.
    """
    _require_free(output)
    rows = {split: changed[split] if split in changed else getattr(data, split).to_list() for split in SPLITS}
    found = {"items": data.items, "interactions": data.interactions}
    tables = {name: table for name, table in found.items() if table is not None}
    card = data.card | {"notes": [*data.card["notes"], note], "fingerprint": fingerprint(rows, data.items)}
    card["leaks"] = _checked_for_leaks(rows, data.interactions, card, echo, allow=True)
    _write(output, rows, tables, card)
    return PreparedData.load(output)


def _require_free(output: Path) -> None:
    if output.exists() or output.is_symlink():
        raise UserError(f"{output}: exists already and is left as it is; remove it or choose another data.path")


def _say_findings(
    rows: Rows, events: pd.DataFrame | None, card: dict[str, Any], echo: Callable[[str], None]
) -> list[Finding]:
    leave_one_out = card["config"].get("split") == "leave_one_out"
    findings = check_leaks(rows, events, card.get("shown_at"), leave_one_out)
    for line in finding_lines(findings):
        echo(line)
    return findings


def _checked_for_leaks(
    rows: Rows, events: pd.DataFrame | None, card: dict[str, Any], echo: Callable[[str], None], allow: bool
) -> list[dict[str, Any]]:
    """The findings for the card; raises UserError for leaks that are not allowed."""
    findings = _say_findings(rows, events, card, echo)
    found = leaks(findings)
    if found and not allow:
        raise UserError(leak_message(found) + "; mend the source, or pass --allow-leaks to write it all the same")
    return findings_to_json(findings)


def fingerprint(rows: Rows, items: pd.DataFrame | None) -> str:
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


def _core(log: Interactions, k: int) -> Interactions:
    """The k-core of ``log``, with what it cost as a note."""
    if k == 1:
        return log
    events = k_core(log.events, k)
    if events.empty:
        raise UserError(f"data.k_core={k} leaves nothing of {len(log.events)} interactions; lower it")
    kept = log.items["item"].isin(events["item"])
    note = (
        f"{k}-core of the whole log: {len(events)} of {len(log.events)} interactions, "
        f"{events['user'].nunique()} of {log.events['user'].nunique()} users, {int(kept.sum())} of {len(kept)} items."
    )
    return replace(
        log,
        events=events.reset_index(drop=True),
        items=log.items[kept].reset_index(drop=True),
        notes=[*log.notes, note],
        oracle=None if log.oracle is None else log.oracle[:, kept.to_numpy()],
    )


def _groups_of_log(log: Interactions, config: DataConfig, seed: int) -> tuple[Rows, dict[str, Any], list[str]]:
    """Rows by split, what the card says about the cuts and drops, and notes."""
    cuts = None
    if config.split == "time":
        cuts = time_cuts(log.events["timestamp"].to_numpy(), config.validation_quantile, config.test_quantile)
    requests = find_requests(
        log.events,
        cuts,
        rating_threshold=config.rating_threshold,
        min_history=config.min_history,
        max_history=config.max_history,
        train_requests_per_user=config.train_requests_per_user,
    )
    _require_groups(requests, log.events, config)
    sampler = NegativeSampler(
        log.events, config.rating_threshold, seed, config.popularity_exponent, requests["train"].table["item"].tolist()
    )
    requests["train"] = _with_enough_candidates(requests["train"], sampler, config)
    if cuts is None:  # some users left long before others came
        requests |= {split: _with_enough_to_rank(requests[split], sampler, config) for split in SPLITS[1:]}
    requests["validation"] = _sampled(requests["validation"], config.max_validation_users, seed)
    rows = {split: _log_rows(requests[split], split, log, sampler, config) for split in SPLITS}
    facts = {
        "cuts": cuts and {name: moment(cut) for name, cut in zip(SPLITS[1:], cuts, strict=True)},
        "dropped": {split: requests[split].dropped for split in SPLITS},
    }
    return rows, facts, _notes(log, config)


def _notes(log: Interactions, config: DataConfig) -> list[str]:
    notes = []
    singles = int((log.events["user"].value_counts() == 1).sum())
    if singles:
        notes.append(f"{singles} users with one interaction give no request.")
    if log.oracle is not None and config.rating_threshold != LIKE:
        notes.append(
            f"The oracle assumes likes at {LIKE}, not at {config.rating_threshold}: it is not the best ranking here."
        )
    return notes


def _require_groups(requests: dict[str, Requests], events: pd.DataFrame, config: DataConfig) -> None:
    """Stop when a split that must not be empty is, with the count at every stage."""
    empty = [split for split in ("train", "test") if requests[split].table.empty]
    if not empty:
        return
    liked = int((events["rating"] >= config.rating_threshold).sum())
    lines = [
        f"no {' and no '.join(empty)} requests are left after filtering:",
        f"  {len(events)} interactions of {events['user'].nunique()} users",
        f"  {liked} likes (rating >= data.rating_threshold={config.rating_threshold:g})",
    ]
    for split in SPLITS:
        dropped = requests[split].dropped
        in_period = len(requests[split].table) + sum(dropped.values())
        with_history = in_period - dropped["short_history"]
        lines.append(
            f"  {split}: {in_period} likes in its period, {with_history} of them with at least "
            f"data.min_history={config.min_history} likes before, {with_history - dropped['unseen_positive']} of them of an "
            f"item somebody took before, {len(requests[split].table)} kept"
        )
    lines.append(
        "loosen data.rating_threshold or data.min_history, or move the cuts data.validation_quantile="
        f"{config.validation_quantile:g} and data.test_quantile={config.test_quantile:g}"
    )
    raise UserError("\n".join(lines))


def _with_enough_candidates(requests: Requests, sampler: NegativeSampler, config: DataConfig) -> Requests:
    """Drop training requests so early in the log that too few items were in the world; all of them: an error."""
    pairs = zip(requests.table["user"], requests.table["timestamp"], strict=True)
    available = np.array([sampler.available_for_training(config.negatives, user, t) for user, t in pairs])
    enough = available >= config.negatives_per_group
    if not enough.any():
        best = requests.table.iloc[int(available.argmax())]
        sampler.training(config.negatives, best["user"], int(best["timestamp"]), config.negatives_per_group)
    dropped = requests.dropped | {"few_candidates": int((~enough).sum())}
    return Requests(requests.table[enough].reset_index(drop=True), dropped)


def _with_enough_to_rank(requests: Requests, sampler: NegativeSampler, config: DataConfig) -> Requests:
    """Drop requests of leave-one-out from before there were enough items to rank."""
    pairs = zip(requests.table["user"], requests.table["timestamp"], strict=True)
    enough = np.array(
        [sampler.available_for_evaluation(user, t) >= config.evaluation_negatives for user, t in pairs], dtype=bool
    )
    dropped = requests.dropped | {"few_candidates": int((~enough).sum())}
    return Requests(requests.table[enough].reset_index(drop=True), dropped)


def _sampled(requests: Requests, limit: int | None, seed: int) -> Requests:
    """A seeded sample of at most ``limit`` requests."""
    table = requests.table
    if limit is not None and len(table) > limit:
        kept = np.random.default_rng(seed).choice(len(table), limit, replace=False)
        table = table.iloc[np.sort(kept)].reset_index(drop=True)
    return Requests(table, requests.dropped | {"over_max_validation_users": len(requests.table) - len(table)})


def _log_rows(
    requests: Requests, split: str, log: Interactions, sampler: NegativeSampler, config: DataConfig
) -> list[dict[str, Any]]:
    title = dict(zip(log.items["item"], log.items["title"], strict=True))
    score = _oracle_scores(log)
    rows = []
    for user, timestamp, positive, history in requests.table.itertuples(index=False, name=None):
        if split == "train":
            negatives = sampler.training(config.negatives, user, timestamp, config.negatives_per_group)
        else:
            negatives = sampler.evaluation(user, timestamp, config.evaluation_negatives)
        assert positive not in negatives, "a positive was drawn as its own negative"
        rows.append(
            {
                "user": user,
                "timestamp": timestamp,
                "history": [title[item] for item in history],
                "history_items": history,
                "positive": title[positive],
                "positive_item": positive,
                "negatives": [title[item] for item in negatives],
                "negative_items": negatives,
                "oracle": score(user, [positive, *negatives]),
                "prompt": None,
            }
        )
    return rows


def _oracle_scores(log: Interactions) -> Callable[[str, list[str]], list[float]]:
    """A function that scores candidates of a user; it returns [] where the world is unknown."""
    if log.oracle is None or log.oracle_users is None:
        return lambda user, items: []
    oracle = log.oracle
    row = {user: number for number, user in enumerate(log.oracle_users)}
    column = {item: number for number, item in enumerate(log.items["item"])}
    return lambda user, items: oracle[row[user], [column[item] for item in items]].astype(float).tolist()


def _ready_rows(source: Source, seed: int) -> Preferences:
    if source.kind == "dmpo_released":
        return load_released(source.path, source.released_negatives, source.prompts)
    return load_sdpo(source.path, seed) if source.kind == "sdpo" else load_preferences(source.path, seed)


def _preference_rows(preferences: Preferences, split: str) -> list[dict[str, Any]]:
    return [
        {
            "user": f"{split}-{number}",  # rows are independent: each is its own user in bootstraps
            "timestamp": 0,
            "history": [] if group.prompt is not None else list(group.history),
            "history_items": list(group.history),
            "positive": group.chosen,
            "positive_item": group.titles[0] if group.titles else "",
            "negatives": list(group.rejected),
            "negative_items": list(group.titles[1:]),
            "oracle": [],
            "prompt": group.prompt,
        }
        for number, group in enumerate(preferences.splits[split], start=1)
    ]


def _card(
    config: DataConfig, seed: int, name: str, notes: list[str], rows: Rows, tables: dict[str, pd.DataFrame]
) -> dict[str, Any]:
    """What ``dataset.json`` holds, but for the cuts and drops of a log."""
    return {
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


def _write(output: Path, rows: Rows, tables: dict[str, pd.DataFrame], card: dict[str, Any]) -> None:
    """Write a sibling folder and rename it, so that ``output`` is never half there."""
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        with _quiet():
            for split in (split for split in SPLITS if rows[split]):  # ``datasets`` cannot read an empty one back
                columns = {name: [row[name] for row in rows[split]] for name in ROW_FEATURES}
                Dataset.from_dict(columns, features=ROW_FEATURES).save_to_disk(str(partial / split))
        for name, table in tables.items():
            table.to_parquet(partial / f"{name}.parquet", index=False)
        (partial / "dataset.json").write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (partial / "card.md").write_text(data_card(card), encoding="utf-8")
        partial.rename(output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error}); choose another data.path") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of ``datasets`` for writes that take a moment."""
    were_disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()
