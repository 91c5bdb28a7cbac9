"""From a source to a folder of preference groups: read, split, draw negatives, write."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from dmpo_dist.config.data import DataConfig, Source
from dmpo_dist.data.card import summary
from dmpo_dist.data.folder import checked_for_leaks, make_card, require_free, write_folder
from dmpo_dist.data.groups import core, groups_of_log
from dmpo_dist.data.sources.preferences import Preferences, load_preferences
from dmpo_dist.data.sources.read import READY_ROWS, load_interactions
from dmpo_dist.data.sources.released import load_released, load_sdpo
from dmpo_dist.data.splits import SPLITS
from dmpo_dist.data.store import PreparedData


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
    if config.stream:
        from dmpo_dist.data.streaming import prepare_stream

        prepare_stream(config, seed, output, echo, allow_leaks)
        return PreparedData.load(output)
    tables: dict[str, pd.DataFrame] = {}
    if config.source.kind in READY_ROWS:
        preferences = _ready_rows(config.source, seed)
        rows = {split: _preference_rows(preferences, split) for split in SPLITS}
        titles = preferences.catalogue()
        if titles is not None:
            tables["items"] = pd.DataFrame({"item": titles, "title": titles, "genres": ""})
        card = make_card(config, seed, preferences.name, preferences.notes, rows, tables)
        card.users, card.shown_at = preferences.users(), preferences.shown_at()
    else:
        log = core(load_interactions(config.source, seed), config.k_core)
        rows, facts, notes = groups_of_log(log, config, seed)
        tables = {"items": log.items, "interactions": log.events}
        card = make_card(config, seed, log.name, [*log.notes, *notes], rows, tables, facts)
    for note in card.notes:
        echo(note)
    card.leaks = checked_for_leaks(rows, tables.get("interactions"), card, echo, allow_leaks)
    echo(summary(card))
    write_folder(output, rows, tables, card)
    return PreparedData.load(output)


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
