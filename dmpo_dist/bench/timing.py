"""Timing implementations in turns and rounds, choosing their fastest batches, and measuring the machine's peak."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch

from dmpo_dist.bench.implementations import Implementation
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.planning.gpus import known_peak

MIN_TURN_SECONDS = 2.0
"""A turn repeats steps for at least this long, so that other programs disturb all implementations alike."""
LONG_TURN_SECONDS = 5.0


class Turn(NamedTuple):
    """Seconds by the clock, and CPU seconds of all threads of this process; for a turn both are per group."""

    seconds: float
    cpu_seconds: float


def timed(run: Callable[[], object], device: torch.device | str) -> Turn:
    """The time that ``run`` takes, including the work that it queues on the device."""
    synchronize(device)
    start, cpu_start = time.perf_counter(), time.process_time()
    run()
    synchronize(device)
    return Turn(time.perf_counter() - start, time.process_time() - cpu_start)


def synchronize(device: torch.device | str) -> None:
    """Wait until a GPU has finished its queue; does nothing on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def time_rounds(
    compared: Mapping[str, Implementation], groups: Sequence[TokenGroup], rounds: int, device: str
) -> dict[str, list[Turn]]:
    """The turns of each implementation, one in each round; every other round has the opposite order."""
    streams = {name: cycle(groups) for name in compared}
    times: dict[str, list[Turn]] = {name: [] for name in compared}
    for number in range(rounds):
        order = list(compared) if number % 2 == 0 else list(compared)[::-1]
        for name in order:
            times[name].append(_turn(compared[name], streams[name], device))
    return times


def fastest(
    tried: Mapping[str, Implementation], groups: Sequence[TokenGroup], device: str, threads: int
) -> tuple[Implementation, dict[str, float]]:
    """The fastest of ``tried``, and the seconds per group of each; those that do not fit into memory are left out.

    The better of two turns counts, or the only turn where it takes long. Time is by the clock, or by CPU seconds where
    one CPU thread does all the work, so that a busy machine cannot make the wrong one win.

    Raises:
        torch.OutOfMemoryError: not even the first, smallest one fits.
    """
    by_cpu = device == "cpu" and threads == 1
    best: dict[str, float] = {}
    for name, implementation in tried.items():
        try:
            turns = time_rounds({name: implementation}, groups, 1, device)[name]
            if turns[0].seconds * implementation.groups_per_step < LONG_TURN_SECONDS:
                turns += time_rounds({name: implementation}, groups, 1, device)[name]
        except torch.OutOfMemoryError:
            if not best:
                raise
            continue
        best[name] = min(t.cpu_seconds if by_cpu else t.seconds for t in turns)
    return tried[min(best, key=best.__getitem__)], best


def measure_peak(device: str, dtype: str) -> dict[str, Any]:
    """The peak FLOP/s for MFU: ``value``, its ``source`` and ``fastest_product``.

    ``value`` is from the data sheet of a known GPU, else it is the fastest product in this process.
    """
    size = 8192 if device == "cuda" else 1536
    reached = fastest_product(size, device, dtype)
    sheet = known_peak(torch.cuda.get_device_name()) if device == "cuda" and dtype == "bfloat16" else None
    source = f"fastest {size} x {size} {dtype} product in this process"
    if sheet:
        name = torch.cuda.get_device_name()
        source = f"dense bf16 peak of {name} ({reached / 1e12:,.0f} TFLOP/s by a {size}-wide product)"
    return {"value": sheet or reached, "source": source, "fastest_product": reached}


def fastest_product(size: int, device: str, dtype: str) -> float:
    """FLOP/s of the fastest of twenty square products of random numbers."""
    a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    return 2 * size**3 / min(timed(lambda: a @ a, device).seconds for _ in range(20))


def _turn(implementation: Implementation, stream: Iterator[TokenGroup], device: str) -> Turn:
    """Time at least one step; on a GPU after an untimed step, as another implementation has used the memory before."""
    done, elapsed = 0, 0.0
    if device == "cuda":
        torch.cuda.empty_cache()
        implementation.step(list(islice(stream, implementation.groups_per_step)))
    synchronize(device)
    start, cpu_start = time.perf_counter(), time.process_time()
    while elapsed < MIN_TURN_SECONDS:
        implementation.step(list(islice(stream, implementation.groups_per_step)))
        synchronize(device)
        done += implementation.groups_per_step
        elapsed = time.perf_counter() - start
    return Turn(elapsed / done, (time.process_time() - cpu_start) / done)
