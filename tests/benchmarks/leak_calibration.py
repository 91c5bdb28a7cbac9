"""How often the two leak checks of candidates accuse honest data, and which planted leaks they find.

    python tests/benchmarks/leak_calibration.py --seeds 200 --recbole ml-100k-recbole --movielens ml-latest-small

Every seed draws the simulator's world, or the negatives of a public log, anew. The folders may be left out.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from dmpo_dist.config import DataConfig, Simulator, Source
from dmpo_dist.data.candidate_leaks import look_up, overlapping
from dmpo_dist.data.database import Database
from dmpo_dist.data.finding import Finding
from dmpo_dist.data.groups import groups_of_log
from dmpo_dist.data.log import open_log

Rows = dict[str, list[dict[str, Any]]]
REQUESTS = 3000  # of made-up rows
CATALOGUE = 1000
SHARES = (0.05, 0.1, 0.2, 0.5, 1.0)  # of requests whose negatives are planted


def honest_logs(recbole: Path | None, movielens: Path | None) -> dict[str, DataConfig]:
    """Name -> how an honest log is prepared."""
    small = Source(simulator=Simulator(users=300, items=80, events_per_user=16, taste_dim=4))
    large = Source(simulator=Simulator(users=600, items=120, popularity_exponent=1.2))
    options: dict[str, dict[str, Any]] = {
        "": {},
        ", leave-one-out": {"split": "leave_one_out"},
        ", 10 requests a user": {"train_requests_per_user": 10},
        ", 5 requests, 99 negatives": {"train_requests_per_user": 5, "negatives_per_group": 99},
        ", negatives by popularity": {"negatives": "popularity"},
        ", dislikes": {"negatives": "dislikes"},
    }
    found = {
        "simulator": DataConfig(source=small, negatives_per_group=8),
        "simulator, leave-one-out": DataConfig(source=large, negatives_per_group=19, split="leave_one_out"),
        "simulator, 4 negatives": DataConfig(source=large, negatives_per_group=4, evaluation_negatives=4),
        "simulator, 1 negative": DataConfig(source=large, negatives_per_group=1, evaluation_negatives=1),
    }
    if recbole:
        source = Source(kind="recbole", path=recbole, duplicate_titles="merge")
        found |= {f"ML-100K{name}": DataConfig(source=source, **more) for name, more in options.items()}
    if movielens:
        source = Source(kind="movielens", path=movielens, duplicate_titles="merge")
        found |= {f"latest-small{name}": DataConfig(source=source, **more) for name, more in options.items()}
    return found


def honest_findings(config: DataConfig, seeds: int) -> Iterator[tuple[Finding, Finding]]:
    """The findings of look-up and overlap for each seed."""
    with tempfile.TemporaryDirectory() as work, ExitStack() as stack:
        log = open_log(config, 0, stack.enter_context(Database()), lambda line: None)
        for seed in range(seeds):
            if seed and config.source.kind == "simulator":  # another world
                log = open_log(config, seed, stack.enter_context(Database()), lambda line: None)
            parts, _ = groups_of_log(log, config, seed, Path(work), lambda line: None)
            rows = {split: part.to_list() for split, part in parts.items()}
            yield look_up(rows, log.share(0)), overlapping(rows)


def day_pools(rng: np.random.Generator, pool: int, negatives: int, exponent: float) -> Rows:
    """Honest requests of 30 days, all candidates of one day, as in news; a day's first items are clicked most."""
    rows = []
    clicks = np.arange(1, pool + 1) ** -exponent
    for number in range(REQUESTS):
        target = rng.choice(pool, p=clicks / clicks.sum())
        others = rng.choice(np.delete(np.arange(pool), target), negatives, replace=False)
        rows.append([f"{number % 30}-{item}" for item in (target, *others)])
    return split(rng.permutation(np.array(rows, dtype=object)).tolist())


