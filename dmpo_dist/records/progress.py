"""The progress of a long job over users: a bar on a terminal, otherwise a line from time to time."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 15.0
SECONDS_TOGETHER = 0.01
"""Users who are counted within this time were done by one forward pass, though they are counted one by one."""


class UserProgress:
    """Counts users. The rate ignores the time before the first users are done, and the users of an earlier run.

    Users who come out of one forward pass arrive at one moment. The rate is of the users before the latest moment, so
    that it does not count those for whose pass no time is known; where all arrive at one moment there is none.

    Args:
        title: the name of the job on the console.
        total: number of all users.
        done: number of users that an earlier run did.
        console: where the progress is shown.
        before: what happens before the first users are done.
        unit: what is counted, where it is not users.
    """

    def __init__(
        self,
        title: str,
        total: int,
        done: int,
        console: Console,
        before: str = "starting workers",
        unit: str = "users",
    ) -> None:
        self._title, self._total, self._done, self._unit = title, total, done, unit
        self._console, self._before = console, before
        self._first: tuple[int, float] | None = None  # how many were done before the first moment, and when it was
        self._latest: tuple[int, float] | None = None  # likewise of the latest moment
        self._bar = Progress(
            TextColumn("{task.description}", style="bold", markup=False), BarColumn(bar_width=24),
            TextColumn(f"{{task.completed}}/{{task.total}} {unit}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console,
        ) if console.is_terminal else None  # fmt: skip
        self._task = self._bar.add_task(title, total=total, completed=done) if self._bar else None

    def __enter__(self) -> Self:
        self._began = self._shown = time.monotonic()
        if self._bar:
            self._bar.start()
        else:
            self._console.print(f"[{self._title}] {self._before}", markup=False, highlight=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, users: int) -> None:
        """Count further users as done."""
        now = time.monotonic()
        if self._latest is None or now - self._latest[1] > SECONDS_TOGETHER:
            self._latest = self._done, now
        self._done += users
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=self._done)
            return
        if self._first and now - self._shown < SECONDS_BETWEEN_LINES and self._done < self._total:
            return
        line = f"[{self._title} {now - self._began:5.0f}s] {self._done}/{self._total} {self._unit}"
        self._first = self._first or self._latest
        users_between, seconds = self._latest[0] - self._first[0], self._latest[1] - self._first[1]
        if users_between:
            left = int((self._total - self._done) * seconds / users_between)
            rate, each = users_between / seconds, seconds / users_between
            line += f", {rate:.1f} {self._unit}/s" if rate >= 0.05 else f", {each:.0f} s each"
            line += f", ETA {left // 60}:{left % 60:02d}"
        self._shown = now
        self._console.print(line, markup=False, highlight=False)
