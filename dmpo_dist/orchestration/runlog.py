"""What a run tells: JSONL and TensorBoard for later, one display for now."""

import json
import math
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SCALARS_LEFT_OUT = {"kind", "step", "total_steps", "time"}


METRICS_FILE = "metrics.jsonl"


class RunLog:
    """Takes a stage's records in order; shows them and writes them to ``folder``.

    On a terminal there is one progress bar with the latest figures; elsewhere one plain line per record.

    Args:
        folder: gets ``metrics.jsonl`` and ``tensorboard/``.
        title: what the stage is called on screen.
        console: where to show it.
        append: go on with the files of an interrupted run.
    """

    def __init__(self, folder: Path, title: str, console: Console, append: bool = False) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS_FILE
        self.start: dict[str, Any] = {}
        self.end: dict[str, Any] = {}
        self._file = self.path.open("a" if append else "w", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"))
        self._title, self._console = title, console
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._began = time.monotonic()
        self._first_step: tuple[int, float] | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[figures]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
                console=self._console,
            )  # fmt: skip
            self._task = self._progress.add_task(self._title, total=None, figures="setting up workers")
            self._progress.start()
        else:
            self._print("setting up workers")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._file.close()
        self._board.close()

    def __call__(self, record: dict[str, Any]) -> None:
        """Take one record."""
        record = {"time": time.time(), **record}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        match record["kind"]:
            case "start":
                self.start = record
                self._print(_start_line(record))
                if self._progress is not None and self._task is not None:
                    self._progress.update(self._task, total=record["steps"], figures="first step")
            case "train":
                self._to_board("train", record)
                self._show_step(record)
            case "validation":
                self._to_board("validation", record)
                names = [n for n in ("ndcg@10", "hr@1", "mrr", "auc") if n in record]
                self._print(f"step {record['step']} validation " + " ".join(f"{n} {record[n]:.4f}" for n in names))
            case "note":
                self._print(record["text"])
            case "end":
                self.end = record
                self._print(f"done: the weights of step {record['selected_step']} are in {record['model']}")

    def _show_step(self, record: dict[str, Any]) -> None:
        figures = _figures(record)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=record["step"], figures=figures)
            return
        self._print(f"step {record['step']}/{record['total_steps']} {figures}{self._left(record)}")

    def _left(self, record: dict[str, Any]) -> str:
        now = time.monotonic()
        if self._first_step is None:
            self._first_step = (record["step"], now)
            return ""
        done = record["step"] - self._first_step[0]
        seconds = (now - self._first_step[1]) / max(1, done) * (record["total_steps"] - record["step"])
        return f" ETA {int(seconds // 60)}:{int(seconds % 60):02d}"

    def _print(self, text: str) -> None:
        line = f"[{self._title} {time.monotonic() - self._began:5.0f}s] {text}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _to_board(self, group: str, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if name not in SCALARS_LEFT_OUT and isinstance(value, int | float) and math.isfinite(value):
                self._board.add_scalar(f"{group}/{name}", value, record["step"])


def _figures(record: dict[str, Any]) -> str:
    parts = [f"loss {record['loss']:.4f}"]
    if "margin" in record:
        parts += [f"margin {record['margin']:+.3f}", f"acc {record['accuracy']:.3f}"]
    parts += [
        f"{record['groups_per_second']:.1f} groups/s",
        f"{record['tokens_per_second']:,.0f} tok/s",
        f"{record['memory_gib']:.2f} GiB",
    ]
    return " ".join(parts)


def _start_line(record: dict[str, Any]) -> str:
    return (
        f"{record['groups']} groups, {record['steps']} steps on {record['world_size']} x {record['device']}, "
        f"ZeRO-{record['deepspeed']['zero_optimization']['stage']}, {record['trainable']:,} of "
        f"{record['parameters']:,} parameters, attention {record['route']} ({record['route_reason']}), "
        f"reference {record['reference']}, rows of up to {record['token_budget']} tokens"
        + (f", {record['truncated']} histories shortened" if record["truncated"] else "")
    )


def make_console() -> Console:
    """The console all commands share; figures go to standard output."""
    console = Console(file=sys.stdout)
    return console if console.is_terminal else Console(file=sys.stdout, width=120)
