"""The requests of a log, split by global time or per user: a like, and the user's likes strictly before it."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from dmpo_dist.data.levels import next_likes

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Requests:
    """The requests of one split, and how many likes gave none.

    Attributes:
        table: columns ``user``, ``timestamp``, ``item`` (the positive) and ``history`` (list of items, oldest first),
            sorted by (timestamp, user); with levels, training requests also have ``likes``, see ``next_likes``.
        dropped: reason -> number of likes in the split's period that gave no request. These numbers and ``len(table)``
            add up to all likes of the period.
    """

    table: pd.DataFrame
    dropped: dict[str, int]


def time_cuts(timestamps: np.ndarray, validation_quantile: float, test_quantile: float) -> tuple[int, int]:
    """The first timestamps of validation and of test: quantiles of the timestamps of all events."""
    cuts = np.quantile(timestamps, [validation_quantile, test_quantile], method="higher")
    return int(cuts[0]), int(cuts[1])


def likes(events: pd.DataFrame, rating_threshold: float) -> pd.DataFrame:
    """The events with a rating at or above the threshold."""
    return events[events["rating"] >= rating_threshold]


def find_requests(
    events: pd.DataFrame,
    cuts: tuple[int, int] | None,
    *,
    rating_threshold: float,
    min_history: int,
    max_history: int,
    train_requests_per_user: int,
    first_seen: pd.Series | None = None,
    unseen_positives: bool = False,
    levels: Literal["none", "ratings", "repeats"] = "none",
    level_likes: int = 0,
) -> dict[str, Requests]:
    """The requests of each split, from the whole log.

    A request is a like. Its history is the user's ``max_history`` latest likes strictly before it. Requests are dropped

    - with fewer than ``min_history`` earlier likes (``short_history``),
    - of an item that nobody had interacted with strictly before (``unseen_positive``),
    - where the user has enough requests (``over_limit``): training (t < cuts[0]) keeps a user's latest
      ``train_requests_per_user``, validation (cuts[0] <= t < cuts[1]) and test (t >= cuts[1]) keep the first,
    - with leave-one-out, in training at the time of a held-out request, whose history they share (``same_moment``).

    Args:
        events: columns user, item, rating, timestamp; any order.
        cuts: None is leave-one-out: a user's last like is the test request, the one before it validation, whatever
            others do later.
        first_seen: item -> the first time anybody took it; needed where ``events`` holds only some of the users.
        unseen_positives: keep validation and test requests for items that nobody had taken before.
        levels, level_likes: what training requests rank, see ``DataConfig``.
    """
    if first_seen is None:
        first_seen = events.groupby("item")["timestamp"].min()
    table = _like_table(events, rating_threshold, max_history, first_seen)
    # period: (n_likes,) 0, 1, 2 for training, validation, test
    if cuts is None:
        # Counted from a user's last like: 0 is the test request, 1 the validation request, all others are training.
        period = 2 - np.minimum(table.groupby("user", sort=False).cumcount(ascending=False).to_numpy(), 2)
        held_out = table[period > 0].groupby("user")["timestamp"].min()
        at_once = (period == 0) & (table["timestamp"] == table["user"].map(held_out)).to_numpy()
        table = table.assign(same_moment=at_once)
    else:
        period = np.searchsorted(np.array(cuts), table["timestamp"].to_numpy(), side="right")
    requests = {}
    for number, split in enumerate(SPLITS):
        keep = "latest" if split == "train" else "first"
        limit = train_requests_per_user if split == "train" else 1
        chosen, dropped = _choose(
            table[period == number], min_history, keep, limit, unseen_positives and split != "train"
        )
        requests[split] = Requests(_with_history(chosen, table["item"].to_numpy()), dropped)
        if split == "train" and levels != "none":
            known_since = table["item"].map(first_seen).to_numpy()
            usable = period == number
            if "same_moment" in table:  # as the held-out like: neither before nor after it
                usable &= ~table["same_moment"].to_numpy(bool)
            ranked = next_likes(chosen, table, usable, known_since, levels, level_likes)
            requests[split] = Requests(_with_history(chosen.assign(likes=ranked), table["item"].to_numpy()), dropped)
    return requests


def _like_table(events: pd.DataFrame, rating_threshold: float, max_history: int, first_seen: pd.Series) -> pd.DataFrame:
    """All likes sorted by (user, timestamp, item), with what was known strictly before each.

    Added columns: ``n_before``, the number of the user's earlier likes; ``history_start`` and ``history_stop``, the
    range of rows of the table that are its history; ``seen``, whether somebody interacted with the item before.
    """
    table = likes(events, rating_threshold).sort_values(["user", "timestamp", "item"], ignore_index=True)
    user = pd.factorize(table["user"])[0]
    timestamp = table["timestamp"].to_numpy()
    user_start = _block_start(np.diff(user) != 0, len(table))
    # Likes of the same second are not in each other's history: it stops at the first like of that second.
    tie_start = _block_start((np.diff(user) != 0) | (np.diff(timestamp) != 0), len(table))
    return table.assign(
        n_before=tie_start - user_start,
        history_start=np.maximum(user_start, tie_start - max_history),
        history_stop=tie_start,
        seen=table["item"].map(first_seen).to_numpy() < timestamp,
        same_moment=False,
    )


def _block_start(changes: np.ndarray, length: int) -> np.ndarray:
    """For each of ``length`` rows the first row of its block; ``changes[i]`` says that a block starts at row i + 1."""
    starts = np.zeros(length, dtype=np.int64)
    starts[1:] = np.where(changes, np.arange(1, length), 0) if length else 0
    return np.maximum.accumulate(starts)


def _choose(
    table: pd.DataFrame, min_history: int, keep: str, limit: int, unseen: bool
) -> tuple[pd.DataFrame, dict[str, int]]:
    """The likes of a split that become requests, and the number of the others by reason."""
    long_enough = table[table["n_before"] >= min_history]
    eligible = long_enough if unseen else long_enough[long_enough["seen"]]
    apart = eligible[~eligible["same_moment"]]
    by_user = apart.groupby("user", sort=False)
    chosen = by_user.head(limit) if keep == "first" else by_user.tail(limit)
    dropped = {
        "short_history": len(table) - len(long_enough),
        "unseen_positive": len(long_enough) - len(eligible),
        "over_limit": len(apart) - len(chosen),
    }
    if len(apart) < len(eligible):
        dropped["same_moment"] = len(eligible) - len(apart)
    return chosen, dropped


def _with_history(chosen: pd.DataFrame, liked_items: np.ndarray) -> pd.DataFrame:
    spans = zip(chosen["history_start"], chosen["history_stop"], strict=True)
    history = pd.Series([liked_items[a:b].tolist() for a, b in spans], index=chosen.index, dtype=object)
    table = chosen[["user", "timestamp", "item", *chosen.columns.intersection(["likes"])]].assign(history=history)
    return table.sort_values(["timestamp", "user", "item"], ignore_index=True)
