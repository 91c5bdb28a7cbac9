"""How long a rank trained and how long of that it was busy, so that the slowest rank of a step can be named.

Ranks meet in every collective, so by the clock all are equally slow; they differ in how much of the time they work.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

SCHEDULER = Path("/proc/thread-self/schedstat")
FORWARDS = ("reference", "policy")


class Stopwatch:
    """Wall-clock and busy seconds of this rank, without synchronising with the device before a line is due.

    On the CPU the training thread is busy while it runs or waits for a processor, and not while it sleeps, as it does
    in a collective (Linux tells both; elsewhere only the running counts). On a GPU busy is the time of the forward
    passes, by events in its stream: those of the backward pass lie among collectives. Under ZeRO-3 forwards gather
    parameters and wait for each other, so there a slow GPU shows less than it is.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._forwards = 0.0
        self._wall, self._busy = self._now()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around a part of a step."""
        if not (self._cuda and name in FORWARDS):
            yield
            return
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        self._events.append((begin, end))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens within is not training."""
        wall, busy = self._now()
        yield
        now = self._now()
        self._wall += now[0] - wall
        self._busy += now[1] - busy

    def lap(self) -> tuple[float, float]:
        """Wall-clock and busy seconds since the last call; waits for the device."""
        wall, busy = self._now()
        spent = wall - self._wall, busy - self._busy
        self._wall, self._busy = wall, busy
        return spent

    def _now(self) -> tuple[float, float]:
        if not self._cuda:
            return time.monotonic(), _thread_busy()
        torch.cuda.synchronize()
        self._forwards += sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
        self._events.clear()
        return time.monotonic(), self._forwards


def _thread_busy() -> float:
    """Seconds this thread has run or been ready to run."""
    if not SCHEDULER.exists():
        return time.thread_time()
    ran, queued, _ = SCHEDULER.read_text().split()
    return (int(ran) + int(queued)) / 1e9
