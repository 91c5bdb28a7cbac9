"""What becomes of one title as history items are taken away. Pure functions; nothing here knows about models."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

Method = Literal["margin", "log_prob"]
"""How a title's scores become one value; see ``title_values``."""

Removed = frozenset[int]
"""Indices of the history items that are taken away."""

Score = Callable[[Sequence[Removed]], np.ndarray]
"""n sets of removed items -> (n, R) scores of a request's R candidates without them."""

Values = Callable[[Sequence[Removed]], np.ndarray]
"""n sets of removed items -> (n,) value of the explained title without them."""


def title_values(scores: np.ndarray, item: int, method: Method) -> np.ndarray:
    """(n, R) candidate scores s -> (n,) value of candidate ``item``.

    ``margin`` is s_item - mean over the R - 1 others of s: how far the title stands above the rest. ``log_prob`` is
    s_item alone, which also moves with how likely any title is after such a prompt.

    Raises:
        ValueError: a margin over no other candidate.
    """
    own = scores[:, item]
    if method == "log_prob":
        return own
    others = scores.shape[1] - 1
    if not others:
        raise ValueError("a margin needs a second candidate")
    return own - np.delete(scores, item, axis=1).mean(axis=1)


def title_ranks(scores: np.ndarray, item: int) -> np.ndarray:
    """(n, R) candidate scores -> (n,) int64, 1 + how many candidates score higher than ``item``."""
    return 1 + (scores > scores[:, [item]]).sum(axis=1)


def rivals(scores: np.ndarray, item: int, below: int) -> list[int]:
    """Ascending indices of ``item``, of all candidates (R,) that score higher or the same, and of the next ``below``.

    Its rank among them is its rank among all, and with other scores too, unless a title from further below overtakes.
    """
    behind = np.flatnonzero(scores < scores[item])
    nearest = behind[np.argsort(-scores[behind], kind="stable")[:below]]
    return np.sort(np.concatenate([np.flatnonzero(scores >= scores[item]), nearest])).tolist()


class Outcomes:
    """Values and ranks of one title under removals; each set is scored once.

    Args:
        score: scores the candidates of one request.
        item: the title's index among them.
        method: see ``title_values``.
    """

    def __init__(self, score: Score, item: int, method: Method) -> None:
        self._score, self._item, self._method = score, item, method
        self._known: dict[Removed, tuple[float, int]] = {}

    def values(self, removed: Sequence[Removed]) -> np.ndarray:
        """(n,) float64; of ``Values``."""
        self._require(removed)
        return np.array([self._known[one][0] for one in removed])

    def ranks(self, removed: Sequence[Removed]) -> np.ndarray:
        """(n,) int64, see ``title_ranks``."""
        self._require(removed)
        return np.array([self._known[one][1] for one in removed], dtype=np.int64)

    def _require(self, removed: Sequence[Removed]) -> None:
        new = [one for one in dict.fromkeys(removed) if one not in self._known]
        if not new:
            return
        scores = self._score(new)
        values, ranks = title_values(scores, self._item, self._method), title_ranks(scores, self._item)
        self._known |= dict(zip(new, zip(values.tolist(), ranks.tolist(), strict=True), strict=True))


def singles(items: int) -> list[Removed]:
    """Every history of ``items`` items without one of them."""
    return [frozenset([index]) for index in range(items)]


def leave_one_out(values: Values, items: int) -> np.ndarray:
    """(items,) contributions c_i = v(history) - v(history without i): a positive one speaks for the title."""
    whole, *without = values([frozenset(), *singles(items)])
    return whole - np.array(without)
