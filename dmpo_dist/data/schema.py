"""The two tables everything starts from, and the row everything is made into."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Interactions:
    """A log of who took what, when.

    Attributes:
        events: columns ``user`` (str), ``item`` (str), ``rating`` (float), ``timestamp`` (int, seconds), sorted by
            (timestamp, user, item), at most one row per (user, item).
        items: columns ``item`` (str, unique), ``title`` (str, unique), ``genres`` (str, "" where unknown).
        name: what the data is called in cards and reports.
        notes: what reading changed or skipped, one sentence each, for the data card.
        oracle: where the world is known, (n_users, n_items) log-probability, up to a constant per user, that the user's
            next like is the item; aligned with ``oracle_users`` and ``items``; candidates ranked by it are the best
            possible ranking.
        oracle_users: row -> user of ``oracle``.
    """

    events: pd.DataFrame
    items: pd.DataFrame
    name: str
    notes: list[str] = field(default_factory=list)
    oracle: np.ndarray | None = None
    oracle_users: list[str] | None = None


@dataclass(frozen=True)
class PreferenceGroup:
    """One prompt with one positive and K negative responses (titles), or with responses in levels.

    ``history`` holds titles, oldest first. ``prompt`` is set for rows that come with a finished prompt
    (TRL's preference format); the template is then not applied and ``history`` is empty.

    Attributes:
        levels: of the positive, then of each of ``negatives``, which holds all other responses: 0, the best, to the
            last in ascending order; () for one positive and K negatives.
        scores: of the same, how much each is preferred; () where that is not known.
    """

    user: str
    timestamp: int
    history: tuple[str, ...]
    positive: str
    negatives: tuple[str, ...]
    prompt: str | None = None
    levels: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()

    def taking(self, columns: Sequence[int]) -> "PreferenceGroup":
        """The group with these of its responses alone, counted from the positive, which is 0 and comes first."""
        responses = (self.positive, *self.negatives)
        return replace(
            self,
            positive=responses[columns[0]],
            negatives=tuple(responses[column] for column in columns[1:]),
            levels=tuple(self.levels[column] for column in columns) if self.levels and len(columns) > 1 else (),
            scores=tuple(self.scores[column] for column in columns) if self.scores else (),
        )


def above_last(levels: Sequence[int]) -> int:
    """How many responses stand above the last level, whose responses are the negatives; 1 where there are no levels."""
    return len(levels) - levels.count(levels[-1]) if levels else 1
