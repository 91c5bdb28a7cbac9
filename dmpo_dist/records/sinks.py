"""Sinks take a run's records: the protocol, the two sinks of every run, and a thread for sinks that may fail."""

import json
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol

from dmpo_dist.artifacts.files import naming
from dmpo_dist.artifacts.log import LogRecord, StepRecord, ValidationRecord
from dmpo_dist.secrets import redacted

CLOSE_SECONDS = 60


class Sink(Protocol):
    """Takes the records of one run."""

    def write(self, record: LogRecord) -> None:
        """Take one record."""
        ...

    def close(self, result: Mapping[str, float], finished: bool) -> None:
        """Take the run's final figures and whether it reached its last step; called once, at the end."""
        ...


def figures(record: StepRecord | ValidationRecord) -> dict[str, float]:
    """The finite numbers of a record, named "train/loss", "validation/mrr" and so on, as trackers call them."""
    prefix = "train" if isinstance(record, StepRecord) else "validation"
    return {
        f"{prefix}/{name}": value
        for name, value in record.figures().items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


class JsonLines:
    """Writes a line for each record and flushes it, so that a killed run loses none.

    Args:
        path: the file.
        append: continue the file of an interrupted run.
    """

    def __init__(self, path: Path, append: bool) -> None:
        if append:
            _cut_unfinished_line(path)
        self._path, self._file = path, path.open("a" if append else "w", encoding="utf-8")

    def write(self, record: LogRecord) -> None:
        with naming(self._path):
            self._file.write(json.dumps(redacted(record.content())) + "\n")
            self._file.flush()

    def close(self, result: Mapping[str, float], finished: bool) -> None:
        with naming(self._path):
            self._file.close()


def _cut_unfinished_line(path: Path) -> None:
    """Remove what a writer that was killed, or whose disk was full, left after the last whole line."""
    if path.is_file():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)


class TensorBoard:
    """Writes a TensorBoard event file to ``folder``.

    Not by ``SummaryWriter``, which writes in a thread of its own: that thread dies with a traceback on a full disk, and
    what it has not written yet is lost with a killed process.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # pyrefly: ignore
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(exist_ok=True)
        self._path = folder / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.0"
        self._file = self._path.open("wb", buffering=0)
        self._events, self._make = RecordWriter(self._file), Event
        self._write(Event(file_version="brain.Event:2"))

    def write(self, record: LogRecord) -> None:
        if isinstance(record, StepRecord | ValidationRecord):
            event = self._make(step=record.step)
            for name, value in figures(record).items():
                event.summary.value.add(tag=name, simple_value=value)
            self._write(event)

    def close(self, result: Mapping[str, float], finished: bool) -> None:
        self._file.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        with naming(self._path):
            self._events.write(event.SerializeToString())


class Background:
    """A sink in a thread of its own, so that it may be slow or fail without harm to the run.

    The first failure is shown as a warning and ends the sink.

    Args:
        name: the name of the sink in a warning.
        open_sink: makes the sink, in its thread, when the first record comes.
        warn: shows a line to the user.
    """

    def __init__(self, name: str, open_sink: Callable[[], Sink], warn: Callable[[str], None]) -> None:
        self._name, self._open_sink, self._warn = name, open_sink, warn
        self._work: SimpleQueue[Callable[[Sink], None] | None] = SimpleQueue()
        self._thread: Thread | None = None

    def write(self, record: LogRecord) -> None:
        if self._thread is None:
            self._thread = Thread(target=self._run, name=f"dmpo-{self._name}", daemon=True)
            self._thread.start()
        self._work.put(lambda sink: sink.write(record))

    def close(self, result: Mapping[str, float], finished: bool) -> None:
        if self._thread is None:
            return
        self._work.put(lambda sink: sink.close(result, finished))
        self._work.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._warn(
                f"{self._name} did not take the last figures within {CLOSE_SECONDS} s; they are in the run's folder"
            )

    def _run(self) -> None:
        try:
            sink = self._open_sink()
            for work in iter(self._work.get, None):
                work(sink)
        except Exception as error:  # whatever a tracker's client or server comes up with
            first = (str(error).strip() or repr(error)).splitlines()[0]
            self._warn(f"{self._name} failed ({first}); the run goes on without it, its figures are in its folder")
