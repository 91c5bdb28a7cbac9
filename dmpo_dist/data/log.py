"""A clean log in a database, from which users are read share by share.

A request needs its user's events, when each item was first taken, and for popularity negatives the bare times and item
numbers of the log. So users can be prepared one share after the other, with the rows that the whole log would give.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from dmpo_dist.config.data import DataConfig
from dmpo_dist.data.database import Database, literal
from dmpo_dist.data.negatives import World
from dmpo_dist.data.rules import Rules
from dmpo_dist.data.sources.read import load_interactions
from dmpo_dist.data.sources.shards import clean_shards
from dmpo_dist.data.sources.simulator import LIKE, oracle_scores
from dmpo_dist.data.splits import time_cuts
from dmpo_dist.errors import UserError

EVENTS_AT_ONCE = 250_000  # of one share of the users
COLUMNS = "user, item, rating, timestamp"
IN_ORDER = "ORDER BY timestamp, user, item"

Score = Callable[[str, list[str]], list[float]]
"""The oracle's scores of a user's candidates; [] where the world is unknown."""


class Log:
    """The table ``log`` (user, item, rating, timestamp; one row per user and item) of a database, and its items.

    Attributes:
        items: columns item, title, genres.
        name: what the data is called.
        notes: what reading changed or left out, one sentence each.
        score: the oracle of a simulated world.
        shares: of how many shares of the users ``share`` reads one.
    """

    def __init__(
        self,
        database: Database,
        items: pd.DataFrame,
        name: str,
        notes: list[str],
        score: Score = lambda user, items: [],
    ) -> None:
        self._database = database
        self.items, self.name, self.notes, self.score = items, name, notes, score
        self.shares = 1

    def count(self, what: str = "*") -> int:
        """How many rows there are, or distinct values of an SQL expression."""
        return int(self._database.value(f"SELECT count({what}) FROM log"))

    def keep_core(self, k: int) -> None:
        """Keep the largest part in which every user and every item has at least ``k`` events.

        Raises:
            UserError: nothing is left.
        """
        sizes = [self.count(what) for what in ("*", "DISTINCT user", "DISTINCT item")]
        size = None
        while size != (size := self.count()):  # what one pass deletes may leave others with too few
            for name in ("user", "item"):
                self._database.run(
                    f"DELETE FROM log WHERE {name} IN (SELECT {name} FROM log GROUP BY {name} HAVING count(*) < {k})"
                )
        if not size:
            raise UserError(f"data.k_core={k} leaves nothing of {sizes[0]} interactions; lower it")
        taken = self._database.frame("SELECT DISTINCT item FROM log")["item"]
        self.items = self.items[self.items["item"].isin(taken)].reset_index(drop=True)
        self.notes.append(
            f"{k}-core of the whole log: {size} of {sizes[0]} interactions, "
            f"{self.count('DISTINCT user')} of {sizes[1]} users, {len(self.items)} of {sizes[2]} items."
        )

    def divide(self) -> None:
        """Put shares of the users together on disk, so that each is read without the others."""
        self.shares = 1 + self.count() // EVENTS_AT_ONCE
        self._database.run(
            f"""CREATE TABLE ordered AS SELECT *, hash(user) % {self.shares} AS share FROM log
            ORDER BY share, timestamp, user, item"""
        )
        self._database.run("DROP TABLE log")
        self._database.run("ALTER TABLE ordered RENAME TO log")

    def share(self, number: int) -> pd.DataFrame:
        """All events of one share of the users, sorted by (timestamp, user, item)."""
        only = f"WHERE share = {number}" if self.shares > 1 else ""
        return self._frame(f"SELECT {COLUMNS} FROM log {only} {IN_ORDER}")

    def events_of(self, users: set[str]) -> pd.DataFrame:
        """All events of ``users``."""
        self._database.show("asked", pd.DataFrame({"user": sorted(users)}, dtype="str"))
        return self._frame(f"SELECT {COLUMNS} FROM log SEMI JOIN asked USING (user)")

    def _frame(self, query: str) -> pd.DataFrame:
        return self._database.frame(query).astype({"user": "str", "item": "str"})

    def training_likes(self, rating_threshold: float, until: int | None) -> np.ndarray:
        """(n_users,) each user's likes before ``until``, or for None (leave-one-out) all but the last two."""
        if until is None:
            counted = f"greatest(count_if(rating >= {rating_threshold}) - 2, 0)"
        else:
            counted = f"count_if(rating >= {rating_threshold} AND timestamp < {until})"
        return self._database.run(f"SELECT {counted} AS n FROM log GROUP BY user").fetchnumpy()["n"].astype(np.int64)

    def cuts(self, validation_quantile: float, test_quantile: float) -> tuple[int, int]:
        """The moments that part training, validation and test."""
        times = self._database.run("SELECT timestamp FROM log").fetchnumpy()["timestamp"]
        return time_cuts(times, validation_quantile, test_quantile)

    def world(self, with_log: bool) -> World:
        """The items by the time they were first taken, and with ``with_log`` every event's time and item."""
        first = self._database.frame("SELECT item, min(timestamp) AS t FROM log GROUP BY item ORDER BY t, item")
        names = first["item"].to_numpy(dtype=object)
        bare = {"timestamp": np.empty(0, dtype=np.int64), "code": np.empty(0, dtype=np.int32)}
        if with_log:
            codes = np.arange(len(names), dtype=np.int32)
            self._database.show("numbered", pd.DataFrame({"item": names, "code": codes}))
            bare = self._database.run(
                "SELECT timestamp, code FROM log JOIN numbered USING (item) ORDER BY timestamp, user, code"
            ).fetchnumpy()
        return World(names, first["t"].to_numpy(), bare["timestamp"], bare["code"])

    def write(self, file: Path) -> None:
        """Write all events in order as Parquet."""
        if self.shares == 1:
            self.share(0).to_parquet(file, index=False)
        else:
            self._database.run(f"COPY (SELECT {COLUMNS} FROM log {IN_ORDER}) TO {literal(str(file))} (FORMAT parquet)")


def open_log(config: DataConfig, seed: int, database: Database, echo: Callable[[str], None]) -> Log:
    """Read and clean the log of ``config.source`` into ``database``, under ``config.stream`` never in memory whole.

    Raises:
        UserError: a missing or malformed file, or ``config.k_core`` leaves nothing.
    """
    if config.stream:
        rules = Rules.of(config.source, config.repeats)
        items, name, notes = clean_shards(database, config.source, rules, echo)
        log = Log(database, items, name, notes)
    else:
        read = load_interactions(config.source, seed, config.repeats)
        database.show("events", read.events)
        database.run(f"CREATE TABLE log AS SELECT {COLUMNS} FROM events")
        log = Log(database, read.items, read.name, list(read.notes), oracle_scores(read))
    if config.k_core > 1:
        log.keep_core(config.k_core)
    if config.stream:
        log.divide()
        echo(f"{log.count():,} interactions of {log.count('DISTINCT user'):,} users and {len(log.items):,} items")
    singles = database.value("SELECT count(*) FROM (SELECT user FROM log GROUP BY user HAVING count(*) = 1)")
    if singles:
        log.notes.append(f"{singles} users with one interaction give no request.")
    if config.source.kind == "simulator" and config.rating_threshold != LIKE:
        log.notes.append(
            f"The oracle assumes likes at {LIKE}, not at {config.rating_threshold}: it is not the best ranking here."
        )
    return log
