"""Levels of a training request: the like it asks for and the user's next likes, ranked by rating or by repetition."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

Valued = tuple[str, float]
"""An item and what it is ranked by."""


def next_likes(
    chosen: pd.DataFrame,
    table: pd.DataFrame,
    in_training: np.ndarray,
    known_since: np.ndarray,
    by: Literal["ratings", "repeats"],
    limit: int,
) -> pd.Series:
    """For each of the ``chosen`` rows of ``table`` at most ``limit`` distinct (item, value), the row's own first.

    The others are the user's likes of the same moment and later ones, in order of time. They lie in the training
    period, and somebody had taken them before the request, as is asked of every candidate.

    Args:
        table: likes sorted by user and time, with the columns user, item, rating, timestamp and ``history_stop``, the
            first row of the like's moment.
        in_training: (n_likes,) whether a like lies in the training period, which a user's first likes do.
        known_since: (n_likes,) the first time anybody took the item.
        by: value is the like's rating, or how often the user likes the item from the request on.
    """
    items, ratings = table["item"].to_numpy(), table["rating"].to_numpy()
    users = pd.factorize(table["user"])[0]
    inside = np.flatnonzero(in_training)
    stops = dict(zip(users[inside].tolist(), (inside + 1).tolist(), strict=True))  # user -> after the last such like
    found = []
    for row, time, start in zip(chosen.index, chosen["timestamp"], chosen["history_stop"], strict=True):
        rows = [row, *(other for other in range(start, stops[users[row]]) if other != row)]
        times = Counter(items[rows].tolist()) if by == "repeats" else {}
        likes: dict[str, float] = {}
        for other in rows:
            if len(likes) == limit:
                break
            if known_since[other] < time:
                likes.setdefault(items[other], float(times[items[other]] if times else ratings[other]))
        found.append(list(likes.items()))
    return pd.Series(found, index=chosen.index, dtype=object)


@dataclass(frozen=True)
class Ranked:
    """Items in levels, best first.

    Attributes:
        items: the likes, those of higher value first.
        levels, scores: of each item, then of each negative.
    """

    items: list[str]
    levels: list[int]
    scores: list[float]


def ranked(likes: Sequence[Valued], negatives: int, decay: float, unseen: float, places: int) -> Ranked:
    """The levels of ``likes``, in order of time, and of as many ``negatives``, which are the last.

    One like makes one positive and K negatives, whose levels are []. A score is the value over (1 + place) ** ``decay``
    (arXiv 2506.02261), where the first like stands at place 0; a negative has the value ``unseen`` at ``places``.
    """
    values = sorted({value for _, value in likes}, reverse=True)
    order = sorted(range(len(likes)), key=lambda place: (-likes[place][1], place))
    levels = [values.index(likes[place][1]) for place in order]
    scores = [likes[place][1] / (1 + place) ** decay for place in order]
    return Ranked(
        [likes[place][0] for place in order],
        [*levels, *[len(values)] * negatives] if len(likes) > 1 else [],
        [*scores, *[unseen / (1 + places) ** decay] * negatives],
    )
