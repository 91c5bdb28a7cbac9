"""What baselines count and are fitted on: likes, of the whole log or of the users of a few training groups."""

from dataclasses import replace

import numpy as np
import pandas as pd
from datasets import Dataset

from dmpo_dist.config import DataConfig
from dmpo_dist.data.splits import likes
from dmpo_dist.data.store import PreparedData, rows_of


def known_likes(data: PreparedData) -> pd.DataFrame:
    """The likes of the log: what every baseline counts, as training groups are made of likes too.

    Raises:
        ValueError: the data has no log.
    """
    if data.interactions is None:
        raise ValueError(f"{data.path} has no interaction log")
    return likes(data.interactions, data.card.config["rating_threshold"])


def fitting_log(data: PreparedData, split: str) -> pd.DataFrame:
    """The likes that a baseline may know when it ranks ``split`` ("validation" or "test"), in the order of time.

    With a split by time these are all likes strictly before the split's cut. Leave-one-out has no such cut: all likes
    are known except those of a requesting user from the request on, and for validation also those from a user's test
    request on. So a baseline knows later events of other users but none of the user who asks.

    Raises:
        ValueError: the data has no log.
    """
    log = known_likes(data)
    if data.card.cuts is not None:
        return log[log["timestamp"] < data.card.cuts[split].timestamp]
    until = _first_request(data.test)
    if split == "validation":
        earlier = _first_request(data.validation)
        until = earlier.combine(until, min, fill_value=float("inf"))
    return log[log["timestamp"] < log["user"].map(until).fillna(float("inf"))]


def knows_the_future(data: PreparedData) -> bool:
    """Whether ``fitting_log`` holds events from after some requests."""
    return data.card.cuts is None


def of_same_users(data: PreparedData, config: DataConfig) -> PreparedData:
    """``data`` with a log that holds only what ``config.shots`` training groups show a language model.

    These are the likes in their histories and their positives (before a history is cut to fit a context). A baseline
    fitted on it knows of the past what the language model was trained on, and no more.

    Args:
        config: whose ``shots``, ``shots_seed`` and ``shots_skip`` say which groups; without ``shots`` all of them.
    """
    few = data if config.shots is None else data.few(config.shots, config.shots_seed, config.shots_skip)
    shown = pd.DataFrame(
        [
            (row["user"], item, row["timestamp"])
            for row in rows_of(few.train)
            for item in (*row["history_items"], row["positive_item"])
        ],
        columns=["user", "item", "until"],
    )
    log = known_likes(data)
    last = shown.groupby(["user", "item"])["until"].max()
    until = last.reindex(pd.MultiIndex.from_frame(log[["user", "item"]])).fillna(-np.inf).to_numpy()
    return replace(few, interactions=log[log["timestamp"].to_numpy() <= until])


def _first_request(rows: Dataset) -> pd.Series:
    """user -> time of the earliest request."""
    return pd.Series(rows["timestamp"][:], index=rows["user"][:], dtype=float).groupby(level=0).min()
