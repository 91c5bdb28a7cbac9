"""The search over a stage's settings: trials by Ray Tune, each of which leaves an ordinary run."""

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from dmpo_dist.artifacts.tuning import Search, Trial
from dmpo_dist.cluster.train import ray_session
from dmpo_dist.cluster.tune import END, SHARE, VALUE, Halving, run_trials
from dmpo_dist.commands.train import with_absolute_paths
from dmpo_dist.config import RunConfig
from dmpo_dist.config.tune import TuneConfig
from dmpo_dist.records.read import has_begun, read_run
from dmpo_dist.training.job import Kind
from dmpo_dist.tuning.space import with_values
from dmpo_dist.tuning.trial import TrialJob, train_trial

TRIALS = "trials"
"""Below output_dir: a folder for each trial, with its run in ``RUN``."""
RUN = "run"
SCRATCH = ".ray-tune"
WEIGHTS = ("best", "checkpoints", "model", "reference")
SAVE_SECONDS = 10.0
"""How often the time spent is written down while trials run."""


def run_folder(output: Path, number: int) -> Path:
    """The folder of the run of trial ``number``."""
    return output / TRIALS / f"{number:03}" / RUN


def search_stage(
    search: Search, values: list[dict[str, Any]], kind: Kind, config: RunConfig, save: Callable[[], None],
    console: Console,
) -> None:  # fmt: skip
    """Run all trials of ``search`` that are not over yet, within what is left of its budget.

    Args:
        search: gets the trials.
        values: of all trials.
        config: ``output_dir`` is that of the tuning, absolute.
        save: writes ``search`` down.

    Raises:
        UserError: the cluster is too small.
    """
    over = {trial.number for trial in search.trials if trial.state != "begun"}
    left = [number for number in range(1, len(values) + 1) if number not in over]
    if not left or search.seconds_left == 0:
        return
    jobs = [
        TrialJob(kind, _of_trial(config, values[n - 1], run_folder(config.output_dir, n)), search.metric) for n in left
    ]
    watch = _Watch(search, values, left, config.output_dir, save, console)
    tune = config.tune
    earlier = [reports for number in sorted(over) if (reports := _reports(config.output_dir, number, search.metric))]
    halving = Halving(100 * tune.earliest_stop, tune.reduction_factor, earlier)
    with ray_session(_room_for(config)):
        run_trials(
            jobs, train_trial, watch, config.cluster, tune.concurrent, search.seconds_left, halving,
            config.output_dir / SCRATCH,
        )  # fmt: skip
    watch.close()


