"""Reading the folder of a training run."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from dmpo_dist.artifacts.base import read_config
from dmpo_dist.artifacts.environment import Environment
from dmpo_dist.artifacts.log import (
    COMMANDS,
    METRICS_FILE,
    EndRecord,
    MetricsLog,
    StartRecord,
    StepRecord,
    ValidationRecord,
    by_step,
    read_log,
)
from dmpo_dist.config.submit import SubmitConfig
from dmpo_dist.errors import UserError
from dmpo_dist.figures.curves import has_values
from dmpo_dist.figures.models import model_of_run

CONFIG_FILE = "config.yaml"
LAST_FIGURES = ("loss", "margin", "accuracy")
VALIDATION_METRICS = ("ndcg@10", "hr@1", "mrr", "auc")


@dataclass(frozen=True)
class Run:
    """One training stage's folder.

    Attributes:
        folder: the folder.
        config: the resolved configuration.
        environment: versions, commit, seed, data; empty where the file is missing.
        log: the content of metrics.jsonl.
    """

    folder: Path
    config: dict[str, Any]
    environment: Environment
    log: MetricsLog

    @cached_property
    def start(self) -> StartRecord | None:
        """The latest start record, of a run that was resumed the one since then; None if training never began."""
        return next((r for r in reversed(self.log.records) if isinstance(r, StartRecord)), None)

    @cached_property
    def end(self) -> EndRecord | None:
        """The end record, None for a run that has not finished, or is being extended."""
        latest = next((r for r in reversed(self.log.records) if isinstance(r, StartRecord | EndRecord)), None)
        return latest if isinstance(latest, EndRecord) else None

    @cached_property
    def train(self) -> pd.DataFrame:
        """Training figures by step."""
        return by_step(self.log.records, StepRecord)

    @cached_property
    def validation(self) -> pd.DataFrame:
        """Validation figures by step; step 0 is the starting model."""
        return by_step(self.log.records, ValidationRecord)

    @property
    def stage(self) -> str:
        """The command that trained the model, ``sft`` or ``train``; "" if it is not known."""
        stages = (r.stage for r in self.log.records if isinstance(r, StartRecord | StepRecord))
        return next((COMMANDS[stage] for stage in stages if stage), "")

    @property
    def model(self) -> str:
        """The model that the run makes, by the name of its method; figures colour it by that."""
        objective = (self.config.get("objective") or {}) if self.stage == "train" else {"name": "sft"}
        return model_of_run(
            self.folder.resolve().name, str(objective.get("name") or "dmpo"), bool(objective.get("sft_weight"))
        )

    @property
    def began(self) -> float:
        """Unix time of the first start record, 0 if it is not known."""
        return next((r.time or 0.0 for r in self.log.records if isinstance(r, StartRecord)), 0.0)

    @property
    def steps(self) -> tuple[int, int]:
        """Optimizer steps done, and steps of the whole run."""
        done = int(self.train.index.max()) if len(self.train) else 0
        return done, self.start.steps if self.start else 0

    @property
    def metric(self) -> str:
        """The validation metric by which the run selects its weights."""
        return self.config.get(self.stage or "train", {}).get("select_metric", "ndcg@10")

    @property
    def best_step(self) -> int | None:
        """The step whose weights are the result, or would be if the run ended now; None before any validation.

        Of a run that keeps its last weights and goes on, the last step that was validated.
        """
        if self.end:
            return self.end.selected_step
        if self.config.get(self.stage or "train", {}).get("select") == "last" and len(self.validation):
            return int(self.validation.index[-1])
        return int(self.validation[self.metric].idxmax()) if has_values(self.validation, self.metric) else None

    @property
    def groups_per_second(self) -> float | None:
        """Median over the log lines; the first one is left out, as it is slower."""
        if not has_values(self.train, "groups_per_second"):
            return None
        values = self.train["groups_per_second"]
        return float((values[1:] if len(values) > 1 else values).median())

    def result(self) -> dict[str, float]:
        """The final figures: those of the last log line, and of validation at the selected step."""
        figures = {name: float(self.train[name].iloc[-1]) for name in LAST_FIGURES if has_values(self.train, name)}
        if self.groups_per_second is not None:
            figures["groups_per_second"] = self.groups_per_second
        if self.best_step is not None:
            figures["selected_step"] = self.best_step
        if self.best_step in self.validation.index:
            row = self.validation.loc[self.best_step]
            figures |= {f"validation/{name}": float(row[name]) for name in VALIDATION_METRICS if name in row.dropna()}
        return figures


def read_run(folder: Path) -> Run:
    """The run in ``folder``.

    Raises:
        UserError: it holds no training run, or its files cannot be read.
    """
    if not (folder / CONFIG_FILE).exists() or not (folder / METRICS_FILE).exists():
        raise UserError(f"{folder} holds no training run (no {CONFIG_FILE} with {METRICS_FILE}); see `dmpo runs list`")
    config = read_config(folder / CONFIG_FILE)
    _require_sections(config, folder / CONFIG_FILE)
    if config.get("submit") == SubmitConfig().model_dump(mode="json"):
        del config["submit"]  # earlier versions wrote it even where it was wholly default
    environment = Environment.read_if_there(folder) or Environment()
    return Run(folder, config, environment, read_log(folder / METRICS_FILE))


def _require_sections(config: dict[str, Any], file: Path) -> None:
    """Whether ``config`` has what tables and reports take from it.

    Raises:
        UserError: a part of it is missing, as where the file was cut.
    """
    for section, key in (("model", "path"), ("objective", "name")):
        found = config.get(section)
        if not isinstance(found, dict) or not isinstance(found.get(key), str):
            raise UserError(f"{file}: damaged, it has no {section}.{key}; restore it, or remove the run's folder")


def has_begun(folder: Path) -> bool:
    """Whether training began there: the log has a start record, as folder and empty log exist before the workers."""
    log = folder / METRICS_FILE
    if not log.exists() or not (folder / CONFIG_FILE).exists():
        return False
    return any(isinstance(record, StartRecord) for record in read_log(log).records)


def find_runs(root: Path) -> list[Run]:
    """The training runs in and below ``root``, oldest first.

    Raises:
        UserError: there is no such folder, or no run in it.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give the folder that holds your output_dirs, such as runs")
    folders = sorted(path.parent for path in root.rglob(METRICS_FILE) if (path.parent / CONFIG_FILE).exists())
    if not folders:
        raise UserError(
            f"{root} holds no training run (no {CONFIG_FILE} with {METRICS_FILE}); give the folder above one"
        )
    return sorted(map(read_run, folders), key=lambda run: run.began)
