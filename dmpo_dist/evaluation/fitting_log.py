"""The interactions that a baseline may be fitted on before it ranks the requests of a split."""

import pandas as pd
from datasets import Dataset

from dmpo_dist.data.store import PreparedData


def fitting_log(data: PreparedData, split: str) -> pd.DataFrame:
    """The interactions that a baseline may know when it ranks ``split`` ("validation" or "test"), in the order of time.

    With a split by time these are all interactions strictly before the split's cut. Leave-one-out has no such cut: all
    interactions are known except those of a requesting user from the request on, and for validation also those from a
    user's test request on. So a baseline knows later events of other users but none of the user who asks.

    Raises:
        ValueError: the data has no log.
    """
    log = data.interactions
    if log is None:
        raise ValueError(f"{data.path} has no interaction log")
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


def _first_request(rows: Dataset) -> pd.Series:
    """user -> time of the earliest request."""
    return pd.Series(rows["timestamp"][:], index=rows["user"][:], dtype=float).groupby(level=0).min()