@dataclass
class _Watch:
    """Writes down what becomes of each trial, tells of it, and removes weights that are not the best."""

    search: Search
    values: list[dict[str, Any]]
    numbers: list[int]
    output: Path
    save: Callable[[], None]
    console: Console
    _before: float = field(init=False)
    _started: float = field(init=False)
    _saved: float = 0.0
    _outcomes: dict[int, str] = field(default_factory=dict)
    _began: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._before, self._started = self.search.seconds, time.monotonic()

    def began(self, trial: int) -> None:
        number = self.numbers[trial]
        self._began.setdefault(number, time.monotonic() - self._entry(number).seconds)
        shown = ", ".join(f"{key}={value}" for key, value in self.values[number - 1].items())
        self._say(f"trial {number} of {len(self.values)}: {shown}")
        self._save()

    def reported(self, trial: int, report: Mapping[str, Any]) -> None:
        number = self.numbers[trial]
        if END in report:
            self._outcomes[number] = report[END]
        elif report.get(SHARE):
            self._say(f"trial {number}: {report[SHARE]:.0f} %, {self.search.metric} {report[VALUE]:.4f}")
        self._update(number)

    def ended(self, trial: int, error: str) -> None:
        number = self.numbers[trial]
        entry = self._update(number)
        error = error or self._outcomes.get(number, "")
        if error:
            entry.state, entry.error = "failed", error
        elif number in self._outcomes:
            entry.state = "done"
        elif self.search.hours is not None and self._seconds() >= self.search.hours * 3600:
            entry.state = "out of time"
        else:
            entry.state = "stopped"
        figure = "" if entry.value is None else f", {self.search.metric} {entry.value:.4f} at step {entry.step}"
        self._say(f"trial {number}: {entry.state}{figure}{f': {error}' if error else ''}")
        self._save()
        self._remove_weights()

    def tick(self) -> None:
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self._save()

    def close(self) -> None:
        """Trials that never began, as the time was over before, are no trials."""
        self.search.trials = [trial for trial in self.search.trials if trial.seconds or trial.value is not None]
        self._save()

    def _entry(self, number: int) -> Trial:
        found = next((trial for trial in self.search.trials if trial.number == number), None)
        if found is None:
            found = Trial(number=number, values=self.values[number - 1], state="begun")
            self.search.trials = sorted([*self.search.trials, found], key=lambda trial: trial.number)
        return found

    def _update(self, number: int) -> Trial:
        """The entry of a trial with what its run has reached by now."""
        entry, folder = self._entry(number), run_folder(self.output, number)
        if number in self._began:
            entry.seconds = round(time.monotonic() - self._began[number], 1)
        if not has_begun(folder):
            return entry
        run = read_run(folder)
        figures = dict(run.validation.get(self.search.metric, {}))
        later = {int(step): float(value) for step, value in figures.items() if step and value == value}
        entry.start = figures.get(0)
        if later:
            section = run.config.get("sft" if run.stage == "sft" else "train", {})
            entry.step = max(later) if section.get("select") == "last" else max(later, key=later.__getitem__)
            entry.value = later[entry.step]
            entry.share = round(100 * max(later) / max(1, run.steps[1]), 1)
        return entry

    def _remove_weights(self) -> None:
        """Of all trials that are over, only the best keeps its model, and none its checkpoints."""
        best = self.search.best
        for trial in self.search.trials:
            if trial.state == "begun":
                continue
            keep = {"model"} if best is not None and trial.number == best.number else set()
            for name in {*WEIGHTS} - keep:
                shutil.rmtree(run_folder(self.output, trial.number) / name, ignore_errors=True)

    def _seconds(self) -> float:
        return self._before + time.monotonic() - self._started

    def _save(self) -> None:
        self._saved = time.monotonic()
        self.search.seconds = round(self._seconds(), 1)
        self.save()

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _of_trial(config: RunConfig, values: Mapping[str, Any], folder: Path) -> RunConfig:
    alone = config.cluster.model_copy(update={"workers": 1, "fewest_workers": None, "storage_path": None})
    made = with_values(config.model_copy(update={"tune": TuneConfig()}), values)
    return with_own_paths(made.model_copy(update={"output_dir": folder, "cluster": alone}))


def with_own_paths(config: RunConfig) -> RunConfig:
    """``config`` with absolute paths, also where an axis gave them: Ray Tune starts a trial in a folder of its own."""
    model = config.model
    if Path(model.path).exists():
        model = model.model_copy(update={"path": str(Path(model.path).absolute())})
    return with_absolute_paths(config.model_copy(update={"model": model}))


def _room_for(config: RunConfig) -> Any:
    """Cluster settings under which a local Ray has room for all trials of a time."""
    return config.cluster.model_copy(update={"workers": config.tune.concurrent, "fewest_workers": None})


def _reports(output: Path, number: int, metric: str) -> list[tuple[float, float]]:
    """(percent, value) of every validation of a trial that is over."""
    folder = run_folder(output, number)
    if not has_begun(folder):
        return []
    run = read_run(folder)
    if metric not in run.validation or not run.steps[1]:
        return []
    return [(100 * int(step) / run.steps[1], float(v)) for step, v in run.validation[metric].items() if step]
