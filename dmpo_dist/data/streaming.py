"""Logs larger than memory: Parquet shards are cleaned and sorted on disk by DuckDB, then prepared by shares of the users.

A request needs its user's events, when each item was first taken, and for popularity negatives the bare times and item
numbers of the log. So users can be prepared one share after the other, with the rows that the whole log would give.
"""

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from dmpo_dist.artifacts.files import whole_folder
from dmpo_dist.config.data import DataConfig
from dmpo_dist.data.assemble import LOG_COLUMNS, MILLISECONDS, items_of_events, unique_titles
from dmpo_dist.data.card import summary
from dmpo_dist.data.folder import (
    CHECKED_ROWS,
    checked_for_leaks,
    make_card,
    sample_rows,
    save_split,
    write_card,
)
from dmpo_dist.data.groups import facts_of, log_rows, requests_of, require_groups, with_enough_candidates
from dmpo_dist.data.negatives import NegativeSampler, World
from dmpo_dist.data.sources.read import existing
from dmpo_dist.data.splits import SPLITS, time_cuts
from dmpo_dist.data.store import ROW_FEATURES
from dmpo_dist.data.tables import read_table
from dmpo_dist.errors import UserError

EVENTS_AT_ONCE = 250_000  # of one share of the users
BATCH = 1000


def prepare_stream(config: DataConfig, seed: int, output: Path, echo: Callable[[str], None], allow_leaks: bool) -> None:
    """Prepare the shards of ``config.source`` and write them to ``output``; see ``prepare``.

    Raises:
        UserError: see ``prepare``; also without duckdb.
    """
    start = time.monotonic()
    with whole_folder(output) as folder:
        work = folder / "work"
        work.mkdir()
        log = _Log(config, work, echo)
        found, dropped = _write_shares(log, config, seed, work, echo, start)
        require_groups(
            {split: (found[split], dropped[split]) for split in SPLITS},
            log.size,
            log.users,
            log.count(f"rating >= {config.rating_threshold}"),
            config,
        )
        if not found["train"]:
            raise UserError("every training request has too few candidates; lower data.negatives_per_group")
        rows = {split: _sorted_rows(work, split) for split in SPLITS}
        rows["validation"], left_out = _sampled(rows["validation"], config.max_validation_users, seed)
        dropped["validation"]["over_max_validation_users"] = left_out
        tables = {"items": log.items, "interactions": pd.DataFrame()}
        batched = {split: _Rows(rows[split]) for split in SPLITS}
        card = make_card(
            config,
            seed,
            log.name,
            log.notes,
            batched,
            tables,
            facts_of(log.cuts, {split: dict(dropped[split]) for split in SPLITS}),
        )
        if max(map(len, rows.values())) > CHECKED_ROWS:
            card.notes.append(
                f"Leak check on {CHECKED_ROWS} rows of a split at equal distances, and on their users' events."
            )
        for note in card.notes:
            echo(note)
        sample = {split: sample_rows(rows[split]) for split in SPLITS}
        users = {row["user"] for part in sample.values() for row in part}
        card.leaks = checked_for_leaks(sample, log.events_of(users), card, echo, allow_leaks)
        for split in SPLITS:
            save_split(rows[split], folder / split)
        log.items.to_parquet(folder / "items.parquet", index=False)
        log.write_interactions(folder / "interactions.parquet")
        write_card(folder, card)
        log.close()
        del rows, batched  # their files are in ``work``
        shutil.rmtree(work)
        echo(summary(card))
        seconds = time.monotonic() - start
        echo(f"{log.size:,} interactions in {seconds:,.0f} s, {log.size / seconds:,.0f} per second")


