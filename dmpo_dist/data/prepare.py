"""From a source to a folder of preference groups: read, split, draw negatives, write."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from dmpo_dist.artifacts.dataset import DatasetCard
from dmpo_dist.artifacts.files import whole_folder
from dmpo_dist.config.data import DataConfig, Source
from dmpo_dist.data.card import summary
from dmpo_dist.data.database import Database
from dmpo_dist.data.folder import (
    CHECKED_ROWS,
    checked_for_leaks,
    make_card,
    require_free,
    sample_rows,
    write_rows,
)
from dmpo_dist.data.groups import groups_of_log
from dmpo_dist.data.log import open_log
from dmpo_dist.data.sources.kinds import with_kind
from dmpo_dist.data.sources.preferences import Preferences, load_preferences
from dmpo_dist.data.sources.read import READY_ROWS, read_users
from dmpo_dist.data.sources.released import load_released, load_sdpo
from dmpo_dist.data.splits import SPLITS
from dmpo_dist.data.store import INTERACTIONS_FILE, PreparedData, dataset_of

KEYS_OF_READY_ROWS = (
    "path", "source", "max_validation_users", "max_test_users", "shots", "shots_seed", "shots_skip",
)  # fmt: skip
"""Keys of ``data`` that count for rows which need no requests and negatives found."""


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
    require_free(output)
    config = with_kind(config, echo)
    with whole_folder(output) as folder:
        if config.source.kind in READY_ROWS:
            _prepare_ready_rows(config, seed, folder, echo, allow_leaks)
        else:
            _prepare_log(config, seed, folder, echo, allow_leaks)
    return PreparedData.load(output)


def _prepare_ready_rows(
    config: DataConfig, seed: int, folder: Path, echo: Callable[[str], None], allow_leaks: bool
) -> None:
    preferences = _ready_rows(config.source, seed)
    titles, items = preferences.catalogue(), None
    limits = {"validation": config.max_validation_users, "test": config.max_test_users}
    preferences, left_out = preferences.sampled(limits, seed)
    rows = {split: _preference_rows(preferences, split) for split in SPLITS}
    if titles is not None:
        items = pd.DataFrame({"item": titles, "title": titles, "genres": ""})
    splits = {split: dataset_of(rows[split]) for split in SPLITS}
    card = make_card(config, seed, preferences.name, preferences.notes + _unused(config), splits, items)
    card.dropped |= {split: {f"over_max_{split}_users": number} for split, number in left_out.items()}
    card.users, card.shown_at = preferences.users(), preferences.shown_at()
    for note in card.notes:
        echo(note)
    card.leaks = checked_for_leaks(rows, None, card, echo, allow_leaks)
    write_rows(folder, splits, items, card)
    echo(summary(card))
    _say_shots(config, card, echo)


def _unused(config: DataConfig) -> list[str]:
    """A note of the keys that were given and that only a log has a use for; none where there are none."""
    given = [
        f"data.{name}"
        for name, field in DataConfig.model_fields.items()
        if name not in KEYS_OF_READY_ROWS and getattr(config, name) != field.get_default(call_default_factory=True)
    ]
    if not given:
        return []
    effect = "has no effect" if len(given) == 1 else "have no effect"
    return [f"These rows are ready-made: {', '.join(given)} {effect} on them."]


def _prepare_log(config: DataConfig, seed: int, folder: Path, echo: Callable[[str], None], allow_leaks: bool) -> None:
    start = time.monotonic()
    work = folder / "work"
    work.mkdir()
    users = read_users(config.source)
    with Database(work, config.stream_memory) if config.stream else Database() as database:
        log = open_log(config, seed, database, echo)
        rows, cuts_and_drops = groups_of_log(log, config, seed, work, echo)
        card = make_card(config, seed, log.name, log.notes, rows, log.items, users)
        card = DatasetCard.model_validate(card.content() | {"interactions": True} | cuts_and_drops)
        if config.stream and max(map(len, rows.values())) > CHECKED_ROWS:
            card.notes.append(
                f"Leak check on {CHECKED_ROWS} rows of a split at equal distances, and on their users' events."
            )
        for note in card.notes:
            echo(note)
        checked = {split: sample_rows(rows[split]) if config.stream else rows[split].to_list() for split in SPLITS}
        asked = {row["user"] for part in checked.values() for row in part}
        events = log.events_of(asked) if config.stream else log.share(0)
        card.leaks = checked_for_leaks(checked, events, card, echo, allow_leaks)
        log.write(folder / INTERACTIONS_FILE)
        write_rows(folder, rows, log.items, card, users)
        size = log.count()
    del rows  # their files may be in ``work``
    shutil.rmtree(work)
    echo(summary(card))
    _say_shots(config, card, echo)
    if config.stream:
        seconds = time.monotonic() - start
        echo(f"{size:,} interactions in {seconds:,.0f} s, {size / seconds:,.0f} per second")


def _say_shots(config: DataConfig, card: DatasetCard, echo: Callable[[str], None]) -> None:
    if config.shots is not None:
        groups, few = card.counts["train"], config.shots
        echo(f"note: all {groups} training groups are written; data.shots={few} takes {few} of them when training")


def _ready_rows(source: Source, seed: int) -> Preferences:
    if source.kind == "dmpo_released":
        return load_released(source.path, source.released_negatives, source.prompts, seed, source.category)
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
            "levels": list(group.levels),
            "scores": list(group.scores),
        }
        for number, group in enumerate(preferences.splits[split], start=1)
    ]