def planted(rng: np.random.Generator, kind: str, negatives: int, share: float) -> Rows:
    """Requests of which ``share`` have negatives that are made from the target; targets are Zipf-distributed."""
    taken = np.arange(1, CATALOGUE + 1) ** -0.8
    rows = []
    for target in rng.choice(CATALOGUE, REQUESTS, p=taken / taken.sum()):
        own = np.random.default_rng([target, int(rng.integers(8)) if kind == "one of 8 lists" else 0])
        drawn = own if rng.random() < share else rng
        size = 5 * negatives if kind == "from a pool of 5K" else negatives
        others = np.setdiff1d(drawn.choice(CATALOGUE, size + 1, replace=False), [target])
        rows.append([str(item) for item in (target, *rng.permutation(others)[:negatives])])
    return split(rows)


def split(sets: list[list[str]]) -> Rows:
    """Candidate sets, target first, as rows: 60 % training, 20 % validation, 20 % test."""
    every = [
        {
            "user": str(n),
            "positive": items[0],
            "positive_item": items[0],
            "negative_items": items[1:],
            "history_items": [],
        }
        for n, items in enumerate(sets)
    ]
    return {"train": every[:1800], "validation": every[1800:2400], "test": every[2400:]}


def alarms(name: str, findings: Iterator[tuple[Finding, Finding]]) -> None:
    """Print a row: on how many seeds either check found a leak or warned, and how near it came to its gate."""
    start, rows = time.monotonic(), list(findings)
    counts = []
    for check in zip(*rows, strict=True):
        verdicts = [finding.verdict for finding in check]
        counts.append(f"{verdicts.count('leak')} / {verdicts.count('warning')}")
    gains = [found.figures["gain_low"] for found, _ in rows if "gain_low" in found.figures]
    nearest = [f"{max(low):+.3f}" if low else "-" for low in (gains, [found.figures["low"] for _, found in rows])]
    cells = [name, str(len(rows)), *counts, " / ".join(nearest), f"{time.monotonic() - start:.0f}"]
    print(f"| {' | '.join(cells)} |", flush=True)


def power(kind: str, negatives: int, seeds: int) -> None:
    """Print a row: the share of seeds on which the overlap test finds a leak, by the share of planted requests."""
    cells = []
    for share in SHARES:
        found = [overlapping(planted(np.random.default_rng(seed), kind, negatives, share)) for seed in range(seeds)]
        cells.append(f"{np.mean([finding.verdict == 'leak' for finding in found]):.0%}")
    print(f"| {kind} | {negatives} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print the tables of docs/LOG.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--log-seeds", type=int, default=20, help="of the public logs, which are slower")
    parser.add_argument("--power-seeds", type=int, default=10)
    parser.add_argument("--only", nargs="+", help="names of honest logs; leaves out the made-up rows")
    parser.add_argument("--recbole", type=Path)
    parser.add_argument("--movielens", type=Path)
    asked = parser.parse_args()
    print("| honest data | seeds | look-up: leaks / warnings | overlap: leaks / warnings | nearest | s |")
    print("|---|---|---|---|---|---|")
    for name, config in honest_logs(asked.recbole, asked.movielens).items():
        if asked.only is None or name in asked.only:
            seeds = asked.seeds if name.startswith("simulator") else asked.log_seeds
            alarms(name, honest_findings(config, seeds))
    if asked.only is None:
        made_up(asked.log_seeds, asked.power_seeds)


def made_up(seeds: int, power_seeds: int) -> None:
    """Print the rows of honest days and the table of planted leaks."""
    for pool, negatives, exponent in ((40, 19, 1.2), (200, 19, 1.2), (40, 19, 2.5), (100, 3, 1.2), (40, 1, 1.2)):
        made = [day_pools(np.random.default_rng(seed), pool, negatives, exponent) for seed in range(seeds)]
        name = f"days of {pool} items, {negatives} negatives, Zipf {exponent}"
        alarms(name, ((look_up(rows, None), overlapping(rows)) for rows in made))
    print(f"\n| negatives of a target | K | {' | '.join(f'{share:.0%} planted' for share in SHARES)} |")
    print("|---|---|" + "---|" * len(SHARES))
    for kind in ("one list", "one of 8 lists", "from a pool of 5K"):
        for negatives in (1, 4, 19):
            power(kind, negatives, power_seeds)


if __name__ == "__main__":
    main()