class _Log:
    """The cleaned log in a DuckDB file: table ``log`` (user, item, rating, timestamp), and facts about it."""

    def __init__(self, config: DataConfig, work: Path, echo: Callable[[str], None]) -> None:
        self._sql, self._memory_error = _connect(work, config.stream_memory)
        folder = existing(config.source.path, "data.source.kind=parquet needs data.source.path")
        shards = sorted(folder.glob("*.parquet")) if folder.is_dir() else [folder]
        if not shards:
            raise UserError(f"{folder}: no *.parquet files; set data.source.path to the folder of shards")
        self.name, self.notes = folder.resolve().name, []
        self._read(shards, config)
        echo(f"{self._one('SELECT count(*) FROM raw'):,} rows read from {len(shards)} files")
        self._skip_malformed(config.source.tolerated_rows)
        self.items = self._items(config, folder)
        self._clean()
        if config.k_core > 1:
            self._core(config.k_core)
        self._order()
        self.size, self.users = self.count("true"), self._one("SELECT count(DISTINCT user) FROM log")
        singles = self._one("SELECT count(*) FROM (SELECT user FROM log GROUP BY user HAVING count(*) = 1)")
        if singles:
            self.notes.append(f"{singles} users with one interaction give no request.")
        echo(f"{self.size:,} interactions of {self.users:,} users and {len(self.items):,} items")
        self.cuts = None
        if config.split == "time":
            times = self._run("SELECT timestamp FROM log").fetchnumpy()["timestamp"]
            self.cuts = time_cuts(times, config.validation_quantile, config.test_quantile)

    def _run(self, query: str, parameters: list[Any] | None = None) -> Any:
        try:
            return self._sql.execute(query, parameters)
        except self._memory_error as error:
            raise UserError(f"{_first_line(error)}; raise data.stream_memory") from None

    def _one(self, query: str) -> Any:
        return self._run(query).fetchall()[0][0]

    def _read(self, shards: list[Path], config: DataConfig) -> None:
        """Table ``raw``: user and item as text, rating and seconds as numbers or null, file and row."""
        files = [str(shard) for shard in shards]
        try:
            described = self._run("DESCRIBE SELECT * FROM read_parquet($1, union_by_name=true)", [files]).fetchall()
        except Exception as error:  # DuckDB's own errors for damaged files
            raise UserError(f"{shards[0].parent}: not readable Parquet files ({_first_line(error)})") from None
        types = {name: kind for name, kind, *_ in described}
        names = {column: config.source.columns.get(column, column) for column in LOG_COLUMNS}
        needed = LOG_COLUMNS[:4] if config.source.items_path else LOG_COLUMNS[:5]
        for column in needed:
            if names[column] not in types:
                raise UserError(
                    f"{shards[0].parent}: no column {names[column]!r}; the files have {', '.join(map(repr, types))}; set "
                    f"data.source.columns.{column} to the right one"
                )
        moment = _quoted(names["timestamp"])
        moment = (
            f"epoch({moment})" if types[names["timestamp"]].startswith("TIMESTAMP") else f"TRY_CAST({moment} AS DOUBLE)"
        )
        titles = [
            f"{_text(names[column])} AS {column}" if names[column] in types else f"'' AS {column}"
            for column in ("title", "genres")
        ]
        self._run(
            f"""CREATE TABLE raw AS SELECT {_text(names["user"])} AS user, {_text(names["item"])} AS item,
            TRY_CAST({_quoted(names["rating"])} AS DOUBLE) AS rating, floor({moment}) AS timestamp, {", ".join(titles)},
            filename, file_row_number AS row FROM read_parquet($1, union_by_name=true, filename=true, file_row_number=true)""",
            [files],
        )

    def _skip_malformed(self, tolerated: float) -> None:
        median = self._one("SELECT approx_quantile(timestamp, 0.5) FROM raw")
        if median is not None and median > MILLISECONDS:
            raise UserError(
                f"{self.name}: the median timestamp is about {median:.0f}, which as seconds lies after the year 5000; "
                "divide the column to seconds since 1970"
            )
        sound = f"""user <> '' AND item <> '' AND isfinite(rating) AND isfinite(timestamp)
            AND abs(timestamp) <= {MILLISECONDS}"""
        bad = self._run(
            f"""SELECT filename, row, user, item, rating, timestamp, count(*) OVER () FROM raw
            WHERE NOT coalesce({sound}, false) ORDER BY filename, row LIMIT 1"""
        ).fetchall()
        if not bad:
            return
        file, row, user, item, rating, moment, count = bad[0]
        if count > tolerated * self._one("SELECT count(*) FROM raw"):
            raise UserError(
                f"{file}, row {row + 1}: malformed (user {user!r}, item {item!r}, rating {rating}, timestamp {moment}; {count} "
                "such rows); mend it or raise data.source.tolerated_rows"
            )
        self._run(f"DELETE FROM raw WHERE NOT coalesce({sound}, false)")
        self.notes.append(
            f"{count} malformed rows skipped (no user or item, or no number where one must be), the first in {file}, row "
            f"{row + 1}."
        )

    def _items(self, config: DataConfig, folder: Path) -> pd.DataFrame:
        """One row per item with a unique title; table ``raw`` then names each by the item that stands for it."""
        source = config.source
        taken = self._run("SELECT DISTINCT item FROM raw").df()
        if source.items_path is None:
            items = self._run(
                """SELECT item, min(title) AS title, min(genres) AS genres, max(title) AS other FROM raw GROUP BY item
                ORDER BY min((filename, row))"""
            ).df()
            differs = items[items["title"] != items["other"]]
            if len(differs):
                one = differs.iloc[0]
                raise UserError(
                    f"{folder}: item {one['item']!r} has the titles {one['title']!r} and {one['other']!r}; give it one"
                )
            items, place = items.drop(columns="other"), folder
        else:
            place = existing(source.items_path, "data.source.items_path")
            items = read_table(place).rename(columns={source.columns.get(c, c): c for c in ("item", "title", "genres")})
            items = (items if "genres" in items else items.assign(genres=""))[["item", "title", "genres"]]
        items = items_of_events(taken, items, folder, place, self.notes)
        items, renamed = unique_titles(items, place, source.duplicate_titles, self.notes)
        if renamed:
            self._sql.register("renamed", pd.DataFrame({"old": list(renamed), "new": list(renamed.values())}))
            self._run("UPDATE raw SET item = renamed.new FROM renamed WHERE raw.item = renamed.old")
        return items

    def _clean(self) -> None:
        """Table ``log``: the first event in time of each (user, item)."""
        rows = self._one("SELECT count(*) FROM raw")
        self._run(
            """CREATE TABLE log AS SELECT user, item, arg_min(rating, (timestamp, filename, row)) AS rating,
            CAST(min(timestamp) AS BIGINT) AS timestamp FROM raw GROUP BY user, item"""
        )
        self._run("DROP TABLE raw")
        repeated = rows - self.count("true")
        if repeated:
            self.notes.append(f"{repeated} repeated (user, item) events dropped, the first in time kept.")

    def _core(self, k: int) -> None:
        def facts() -> list[int]:
            return list(self._run("SELECT count(*), count(DISTINCT user), count(DISTINCT item) FROM log").fetchall()[0])

        before = after = facts()
        while True:
            size = after
            for column in ("user", "item"):
                self._run(
                    f"DELETE FROM log WHERE {column} IN (SELECT {column} FROM log GROUP BY {column} HAVING count(*) < {k})"
                )
            after = facts()
            if after == size:
                break
        if not after[0]:
            raise UserError(f"data.k_core={k} leaves nothing of {before[0]} interactions; lower it")
        kept = self._run("SELECT DISTINCT item FROM log").df()["item"]
        self.items = self.items[self.items["item"].isin(kept)].reset_index(drop=True)
        self.notes.append(
            f"{k}-core of the whole log: {after[0]} of {before[0]} interactions, {after[1]} of {before[1]} users, "
            f"{after[2]} of {before[2]} items."
        )

    def _order(self) -> None:
        """Each share of the users together on disk, so that one is read without the others."""
        self.shares = 1 + self.count("true") // EVENTS_AT_ONCE
        self._run(
            f"CREATE TABLE ordered AS SELECT *, hash(user) % {self.shares} AS share FROM log ORDER BY share, timestamp, user, item"
        )
        self._run("DROP TABLE log")
        self._run("ALTER TABLE ordered RENAME TO log")

    def count(self, condition: str) -> int:
        """Events for which the SQL ``condition`` holds."""
        return int(self._one(f"SELECT count(*) FROM log WHERE {condition}"))

    def world(self, with_log: bool) -> World:
        """The items by the time they were first seen, and with ``with_log`` every event's time and item."""
        first = self._run("SELECT item, min(timestamp) AS t FROM log GROUP BY item ORDER BY t, item").df()
        names = first["item"].to_numpy(dtype=object)
        bare = {"timestamp": np.empty(0, dtype=np.int64), "code": np.empty(0, dtype=np.int32)}
        if with_log:
            self._sql.register("numbered", pd.DataFrame({"item": names, "code": np.arange(len(names), dtype=np.int32)}))
            bare = self._run(
                "SELECT timestamp, code FROM log JOIN numbered USING (item) ORDER BY timestamp, user, code"
            ).fetchnumpy()
        return World(names, first["t"].to_numpy(), bare["timestamp"], bare["code"])

    def share(self, number: int) -> pd.DataFrame:
        """All events of one share of the users, in the order of a log."""
        return self._run(
            f"""SELECT user, item, rating, timestamp FROM log WHERE share = {number} ORDER BY timestamp, user, item"""
        ).df()

    def events_of(self, users: set[str]) -> pd.DataFrame:
        """All events of ``users``."""
        self._sql.register("asked", pd.DataFrame({"user": sorted(users)}))
        return self._run("SELECT user, item, rating, timestamp FROM log SEMI JOIN asked USING (user)").df()

    def write_interactions(self, file: Path) -> None:
        self._run(
            f"""COPY (SELECT user, item, rating, timestamp FROM log ORDER BY timestamp, user, item)
            TO '{str(file).replace("'", "''")}' (FORMAT parquet)"""
        )

    def close(self) -> None:
        self._sql.close()


