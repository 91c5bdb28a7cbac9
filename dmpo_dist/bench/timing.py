"""Clocks: turns in rounds, the batching TRL is fastest with, and the machine's peak."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, product
from typing import Any, TypeVar

import torch

from dmpo_dist.bench.contestants import Contestant, LayoutContestant
from dmpo_dist.bench.trl_pairs import TrlContestant
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.planning.gpus import known_peak

MIN_TURN_SECONDS = 2.0
"""A turn repeats short steps for this long, so that a shared machine's moods hit all contestants alike."""
MAX_TOKENS = {"cpu": 8_192, "cuda": 20_000}
"""Several groups in a batch or row are tried up to here; more tokens fill any device, and may not fit its memory."""
ROWS = {"cpu": (1, 2, 4), "cuda": (1, 8, 16, 24, 32)}
ACCUMULATED = {"cpu": (1, 4), "cuda": (1,)}
"""Groups in an optimizer step, tried likewise: a CPU needs no long rows, yet AdamW need not follow each short one."""
LONG_TURN_SECONDS = 5.0

Timed = TypeVar("Timed", LayoutContestant, TrlContestant)


@dataclass(frozen=True)
class Turn:
    """Seconds per group in one turn: by the clock, and of this process's CPU threads together."""

    seconds: float
    cpu_seconds: float


def time_rounds(
    field: Mapping[str, Contestant], groups: Sequence[TokenGroup], rounds: int, device: str
) -> dict[str, list[Turn]]:
    """A turn of each contestant in each round, in the opposite order every other round."""
    streams = {name: cycle(groups) for name in field}
    times: dict[str, list[Turn]] = {name: [] for name in field}
    for number in range(rounds):
        order = list(field) if number % 2 == 0 else list(field)[::-1]
        for name in order:
            times[name].append(_turn(field[name], streams[name], device))
    return times


def fastest_batches(
    trl: TrlContestant, groups: Sequence[TokenGroup], device: str, threads: int
) -> tuple[TrlContestant, dict[str, float]]:
    """TRL with the number of pairs in a batch that is fastest, and seconds per group of all tried, see ``fastest``.

    One pair at a time, all pairs of a group, and the pairs of two and four groups, an optimizer step for as many.
    """
    pairs, tokens = trl.pairs_per_batch, trl.tokens(groups[0]).physical
    tried = {f"{n} pairs": trl.with_batches(n, 1) for n in sorted({1, pairs})}
    for count in (2, 4):
        if count * tokens <= MAX_TOKENS[device]:
            tried[f"{count * pairs} pairs of {count} groups"] = trl.with_batches(count * pairs, count)
    return fastest(tried, groups, device, threads)


def fastest_rows(
    contestant: LayoutContestant, groups: Sequence[TokenGroup], device: str, threads: int
) -> tuple[LayoutContestant, dict[str, float]]:
    """Ours with the groups in a row and in an optimizer step that are fastest, and seconds per group of all tried."""
    tokens = contestant.tokens(groups[0]).physical
    tried = {}
    for row, least in product(ROWS[device], ACCUMULATED[device]):
        step = max(row, least)
        if step == 1 or step * tokens <= MAX_TOKENS[device]:
            tried[f"{row}" if row == step else f"{row} ({step} a step)"] = contestant.with_rows(row, step)
    return fastest(tried, groups, device, threads)


def fastest(
    tried: Mapping[str, Timed], groups: Sequence[TokenGroup], device: str, threads: int
) -> tuple[Timed, dict[str, float]]:
    """The fastest contestant, and seconds per group of each; one that does not fit into memory is passed over.

    The better of two turns counts (one turn, where it takes long), by the clock, or by CPU seconds where one CPU thread
    does all: a busy machine then cannot pick the wrong one.

    Raises:
        torch.OutOfMemoryError: not even the first, smallest one fits.
    """
    by_cpu = device == "cpu" and threads == 1
    best: dict[str, float] = {}
    for name, contestant in tried.items():
        try:
            turns = time_rounds({name: contestant}, groups, 1, device)[name]
            if turns[0].seconds * contestant.groups_per_step < LONG_TURN_SECONDS:
                turns += time_rounds({name: contestant}, groups, 1, device)[name]
        except torch.OutOfMemoryError:
            if not best:
                raise
            continue
        best[name] = min(t.cpu_seconds if by_cpu else t.seconds for t in turns)
    return tried[min(best, key=best.__getitem__)], best


def measure_peak(device: str, dtype: str) -> dict[str, Any]:
    """FLOP/s to relate to: ``value``, its ``source`` (a data sheet for known GPUs, else this process's fastest product),
    and that ``fastest_product``, which is what is within reach here."""
    size = 8192 if device == "cuda" else 1536
    reached = fastest_product(size, device, dtype)
    sheet = known_peak(torch.cuda.get_device_name()) if device == "cuda" and dtype == "bfloat16" else None
    source = f"fastest {size} x {size} {dtype} product in this process"
    if sheet:
        source = f"dense bf16 peak of {torch.cuda.get_device_name()} ({reached / 1e12:,.0f} TFLOP/s by a {size}-wide product)"
    return {"value": sheet or reached, "source": source, "fastest_product": reached}


def fastest_product(size: int, device: str, dtype: str) -> float:
    """FLOP/s of the fastest of twenty square products of random numbers."""
    fastest = float("inf")
    a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    for _ in range(20):
        _synchronize(device)
        start = time.perf_counter()
        a @ a
        _synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest


def _turn(contestant: Contestant, stream: Iterator[TokenGroup], device: str) -> Turn:
    """At least one step; on a GPU after one that is not counted, for memory that another contestant has left there."""
    done, elapsed = 0, 0.0
    if device == "cuda":
        torch.cuda.empty_cache()
        contestant.step(list(islice(stream, contestant.groups_per_step)))
    _synchronize(device)
    start, cpu_start = time.perf_counter(), time.process_time()
    while elapsed < MIN_TURN_SECONDS:
        contestant.step(list(islice(stream, contestant.groups_per_step)))
        _synchronize(device)
        done += contestant.groups_per_step
        elapsed = time.perf_counter() - start
    return Turn(elapsed / done, (time.process_time() - cpu_start) / done)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
