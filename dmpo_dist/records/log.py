"""The log of a run: passes every record to the run's sinks and shows it on the console."""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dmpo_dist.artifacts.log import (
    METRICS_FILE,
    EndRecord,
    NoteRecord,
    StartRecord,
    StepRecord,
    ValidationRecord,
    parse_record,
)
from dmpo_dist.config import StageConfig
from dmpo_dist.figures.curves import CURVES_FILE, plot_curves
from dmpo_dist.records.read import VALIDATION_METRICS, read_run
from dmpo_dist.records.sinks import JsonLines, Sink, TensorBoard
from dmpo_dist.records.tracking import open_trackers
from dmpo_dist.secrets import redact
from dmpo_dist.training.job import Job

NOTABLY_SLOW = 1.1
"""The display names the busiest rank if its time is at least this many times the mean."""
FEW_STEPS = 30
"""Steps below which a stage is told to be short."""
SCRATCH_NOTE = (
    "model.path=scratch: a new model with RANDOM weights, which knows no language; for a pretrained one set "
    "model.path to a folder or hub id"
)
LEGEND = (
    "margin: reward of the positive minus the mean of its negatives'; acc: share of negatives with a log-prob below "
    "the positive's; all columns: docs/RUNS.md"
)


class RunLog:
    """Takes a stage's records in order, shows them and passes them to the run's sinks; draws its curves at the end.

    A terminal shows a progress bar with the latest figures; any other output gets a plain line for each record.

    Args:
        job: its output folder gets ``metrics.jsonl``, ``tensorboard/`` and ``curves.png``; its configuration names
            further trackers.
        console: where records are shown.
        append: continue the files of an interrupted run.
        sinks: further sinks.
    """

    def __init__(self, job: Job, console: Console, append: bool = False, sinks: Sequence[Sink] = ()) -> None:
        folder = job.output
        folder.mkdir(parents=True, exist_ok=True)
        self._job, self._title, self._console = job, folder.name, console
        self._sinks: list[Sink] = [
            JsonLines(folder / METRICS_FILE, append), TensorBoard(folder / "tensorboard"), *sinks,
            *open_trackers(job, lambda text: self._print(f"warning: {text}")),
        ]  # fmt: skip
        self._trained = self._finished = False
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._began = time.monotonic()
        self._first_step: tuple[int, float] | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}", style="bold", markup=False), BarColumn(bar_width=24),
                TextColumn("{task.completed}/{task.total}"), TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self._console,
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
        result: dict[str, float] = {}
        if self._trained:
            stage, folder = self._job.stage, self._job.output
            run = read_run(folder)
            selected = stage.select_metric if stage.select == "best" else None
            plot_curves(folder / METRICS_FILE, folder / CURVES_FILE, selected, run.model)
            result = run.result()
        for sink in self._sinks:
            sink.close(result, self._finished)

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Take one record; a record without ``time`` gets the current time."""
        parsed = parse_record({"time": time.time(), **record}, self._job.kind)
        for sink in self._sinks:
            sink.write(parsed)
        match parsed:
            case StartRecord():
                self._first_step = None  # workers that start anew go back to a checkpoint, and may be fewer
                self._print(_start_line(parsed, self._job.stage))
                for text in _advice(parsed, self._job):
                    self._print(text)
                if self._job.kind != "sft":
                    self._print(LEGEND)
                if self._progress is not None and self._task is not None:
                    self._progress.update(self._task, total=parsed.steps, figures="first step")
            case StepRecord():
                self._trained = True
                self._show_step(parsed)
            case ValidationRecord():
                found = parsed.figures()
                shown = " ".join(f"{name} {found[name]:.4f}" for name in VALIDATION_METRICS if name in found)
                self._print(f"step {parsed.step} validation {shown}")
            case NoteRecord():
                self._print(parsed.text)
            case EndRecord():
                self._finished = True
                self._print(_end_line(parsed))

    def _show_step(self, record: StepRecord) -> None:
        figures = _figures(record)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=record.step, figures=figures)
            return
        self._print(f"step {record.step}/{record.total_steps} {figures}{self._left(record)}")

    def _left(self, record: StepRecord) -> str:
        now = time.monotonic()
        if self._first_step is None:
            self._first_step = (record.step, now)
            return ""
        done = record.step - self._first_step[0]
        seconds = (now - self._first_step[1]) / max(1, done) * ((record.total_steps or record.step) - record.step)
        return f" ETA {int(seconds // 60)}:{int(seconds % 60):02d}"

    def _print(self, text: str) -> None:
        line = f"[{self._title} {time.monotonic() - self._began:5.0f}s] {redact(text)}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _figures(record: StepRecord) -> str:
    parts = [f"loss {record.loss:.4f}"]
    if record.margin is not None and record.accuracy is not None:
        parts += [f"margin {record.margin:+.3f}", f"acc {record.accuracy:.3f}"]
    parts += [
        f"{record.groups_per_second:.1f} groups/s",
        f"{record.tokens_per_second:,.0f} tok/s",
        f"{record.memory_gib:.2f} GiB",
    ]
    if record.slowest_share is not None and record.slowest_share >= NOTABLY_SLOW:
        parts.append(f"rank {record.slowest_rank} busiest, {record.slowest_share:.2f} x the mean")
    if record.refresh_seconds:
        parts.append(f"titles searched in {record.refresh_seconds:.1f} s ({record.refresh_share or 0.0:.0%})")
    constant = (record.model_extra or {}).get("constant_reward")
    if constant:
        parts.append(f"no gradient from {constant:.0%} of the groups, whose rewards are equal")
    return " ".join(parts)


def _start_line(record: StartRecord, stage: StageConfig) -> str:
    passes = ""
    if record.groups:
        in_a_pass = math.ceil(record.groups / stage.global_batch_size)  # steps; fewer groups than a batch are one
        passes = f": about {record.steps / in_a_pass:.1f} passes"
    return (
        f"{record.groups} groups, {record.steps} steps{passes}; on {record.world_size} x {record.device}, "
        f"ZeRO-{record.deepspeed['zero_optimization']['stage']}, {record.trainable:,} of "
        f"{record.parameters:,} parameters, attention {record.route} ({record.route_reason}), "
        f"reference {record.reference}, rows of up to {record.token_budget} tokens"
        + (f", {record.truncated} histories shortened" if record.truncated else "")
    )


def _advice(record: StartRecord, job: Job) -> list[str]:
    """What a user may have overlooked: random weights, or few steps that nobody asked for."""
    said = [SCRATCH_NOTE] if job.config.model.path == "scratch" else []
    if job.stage.steps is None and record.steps < FEW_STEPS:
        said.append(
            f"{record.steps} steps are few to learn from: raise {job.section}.epochs, or lower "
            f"{job.section}.global_batch_size={job.stage.global_batch_size}"
        )
    return said


def _end_line(record: EndRecord) -> str:
    if record.selected_step or record.start is None:
        return f"done: the weights of step {record.selected_step} are in {record.model}"
    return (
        f"done: no step was better than the start ({record.select_metric} {record.start:.3f} at step 0, best later "
        f"{record.best_later:.3f} at step {record.best_later_step}); the result is the start, in {record.model}"
    )


def make_console() -> Console:
    """The console all commands share: to standard output, without markup, as names may hold brackets."""
    console = Console(file=sys.stdout, markup=False)
    return console if console.is_terminal else Console(file=sys.stdout, markup=False, width=120)
