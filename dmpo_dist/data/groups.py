"""From a log to rows of preference groups: requests, negatives, titles."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset, concatenate_datasets

from dmpo_dist.config.data import DataConfig
from dmpo_dist.data.card import moment
from dmpo_dist.data.levels import Valued, ranked
from dmpo_dist.data.log import Log, Score
from dmpo_dist.data.negatives import NegativeSampler
from dmpo_dist.data.splits import SPLITS, Requests, find_requests
from dmpo_dist.data.store import dataset_of, on_disk
from dmpo_dist.errors import UserError

COLUMNS = ("user", "timestamp", "item", "history")
ENOUGH_GROUPS = 10_000
"""Training groups for which ``data.train_requests_per_user=auto`` takes as many requests of a user as needed."""


@dataclass
class _Found:
    """The preference groups found in the shares of a log (a share is a part of the users).

    Attributes:
        pieces: split -> the rows of each share that has any.
        asked: split -> number of requests ``kept`` before candidates were counted, and of likes dropped, by reason.
        dropped: split -> number of likes dropped in the end, by reason.
        spared: for each training group, how many items were left out of its negatives as its user takes them later.
        shortages: for each share without a training group that has enough negatives, the most negatives that one of
            its requests can have, and the error that says so.
    """

    pieces: dict[str, list[Dataset]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    asked: dict[str, Counter[str]] = field(default_factory=lambda: {split: Counter() for split in SPLITS})
    dropped: dict[str, Counter[str]] = field(default_factory=lambda: {split: Counter() for split in SPLITS})
    spared: list[int] = field(default_factory=list)
    shortages: list[tuple[int, UserError]] = field(default_factory=list)


def groups_of_log(
    log: Log, config: DataConfig, seed: int, work: Path, echo: Callable[[str], None]
) -> tuple[dict[str, Dataset], dict[str, Any]]:
    """Rows by split, and the entries ``cuts`` and ``dropped`` of the data card.

    Args:
        work: a folder that must exist as long as the rows are used: rows of a log in several shares are read from it.
        echo: is called with a line of progress for each of several shares.

    Raises:
        UserError: no training or test request is left, or negatives run out, or are to be dislikes and there are none.
    """
    if config.negatives == "dislikes" and not log.count(f"CASE WHEN rating < {config.rating_threshold} THEN 1 END"):
        raise UserError(
            f"data.negatives=dislikes, but no rating of {log.name} lies below data.rating_threshold="
            f"{config.rating_threshold:g}, so that all negatives would be uniform; set data.negatives=uniform"
        )
    cuts = log.cuts(config.validation_quantile, config.test_quantile) if config.split == "time" else None
    found = _find_groups(log, cuts, config, seed, work, echo)
    require_groups(found.asked, log, config)
    if not found.pieces["train"]:
        raise max(found.shortages, key=lambda shortage: shortage[0])[1]
    if config.levels != "none":
        several = sum(any(levels) for piece in found.pieces["train"] for levels in piece["levels"][:])
        log.notes.append(
            f"data.levels={config.levels}: {several} of {sum(map(len, found.pieces['train']))} training groups rank "
            "several likes; in the others nothing that was known follows before the cut."
        )
    if config.split == "leave_one_out":
        log.notes.append(
            f"No training negative is an item that its user takes later: there were {sum(found.spared)} of those to "
            f"leave out, in {np.count_nonzero(found.spared)} of {len(found.spared)} groups."
        )
    rows = {split: _in_order(found.pieces[split], work / f"{split}.arrow") for split in SPLITS}
    limits = {"validation": config.max_validation_users, "test": config.max_test_users}
    for split, limit in limits.items():
        rows[split], left_out = _sampled(rows[split], limit, seed)
        if split == "validation" or left_out:
            found.dropped[split][f"over_max_{split}_users"] = left_out
    return rows, {
        "cuts": cuts and {name: moment(cut) for name, cut in zip(SPLITS[1:], cuts, strict=True)},
        "dropped": {split: dict(found.dropped[split]) for split in SPLITS},
    }


def _find_groups(
    log: Log, cuts: tuple[int, int] | None, config: DataConfig, seed: int, work: Path, echo: Callable[[str], None]
) -> _Found:
    """The rows of all shares, one share at a time; with several shares the rows are kept on disk."""
    found = _Found()
    per_user = requests_per_user(log, cuts, config)
    world = log.world(with_log=config.negatives == "popularity")
    title = dict(zip(log.items["item"], log.items["title"], strict=True))
    for number in range(log.shares):
        events = log.share(number)
        requests = find_requests(
            events,
            cuts,
            rating_threshold=config.rating_threshold,
            min_history=config.min_history,
            max_history=config.max_history,
            train_requests_per_user=per_user,
            first_seen=pd.Series(world.first_seen, index=world.names),
            unseen_positives=config.evaluation_candidates == "all",
            levels=config.levels,
            level_likes=config.level_likes,
        )
        training = requests["train"].table
        sampler = NegativeSampler(
            events,
            config.rating_threshold,
            seed,
            config.popularity_exponent,
            training["item"].tolist(),
            world,
            spare_later=config.split == "leave_one_out",
        )
        kept = with_enough_candidates(requests, sampler, config)
        if len(training) and not len(kept["train"].table):
            found.shortages.append(sampler.shortage(config.negatives, training, _drawn(config)))
        pairs = zip(kept["train"].table["user"], kept["train"].table["timestamp"], strict=True)
        found.spared += [sampler.spared(user, timestamp) for user, timestamp in pairs]
        for split in SPLITS:
            found.asked[split].update({"kept": len(requests[split].table), **requests[split].dropped})
            found.dropped[split].update(kept[split].dropped)
            if len(kept[split].table):
                rows = dataset_of(log_rows(kept[split], split, title, sampler, config, log.score))
                found.pieces[split].append(rows if log.shares == 1 else on_disk(rows, work / split / str(number)))
        if log.shares > 1:
            echo(f"share {number + 1} of {log.shares} of the users: {len(events):,} interactions")
    return found


def requests_per_user(log: Log, cuts: tuple[int, int] | None, config: DataConfig) -> int:
    """``data.train_requests_per_user``; for auto the fewest that make ``ENOUGH_GROUPS``, or all, with a note of it."""
    if config.train_requests_per_user != "auto":
        return config.train_requests_per_user
    likes = log.training_likes(config.rating_threshold, cuts[0] if cuts else None)
    eligible = np.maximum(likes - config.min_history, 0)  # (n_users,) likes with enough others before
    users_with = np.cumsum(np.bincount(eligible)[::-1])[::-1][1:]  # how many have at least 1, 2, ... of them
    if not len(users_with):
        return 1  # no group at all, which is refused with the reasons
    totals = np.cumsum(users_with)  # how many groups up to 1, 2, ... of each user make
    chosen = min(int(np.searchsorted(totals, ENOUGH_GROUPS)) + 1, len(totals))
    log.notes.append(
        f"data.train_requests_per_user=auto takes up to {chosen} training requests of a user: {totals[chosen - 1]} of "
        f"{totals[-1]} likes with a long enough history."
    )
    return chosen


def _in_order(pieces: list[Dataset], file: Path) -> Dataset:
    """The rows of all shares in the order of a log in one share; only the sort keys are held in memory."""
    if not pieces:
        return dataset_of([])
    if len(pieces) == 1:
        return pieces[0]
    rows = concatenate_datasets(pieces)
    keys = rows.select_columns(["timestamp", "user"]).to_pandas()
    order = keys.sort_values(["timestamp", "user"], kind="stable").index.to_numpy()  # a user's rows are in one share
    return rows.select(order).flatten_indices(cache_file_name=str(file))


def _sampled(rows: Dataset, limit: int | None, seed: int) -> tuple[Dataset, int]:
    """A seeded sample of at most ``limit`` rows, and the number of rows left out."""
    if limit is None or len(rows) <= limit:
        return rows, 0
    kept = np.random.default_rng(seed).choice(len(rows), limit, replace=False)
    return rows.select(np.sort(kept)).flatten_indices(), len(rows) - limit


def evaluated_until(config: DataConfig, timestamp: int) -> int | None:
    """The time before which evaluation candidates must have been taken by somebody; None for any time."""
    return None if config.evaluation_candidates == "all" else timestamp


def require_groups(asked: Mapping[str, Mapping[str, int]], log: Log, config: DataConfig) -> None:
    """Raise UserError where training or test has no request, with the number of likes left by every filter.

    Args:
        asked: split -> number of requests ``kept``, and of likes dropped by reason.
    """
    empty = [split for split in ("train", "test") if not asked[split]["kept"]]
    if not empty:
        return
    likes = log.count(f"CASE WHEN rating >= {config.rating_threshold} THEN 1 END")
    lines = [
        f"no {' and no '.join(empty)} requests are left after filtering:",
        f"  {log.count()} interactions of {log.count('DISTINCT user')} users",
        f"  {likes} likes (rating >= data.rating_threshold={config.rating_threshold:g})",
    ]
    for split in SPLITS:
        counts = asked[split]
        in_period = sum(counts.values())
        with_history = in_period - counts["short_history"]
        lines.append(
            f"  {split}: {in_period} likes in its period, {with_history} of them with at least "
            f"data.min_history={config.min_history} likes before, {with_history - counts['unseen_positive']} of them "
            f"of an item somebody took before, {counts['kept']} kept"
        )
    lines.append(
        "loosen data.rating_threshold or data.min_history, or move the cuts data.validation_quantile="
        f"{config.validation_quantile:g} and data.test_quantile={config.test_quantile:g}"
    )
    raise UserError("\n".join(lines))


def with_enough_candidates(
    requests: dict[str, Requests], sampler: NegativeSampler, config: DataConfig
) -> dict[str, Requests]:
    """Drop requests that cannot have enough negatives, from training and, with leave-one-out, from every split."""

    def enough(split: str, user: str, timestamp: int) -> bool:
        if split == "train":
            return sampler.available_for_training(config.negatives, user, timestamp) >= _drawn(config)
        return sampler.available_for_evaluation(user, evaluated_until(config, timestamp)) >= config.evaluation_negatives

    kept = {}
    for split, found in requests.items():
        kept[split] = found
        if split == "train" or config.split == "leave_one_out":
            pairs = zip(found.table["user"], found.table["timestamp"], strict=True)
            mask = np.array([enough(split, user, t) for user, t in pairs], dtype=bool)
            dropped = found.dropped | {"few_candidates": int((~mask).sum())}
            kept[split] = Requests(found.table[mask].reset_index(drop=True), dropped)
    return kept


def log_rows(
    requests: Requests,
    split: str,
    title: Mapping[str, str],
    sampler: NegativeSampler,
    config: DataConfig,
    score: Score,
) -> list[dict[str, Any]]:
    """The rows of a split's requests.

    Args:
        title: item -> title.
        score: the oracle's score of a user's candidates, [] where the world is unknown.
    """
    table, rows = requests.table, []
    likes = table["likes"] if "likes" in table else [None] * len(table)
    for request, of_request in zip(zip(*(table[c] for c in COLUMNS), strict=True), likes, strict=True):
        user, timestamp, positive, history = request
        if split == "train":
            negatives = sampler.training(config.negatives, user, timestamp, _drawn(config))
        else:
            negatives = sampler.evaluation(
                user, timestamp, config.evaluation_negatives, evaluated_until(config, timestamp)
            )
        others, levels = negatives, {}
        if of_request is not None:
            positive, others, levels = _in_levels(of_request, negatives, config)
        assert positive not in others, "a positive was drawn as its own negative"
        rows.append(
            {
                "user": user,
                "timestamp": timestamp,
                "history": [title[item] for item in history],
                "history_items": history,
                "positive": title[positive],
                "positive_item": positive,
                "negatives": [title[item] for item in others],
                "negative_items": others,
                "oracle": score(user, [positive, *others]),
                "prompt": None,
            }
            | levels
        )
    return rows


def _drawn(config: DataConfig) -> int:
    """How many negatives are drawn for a training request: as many more as likes of it may be among them."""
    return config.negatives_per_group + (config.level_likes - 1 if config.levels != "none" else 0)


def _in_levels(
    likes: Sequence[Valued], drawn: Sequence[str], config: DataConfig
) -> tuple[str, list[str], dict[str, list[Any]]]:
    """The positive, all other items level by level, and the columns of ``LEVEL_FEATURES`` of a training request."""
    liked = {item for item, _ in likes}
    negatives = [item for item in drawn if item not in liked][: config.negatives_per_group]
    found = ranked(likes, len(negatives), config.score_decay, config.unseen_score, config.level_likes)
    return found.items[0], [*found.items[1:], *negatives], {"levels": found.levels, "scores": found.scores}
