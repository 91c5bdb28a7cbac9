"""From a log to rows of preference groups: requests, negatives, titles."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from dmpo_dist.config.data import DataConfig
from dmpo_dist.data.card import moment
from dmpo_dist.data.negatives import NegativeSampler
from dmpo_dist.data.schema import Interactions
from dmpo_dist.data.sources.simulator import LIKE
from dmpo_dist.data.splits import SPLITS, Requests, find_requests, k_core, time_cuts
from dmpo_dist.errors import UserError

Rows = dict[str, list[dict[str, Any]]]  # split -> rows with the columns of ``ROW_FEATURES``


def core(log: Interactions, k: int) -> Interactions:
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


def groups_of_log(log: Interactions, config: DataConfig, seed: int) -> tuple[Rows, dict[str, Any], list[str]]:
    """Rows by split, what the card says about the cuts and drops, and notes."""
    cuts = None
    if config.split == "time":
        cuts = time_cuts(log.events["timestamp"].to_numpy(), config.validation_quantile, config.test_quantile)
    requests = requests_of(log.events, cuts, config)
    require_groups(
        {split: (len(found.table), found.dropped) for split, found in requests.items()},
        len(log.events),
        log.events["user"].nunique(),
        int((log.events["rating"] >= config.rating_threshold).sum()),
        config,
    )
    sampler = NegativeSampler(
        log.events, config.rating_threshold, seed, config.popularity_exponent, requests["train"].table["item"].tolist()
    )
    asked = requests["train"].table
    requests = with_enough_candidates(requests, sampler, config)
    if requests["train"].table.empty:  # let the request with the most to choose from say what is missing
        pairs = list(zip(asked["user"], asked["timestamp"], strict=True))
        best = max(pairs, key=lambda pair: sampler.available_for_training(config.negatives, *pair))
        sampler.training(config.negatives, *best, config.negatives_per_group)
    requests["validation"] = _sampled(requests["validation"], config.max_validation_users, seed)
    title = dict(zip(log.items["item"], log.items["title"], strict=True))
    score = _oracle_scores(log)
    rows = {split: log_rows(requests[split], split, title, sampler, config, score) for split in SPLITS}
    return rows, facts_of(cuts, {split: requests[split].dropped for split in SPLITS}), _notes(log, config)


def requests_of(
    events: pd.DataFrame, cuts: tuple[int, int] | None, config: DataConfig, first_seen: pd.Series | None = None
) -> dict[str, Requests]:
    """``find_requests`` under the configuration."""
    return find_requests(
        events,
        cuts,
        rating_threshold=config.rating_threshold,
        min_history=config.min_history,
        max_history=config.max_history,
        train_requests_per_user=config.train_requests_per_user,
        first_seen=first_seen,
        unseen_positives=config.evaluation_candidates == "all",
    )


def evaluated_until(config: DataConfig, timestamp: int) -> int | None:
    """Evaluation candidates are items taken before this time: the request's, or None for whenever."""
    return None if config.evaluation_candidates == "all" else timestamp


def facts_of(cuts: tuple[int, int] | None, dropped: dict[str, dict[str, int]]) -> dict[str, Any]:
    """What the card says about the cuts and drops."""
    return {
        "cuts": cuts and {name: moment(cut) for name, cut in zip(SPLITS[1:], cuts, strict=True)},
        "dropped": dropped,
    }


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


def require_groups(
    found: dict[str, tuple[int, dict[str, int]]], n_events: int, n_users: int, n_likes: int, config: DataConfig
) -> None:
    """Stop when a split that must not be empty is, with the count at every stage.

    Args:
        found: split -> requests kept, and why others were dropped.
    """
    empty = [split for split in ("train", "test") if not found[split][0]]
    if not empty:
        return
    lines = [
        f"no {' and no '.join(empty)} requests are left after filtering:",
        f"  {n_events} interactions of {n_users} users",
        f"  {n_likes} likes (rating >= data.rating_threshold={config.rating_threshold:g})",
    ]
    for split in SPLITS:
        kept, dropped = found[split]
        in_period = kept + sum(dropped.values())
        with_history = in_period - dropped["short_history"]
        lines.append(
            f"  {split}: {in_period} likes in its period, {with_history} of them with at least "
            f"data.min_history={config.min_history} likes before, {with_history - dropped['unseen_positive']} of them of an "
            f"item somebody took before, {kept} kept"
        )
    lines.append(
        "loosen data.rating_threshold or data.min_history, or move the cuts data.validation_quantile="
        f"{config.validation_quantile:g} and data.test_quantile={config.test_quantile:g}"
    )
    raise UserError("\n".join(lines))


def with_enough_candidates(
    requests: dict[str, Requests], sampler: NegativeSampler, config: DataConfig
) -> dict[str, Requests]:
    """Drop requests so early in the log that too few items were in the world; in a time split only training ones are."""

    def enough(split: str, user: str, timestamp: int) -> bool:
        if split == "train":
            return sampler.available_for_training(config.negatives, user, timestamp) >= config.negatives_per_group
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


def _sampled(requests: Requests, limit: int | None, seed: int) -> Requests:
    """A seeded sample of at most ``limit`` requests."""
    table = requests.table
    if limit is not None and len(table) > limit:
        kept = np.random.default_rng(seed).choice(len(table), limit, replace=False)
        table = table.iloc[np.sort(kept)].reset_index(drop=True)
    return Requests(table, requests.dropped | {"over_max_validation_users": len(requests.table) - len(table)})


def log_rows(
    requests: Requests,
    split: str,
    title: Mapping[str, str],
    sampler: NegativeSampler,
    config: DataConfig,
    score: Callable[[str, list[str]], list[float]] = lambda user, items: [],
) -> list[dict[str, Any]]:
    """The rows of a split's requests.

    Args:
        title: item -> title.
        score: the oracle's score of a user's candidates, [] where the world is unknown.
    """
    rows = []
    for user, timestamp, positive, history in requests.table.itertuples(index=False, name=None):
        if split == "train":
            negatives = sampler.training(config.negatives, user, timestamp, config.negatives_per_group)
        else:
            negatives = sampler.evaluation(
                user, timestamp, config.evaluation_negatives, evaluated_until(config, timestamp)
            )
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
