"""What a training run left in its folder, read back."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from dmpo_dist.config.submit import SubmitConfig
from dmpo_dist.errors import UserError
from dmpo_dist.figures.curves import has_values, read_records, series

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.yaml"
LAST_FIGURES = ("loss", "margin", "accuracy")
VALIDATION_METRICS = ("ndcg@10", "hr@1", "mrr", "auc")


@dataclass(frozen=True)
class Run:
    """One training stage's folder.

    Attributes:
        folder: where it is.
        config: the resolved configuration.
        environment: versions, commit, seed, data; empty where the file is missing.
        records: everything in metrics.jsonl, in order.
    """

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    records: list[dict[str, Any]]

    @cached_property
    def start(self) -> dict[str, Any]:
        """The first record, empty if the run never came to train."""
        return next((r for r in self.records if r["kind"] == "start"), {})

    @cached_property
    def end(self) -> dict[str, Any]:
        """The last record of a finished run, else empty."""
        return next((r for r in reversed(self.records) if r["kind"] == "end"), {})

    @cached_property
    def train(self) -> pd.DataFrame:
        """Training figures by step."""
        return series(self.records)[0]

    @cached_property
    def validation(self) -> pd.DataFrame:
        """Validation figures by step; step 0 is the starting model."""
        return series(self.records)[1]

    @property
    def stage(self) -> str:
        """``sft`` or ``train``, "" if it is not known."""
        if "stage" in self.start:
            return self.start["stage"]
        return "" if self.train.empty else "train" if has_values(self.train, "margin") else "sft"

    @property
    def steps(self) -> tuple[int, int]:
        """Optimizer steps logged, and asked for."""
        done = int(self.train.index.max()) if len(self.train) else 0
        return done, int(self.start.get("steps", 0))

    @property
    def metric(self) -> str:
        """The validation metric the run selects its weights by."""
        return self.config.get(self.stage or "train", {}).get("select_metric", "ndcg@10")

    @property
    def best_step(self) -> int | None:
        """The step whose weights are the result, or would be if the run ended now; None before any validation."""
        if self.end:
            return int(self.end["selected_step"])
        trained = self.validation[self.validation.index > 0]
        return int(trained[self.metric].idxmax()) if has_values(trained, self.metric) else None

    @property
    def groups_per_second(self) -> float | None:
        """Median over the log lines after the first, which is slower."""
        if not has_values(self.train, "groups_per_second"):
            return None
        values = self.train["groups_per_second"]
        return float((values[1:] if len(values) > 1 else values).median())

    def result(self) -> dict[str, float]:
        """The final figures: of the last log line, and validation at the selected step."""
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
    files = [folder / name for name in (CONFIG_FILE, METRICS_FILE, "environment.json")]
    if not files[0].exists() or not files[1].exists():
        raise UserError(f"{folder} holds no training run (no {CONFIG_FILE} with {METRICS_FILE}); see `dmpo runs list`")
    try:
        config = yaml.safe_load(files[0].read_text(encoding="utf-8"))
        environment = json.loads(files[2].read_text(encoding="utf-8")) if files[2].exists() else {}
        records = read_records(files[1])
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"{folder}: cannot be read ({str(error).splitlines()[0]}); was it edited or copied in part?"
        ) from None
    if not isinstance(config, dict) or not isinstance(environment, dict):
        raise UserError(f"{files[0]}: must hold a mapping of keys to values; was it edited?")
    if config.get("submit") == SubmitConfig().model_dump(mode="json"):
        del config["submit"]  # earlier versions wrote it even where it was wholly default
    return Run(folder, config, environment, records)


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
    return sorted(map(read_run, folders), key=lambda run: run.start.get("time", 0))