def _connect(work: Path, memory: str) -> tuple[Any, type[Exception]]:
    """A connection, and the error it raises when its memory is too small."""
    try:
        import duckdb
    except ImportError:
        raise UserError('data.stream=true needs duckdb; pip install "dmpo-dist[stream]"') from None
    settings = {"memory_limit": memory, "temp_directory": str(work / "spill"), "preserve_insertion_order": "false"}
    try:
        return duckdb.connect(str(work / "log.duckdb"), config=settings), duckdb.OutOfMemoryException
    except duckdb.Error as error:
        raise UserError(f"data.stream_memory={memory}: {_first_line(error)}; write it as in 1GB") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _text(name: str) -> str:
    return f"coalesce(trim(CAST({_quoted(name)} AS VARCHAR)), '')"


def _write_shares(
    log: _Log, config: DataConfig, seed: int, work: Path, echo: Callable[[str], None], start: float
) -> tuple[Counter[str], dict[str, Counter[str]]]:
    """Rows of one share of the users after the other, to ``work``; how many by split, and why others were dropped."""
    world = log.world(with_log=config.negatives == "popularity")
    first_seen = pd.Series(world.first_seen, index=world.names)
    title = dict(zip(log.items["item"], log.items["title"], strict=True))
    found: Counter[str] = Counter()
    dropped: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    done, shown = 0, 0.0
    for split in SPLITS:
        (work / split).mkdir()
    for number in range(log.shares):
        events = log.share(number)
        requests = requests_of(events, log.cuts, config, first_seen)
        sampler = NegativeSampler(events, config.rating_threshold, seed, config.popularity_exponent, world=world)
        for split, kept in with_enough_candidates(requests, sampler, config).items():
            found[split] += len(kept.table)
            dropped[split].update(kept.dropped)
            if len(kept.table):
                rows = log_rows(kept, split, title, sampler, config)
                table = pa.Table.from_pylist(rows, schema=ROW_FEATURES.arrow_schema)
                pq.write_table(table, work / split / f"{number:06d}.parquet", compression="zstd")
        done += len(events)
        if done == log.size or time.monotonic() - shown > 10:
            shown = time.monotonic()
            echo(f"{done:,} of {log.size:,} interactions, {done / (shown - start):,.0f} per second since the start")
    return found, dropped


