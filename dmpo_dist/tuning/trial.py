"""One trial in its process: a stage trained as always, whose validations are reported as they come."""

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from dmpo_dist.artifacts.locks import only_one
from dmpo_dist.artifacts.log import LogRecord, StartRecord, ValidationRecord
from dmpo_dist.cluster.tune import END, SHARE, VALUE, Report
from dmpo_dist.commands.run_folder import last_checkpoint
from dmpo_dist.commands.train import as_rank
from dmpo_dist.config import RunConfig
from dmpo_dist.errors import UserError
from dmpo_dist.quiet import silence_libraries
from dmpo_dist.records.read import has_begun, read_run
from dmpo_dist.training.engine import single_rank
from dmpo_dist.training.job import Kind
from dmpo_dist.training.worker import run

LOG_FILE = "log.txt"
"""What the trial would have printed."""
FREED_SECONDS = 60
"""How long to wait for a process of an interrupted command, which ends soon after its driver."""


@dataclass(frozen=True)
class TrialJob:
    """A stage to train; the run goes to ``config.output_dir``, and what it prints to ``LOG_FILE`` beside that."""

    kind: Kind
    config: RunConfig
    metric: str


def train_trial(job: TrialJob, report: Report) -> None:
    """Train ``job``, from its latest checkpoint if it was interrupted, and report each validation but the start's.

    A setting with which training fails is a report too, as the others go on.
    """
    silence_libraries()
    output = job.config.output_dir
    output.parent.mkdir(parents=True, exist_ok=True)
    _await_free(output)
    resume = has_begun(output)
    if not resume:
        shutil.rmtree(output, ignore_errors=True)  # opened, but its training never began
    reports = Reports(job.metric, report)
    with (output.parent / LOG_FILE).open("a", encoding="utf-8") as log, single_rank():
        console = Console(file=log, width=120, markup=False)
        try:
            if resume:
                reports.repeat(output)
            as_rank(job.kind, job.config, console, resume, run, sinks=[reports], again=True)
        except (UserError, RuntimeError) as error:  # it diverged, or memory ran out: other settings may do
            report({**reports.last, END: " ".join(str(error).split()) or type(error).__name__})
            return
    report({**reports.last, END: ""})


@dataclass
class Reports:
    """A sink that reports validations. The last one is kept for the end: after it the trial may be stopped no more."""

    metric: str
    report: Report
    last: dict[str, float] = field(default_factory=lambda: {SHARE: 0.0, VALUE: 0.0})
    _steps: int = 0

    def write(self, record: LogRecord) -> None:
        if isinstance(record, StartRecord):
            self._steps = record.steps
        if isinstance(record, ValidationRecord) and record.step:
            self.last = {SHARE: 100 * record.step / self._steps, VALUE: record.figures()[self.metric]}
            if record.step < self._steps:
                self.report(self.last)

    def close(self, result: Mapping[str, float], finished: bool) -> None:
        pass

    def repeat(self, folder: Path) -> None:
        """Report again what the run in ``folder`` has reached up to its latest checkpoint."""
        found, until = read_run(folder), last_checkpoint(folder)
        for record in found.log.records:
            if isinstance(record, StartRecord) or (isinstance(record, ValidationRecord) and record.step <= until):
                self.write(record)


def _await_free(folder: Path) -> None:
    """Wait until no process of an interrupted command is at work in ``folder``."""
    deadline = time.monotonic() + FREED_SECONDS
    while True:
        try:
            with only_one(folder):
                return
        except UserError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
