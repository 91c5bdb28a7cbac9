"""Negatives for a request: items that were in the world by then and that the user had not taken.

The random stream of a request depends on (seed, user, timestamp) and never on its positive, so the negatives cannot
tell which item was the target.
"""

import hashlib
from typing import Literal

import numpy as np
import pandas as pd

from dmpo_dist.errors import UserError

Kind = Literal["uniform", "dislikes", "popularity"]
MAX_ROUNDS = 8  # of drawing from the log before ``_by_popularity`` counts the rest exactly


def request_stream(seed: int, user: str, timestamp: int) -> np.random.Generator:
    """The random stream of a request: equal on every machine, and blind to its positive."""
    digest = hashlib.blake2b(f"{seed}\0{user}\0{timestamp}".encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


class NegativeSampler:
    """Draws negatives from a log; items are numbered by (first time anybody took them, name).

    That numbering makes "in the world before t" a range(n), and later events never renumber earlier items.

    Args:
        events: the whole log, columns user, item, rating, timestamp.
        rating_threshold: ratings below it are dislikes.
        seed: seed of all request streams.
    """

    def __init__(self, events: pd.DataFrame, rating_threshold: float, seed: int) -> None:
        first = events.groupby("item")["timestamp"].min().reset_index().sort_values(["timestamp", "item"])
        self._names: np.ndarray = first["item"].to_numpy(dtype=object)
        self._first_seen = first["timestamp"].to_numpy()
        self._seed = seed
        code = pd.Series(np.arange(len(first)), index=first["item"])
        log = events.assign(code=events["item"].map(code)).sort_values(["timestamp", "user", "code"])
        self._log_time = log["timestamp"].to_numpy()
        self._log_code = log["code"].to_numpy()
        self._disliked = (log["rating"] < rating_threshold).to_numpy()
        self._rows_of_user: dict[str, np.ndarray] = log.reset_index(drop=True).groupby("user").indices

    def training(self, kind: Kind, user: str, timestamp: int, count: int) -> list[str]:
        """``count`` distinct items, none of which the user took at or before ``timestamp``, dislikes apart.

        Nothing after the request plays a part: an item the user takes later may be drawn, as at the time it would have been.

        Raises:
            UserError: fewer than ``count`` such items.
        """
        taken = self._taken(user, timestamp)
        rng = request_stream(self._seed, user, timestamp)
        chosen = self._dislikes(user, timestamp, count, rng) if kind == "dislikes" else np.empty(0, dtype=np.int64)
        missing = count - len(chosen)
        self._require(missing, taken, user, timestamp, "data.negatives_per_group")
        draw = self._by_popularity if kind == "popularity" else self._uniform
        return self._names[np.concatenate([chosen, draw(timestamp, missing, taken, rng)])].tolist()

    def evaluation(self, user: str, timestamp: int, count: int) -> list[str]:
        """``count`` distinct items, drawn uniformly, that the user never took, neither before nor after.

        Raises:
            UserError: fewer than ``count`` such items.
        """
        taken = self._taken(user, None)
        self._require(count, taken, user, timestamp, "data.evaluation_negatives")
        drawn = self._uniform(timestamp, count, taken, request_stream(self._seed, user, timestamp))
        return self._names[drawn].tolist()

    def available_for_training(self, kind: Kind, user: str, timestamp: int) -> int:
        """How many negatives ``training`` can give this request at most."""
        dislikes = len(self._dislike_codes(user, timestamp)) if kind == "dislikes" else 0
        return dislikes + self._available(timestamp, self._taken(user, timestamp))

    def _n_known(self, timestamp: int) -> int:
        """Items 0 .. n - 1 were first taken strictly before ``timestamp``."""
        return int(np.searchsorted(self._first_seen, timestamp, side="left"))

    def _taken(self, user: str, until: int | None) -> np.ndarray:
        """Items the user took, at or before ``until`` where given."""
        rows = self._rows_of_user[user]
        if until is not None:
            rows = rows[self._log_time[rows] <= until]
        return self._log_code[rows]

    def _dislike_codes(self, user: str, timestamp: int) -> np.ndarray:
        rows = self._rows_of_user[user]
        return self._log_code[rows[(self._log_time[rows] < timestamp) & self._disliked[rows]]]

    def _dislikes(self, user: str, timestamp: int, count: int, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(self._dislike_codes(user, timestamp))[:count]

    def _available(self, timestamp: int, taken: np.ndarray) -> int:
        n_known = self._n_known(timestamp)
        return n_known - int(np.count_nonzero(taken < n_known))

    def _require(self, count: int, taken: np.ndarray, user: str, timestamp: int, key: str) -> None:
        available = self._available(timestamp, taken)
        if available < count:
            when = pd.Timestamp(timestamp, unit="s").isoformat()
            raise UserError(
                f"user {user!r} at {timestamp} ({when}): {count} negatives are asked for, but only {available} items had "
                f"been seen by then that this user had not taken; lower {key}"
            )

    def _uniform(self, timestamp: int, count: int, taken: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Distinct items, uniform: a random order of enough items, less the taken ones."""
        n_known = self._n_known(timestamp)
        enough = min(n_known, count + int(np.count_nonzero(taken < n_known)))
        order = rng.choice(n_known, enough, replace=False)
        return order[~np.isin(order, taken)][:count]

    def _by_popularity(self, timestamp: int, count: int, taken: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Distinct items, drawn one after the other in proportion to their interactions before ``timestamp``.

        An event drawn uniformly from the log names an item in that proportion; skipping what is taken or drawn already
        leaves the right distribution over the rest. Where the rest is rare, it is counted instead.
        """
        n_events = int(np.searchsorted(self._log_time, timestamp, side="left"))
        chosen: dict[int, None] = {}
        excluded = set(taken.tolist())
        for _ in range(MAX_ROUNDS):
            if len(chosen) >= count:
                break
            for code in self._log_code[rng.integers(n_events, size=2 * count)].tolist():
                if code not in excluded:
                    chosen[code] = None
        if len(chosen) < count:
            weights = np.bincount(self._log_code[:n_events], minlength=self._n_known(timestamp)).astype(float)
            weights[[code for code in (*excluded, *chosen) if code < len(weights)]] = 0.0
            rest = rng.choice(len(weights), count - len(chosen), replace=False, p=weights / weights.sum())
            chosen.update(dict.fromkeys(rest.tolist()))
        return np.fromiter(chosen, dtype=np.int64, count=len(chosen))[:count]