def _sorted_rows(work: Path, split: str) -> Dataset:
    """The rows of a split in their order, read from disk as they are used; only their keys are sorted in memory."""
    files = [str(file) for file in sorted((work / split).iterdir())]
    if not files:
        return Dataset.from_dict({name: [] for name in ROW_FEATURES}, features=ROW_FEATURES)
    rows = Dataset.from_parquet(files, features=ROW_FEATURES, cache_dir=str(work / "cache"))
    keys = rows.select_columns(["timestamp", "user", "positive_item"]).to_pandas()
    order = keys.sort_values(["timestamp", "user", "positive_item"]).index.to_numpy()
    return rows.select(order).flatten_indices(cache_file_name=str(work / f"{split}.arrow"))


def _sampled(rows: Dataset, limit: int | None, seed: int) -> tuple[Dataset, int]:
    """A seeded sample of at most ``limit`` rows, and how many it leaves out."""
    if limit is None or len(rows) <= limit:
        return rows, 0
    kept = np.random.default_rng(seed).choice(len(rows), limit, replace=False)
    return rows.select(np.sort(kept)).flatten_indices(), len(rows) - limit


@dataclass(frozen=True)
class _Rows:
    """A split read in batches: going over it holds one batch in memory."""

    table: Dataset

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for first in range(0, len(self.table), BATCH):
            yield from self.table.select(range(first, min(first + BATCH, len(self.table)))).to_list()
