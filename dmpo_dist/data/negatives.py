"""Negatives for a request: items that somebody had taken before it and that its user had not.

The random stream of a request depends on (seed, user, timestamp) and never on its positive, so the negatives do not
reveal which item is the target.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from dmpo_dist.errors import UserError

Kind = Literal["uniform", "dislikes", "popularity", "in_batch"]
MAX_ROUNDS = 8  # draws from the log before ``_by_popularity`` computes the weights of the rest exactly


def request_stream(seed: int, user: str, timestamp: int, *draw: int) -> np.random.Generator:
    """The random stream of a request: the same on every machine, and independent of the positive.

    ``draw`` tells apart what is drawn for one request at several times.
    """
    key = "\0".join(map(str, (seed, user, timestamp, *draw)))
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


@dataclass(frozen=True)
class World:
    """All items, numbered by (first time anybody took them, name), and the log in order of time.

    With these numbers the items known before a time t are range(n), and later events never renumber earlier items.

    Attributes:
        names: (n_items,) item names.
        first_seen: (n_items,) the first time anybody took each item, ascending.
        log_time, log_code: (n_events,) time and item number of all events, sorted by (time, user, item number); only
            popularity needs them.
    """

    names: np.ndarray
    first_seen: np.ndarray
    log_time: np.ndarray
    log_code: np.ndarray

    @classmethod
    def of(cls, events: pd.DataFrame) -> "World":
        """From a whole log, columns user, item and timestamp."""
        first = events.groupby("item")["timestamp"].min().reset_index().sort_values(["timestamp", "item"])
        names = first["item"].to_numpy(dtype=object)
        log = events.assign(code=codes_of(events["item"], names)).sort_values(["timestamp", "user", "code"])
        return cls(names, first["timestamp"].to_numpy(), log["timestamp"].to_numpy(), log["code"].to_numpy())


def codes_of(items: pd.Series, names: np.ndarray) -> pd.Series:
    """The numbers of ``items`` in ``names``."""
    return items.map(pd.Series(np.arange(len(names)), index=names))


class NegativeSampler:
    """Draws negatives for the users of a log.

    Args:
        events: columns user, item, rating, timestamp; all events of the users to draw for.
        rating_threshold: ratings below it are dislikes.
        seed: seed of all request streams.
        exponent: popularity negatives are drawn in proportion to popularity to this power.
        batch: the positives of all training requests, for in-batch negatives.
        world: all items and the whole log, where ``events`` are only a part of it.
        spare_later: whether training negatives leave out items that the user takes later. Leave-one-out needs this, or
            a user's held-out likes would be drawn as negatives of their training requests. A time split must not use
            it, as it looks ahead.
    """

    def __init__(
        self,
        events: pd.DataFrame,
        rating_threshold: float,
        seed: int,
        exponent: float = 1.0,
        batch: Sequence[str] = (),
        world: World | None = None,
        spare_later: bool = False,
    ) -> None:
        self._world = world or World.of(events)
        self._names, self._first_seen = self._world.names, self._world.first_seen
        self._seed, self._spare_later = seed, spare_later
        log = events.assign(code=codes_of(events["item"], self._names)).sort_values(["timestamp", "user", "code"])
        self._time = log["timestamp"].to_numpy()
        self._code = log["code"].to_numpy()
        self._disliked = (log["rating"] < rating_threshold).to_numpy()
        self._exponent = exponent
        self._batch = codes_of(pd.Series(list(batch), dtype=object), self._names).to_numpy(dtype=np.int64)
        self._counted, self._counter = 0, np.zeros(len(self._names), dtype=np.int64)
        self._rows_of_user: dict[str, np.ndarray] = log.reset_index(drop=True).groupby("user").indices

    def training(self, kind: Kind, user: str, timestamp: int, count: int) -> list[str]:
        """``count`` distinct items that the user had not taken at or before ``timestamp``.

        Only negatives of the kind ``dislikes`` are items that the user took and rated low. Without ``spare_later``
        nothing after the request matters: an item that the user takes later may be drawn.

        Raises:
            UserError: fewer than ``count`` such items.
        """
        taken = self._barred(user, timestamp)
        rng = request_stream(self._seed, user, timestamp)
        chosen = np.empty(0, dtype=np.int64)
        if kind == "dislikes":
            chosen = self._dislikes(user, timestamp, count, rng)
        elif kind == "in_batch":
            chosen = self._in_batch(timestamp, count, taken, rng)
            taken = np.concatenate([taken, chosen])
        missing = count - len(chosen)  # where dislikes or batch do not suffice, uniform negatives fill up
        self._require(missing, taken, user, timestamp, "data.negatives_per_group")
        draw = self._by_popularity if kind == "popularity" else self._uniform
        return self._names[np.concatenate([chosen, draw(timestamp, missing, taken, rng)])].tolist()

    def evaluation(self, user: str, timestamp: int, count: int, until: int | None) -> list[str]:
        """``count`` distinct items, drawn uniformly among those that the user never took, before or after.

        Args:
            until: items that somebody took strictly before this time; None for all items.

        Raises:
            UserError: fewer than ``count`` such items.
        """
        taken = self._taken(user, None)
        self._require(count, taken, user, until, "data.evaluation_negatives")
        drawn = self._uniform(until, count, taken, request_stream(self._seed, user, timestamp))
        return self._names[drawn].tolist()

    def drawable(self, user: str, timestamp: int) -> np.ndarray:
        """All items that may be training negatives of a request, whatever their kind but ``dislikes``."""
        return self._names[np.setdiff1d(np.arange(self._n_known(timestamp)), self._barred(user, timestamp))]

    def available_for_training(self, kind: Kind, user: str, timestamp: int) -> int:
        """How many negatives ``training`` can give this request at most."""
        dislikes = len(self._dislike_codes(user, timestamp)) if kind == "dislikes" else 0
        return dislikes + self._available(timestamp, self._barred(user, timestamp))

    def spared(self, user: str, timestamp: int) -> int:
        """How many items known before ``timestamp`` cannot be training negatives because the user takes them later."""
        return self._available(timestamp, self._taken(user, timestamp)) - self._available(
            timestamp, self._barred(user, timestamp)
        )

    def available_for_evaluation(self, user: str, until: int | None) -> int:
        """How many negatives ``evaluation`` can give a user at most."""
        return self._available(until, self._taken(user, None))

    def _n_known(self, timestamp: int | None) -> int:
        """Items 0 .. n - 1 were first taken strictly before ``timestamp``; None is the end of time."""
        if timestamp is None:
            return len(self._names)
        return int(np.searchsorted(self._first_seen, timestamp, side="left"))

    def _taken(self, user: str, until: int | None) -> np.ndarray:
        """Items the user took, each once, at or before ``until`` where given."""
        rows = self._rows_of_user[user]
        if until is not None:
            rows = rows[self._time[rows] <= until]
        return np.unique(self._code[rows])

    def _barred(self, user: str, timestamp: int) -> np.ndarray:
        """Items that may not be drawn as training negatives of a request."""
        return self._taken(user, None if self._spare_later else timestamp)

    def _dislike_codes(self, user: str, timestamp: int) -> np.ndarray:
        rows = self._rows_of_user[user]
        low = self._code[rows[(self._time[rows] < timestamp) & self._disliked[rows]]]
        # With data.repeats=keep an item may be rated twice: what was ever liked so far is no dislike, nor, where later
        # items are spared, what the user takes again: it may be the like that is held out.
        again = (self._time[rows] <= timestamp) & ~self._disliked[rows]
        again |= self._spare_later & (self._time[rows] > timestamp)
        return np.array(list(dict.fromkeys(low[~np.isin(low, self._code[rows[again]])].tolist())), dtype=np.int64)

    def _dislikes(self, user: str, timestamp: int, count: int, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(self._dislike_codes(user, timestamp))[:count]

    def _available(self, timestamp: int | None, taken: np.ndarray) -> int:
        n_known = self._n_known(timestamp)
        return n_known - int(np.count_nonzero(taken < n_known))

    def shortage(self, kind: Kind, requests: pd.DataFrame, count: int) -> tuple[int, UserError]:
        """The most negatives that any of ``requests`` can have, and the error that says these are fewer than ``count``.

        Every request must lack negatives.
        """
        pairs = list(zip(requests["user"], requests["timestamp"], strict=True))
        best = max(pairs, key=lambda pair: self.available_for_training(kind, *pair))
        try:
            self.training(kind, *best, count)
        except UserError as error:
            return self.available_for_training(kind, *best), error
        raise AssertionError("there are enough negatives")

    def _require(self, count: int, taken: np.ndarray, user: str, timestamp: int | None, key: str) -> None:
        available = self._available(timestamp, taken)
        if available < count:
            when = "" if timestamp is None else f" at {timestamp} ({pd.Timestamp(timestamp, unit='s').isoformat()})"
            world = "are in the log" if timestamp is None else "had been seen by then"
            raise UserError(
                f"user {user!r}{when}: {count} negatives are asked for, but only {available} items {world} that this "
                f"user had not taken; lower {key}"
            )

    def _uniform(self, timestamp: int | None, count: int, taken: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """``count`` distinct known items, drawn uniformly without ``taken``."""
        n_known = self._n_known(timestamp)
        # Draw so many that ``count`` remain even if every known taken item is among them, then drop the taken ones.
        enough = min(n_known, count + int(np.count_nonzero(taken < n_known)))
        order = rng.choice(n_known, enough, replace=False)
        return order[~np.isin(order, taken)][:count]

    def _in_batch(self, timestamp: int, count: int, taken: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Up to ``count`` distinct positives of random training requests, of items known before ``timestamp``."""
        if not len(self._batch):
            return self._batch
        batch = self._batch[rng.integers(len(self._batch), size=MAX_ROUNDS * count)]
        usable = batch[(batch < self._n_known(timestamp)) & ~np.isin(batch, taken)]
        return np.array(list(dict.fromkeys(usable.tolist())), dtype=np.int64)[:count]

    def _by_popularity(self, timestamp: int, count: int, taken: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """``count`` distinct items, each drawn with probability proportional to popularity ** ``exponent``.

        Popularity is the number of interactions before ``timestamp``. With exponent 1 no weights are needed: the item
        of an event that is drawn uniformly from the log has that distribution, and skipping taken and repeated items
        leaves the right distribution over the others. Where these are so rare that few draws hit them, their weights
        are computed.
        """
        n_events = int(np.searchsorted(self._world.log_time, timestamp, side="left"))
        n_known = self._n_known(timestamp)
        if self._exponent != 1.0:
            return self._weighted(self._counts(n_events, n_known) ** self._exponent, count, taken, rng)
        chosen: dict[int, None] = {}
        excluded = set(taken.tolist())
        for _ in range(MAX_ROUNDS):
            if len(chosen) >= count:
                break
            for code in self._world.log_code[rng.integers(n_events, size=2 * count)].tolist():
                if code not in excluded:
                    chosen[code] = None
        if len(chosen) < count:
            without = np.array([*excluded, *chosen], dtype=np.int64)
            rest = self._weighted(self._counts(n_events, n_known), count - len(chosen), without, rng)
            chosen.update(dict.fromkeys(rest.tolist()))
        return np.fromiter(chosen, dtype=np.int64, count=len(chosen))[:count]

    def _counts(self, n_events: int, n_known: int) -> np.ndarray:
        """(n_known,) interactions of each item in the first ``n_events`` of the log."""
        # Requests mostly come in the order of time, so counts go on from the last call and restart only to go back.
        if n_events < self._counted:
            self._counted, self._counter = 0, np.zeros_like(self._counter)
        self._counter += np.bincount(self._world.log_code[self._counted : n_events], minlength=len(self._counter))
        self._counted = n_events
        return self._counter[:n_known].astype(float)

    @staticmethod
    def _weighted(weights: np.ndarray, count: int, taken: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """``count`` distinct items without ``taken``, drawn in proportion to ``weights`` (n_known,)."""
        weights[taken[taken < len(weights)]] = 0.0
        return rng.choice(len(weights), count, replace=False, p=weights / weights.sum())
