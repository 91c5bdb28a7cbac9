"""What the models of an experiment measured, as tables: a row per figure, means over seeds, paired differences."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dmpo_dist.data.store import PreparedData
from dmpo_dist.evaluation.metrics import METRICS, bootstrap_interval
from dmpo_dist.evaluation.report import COMPARED_METRICS
from dmpo_dist.experiment.measure import BASELINES, request_metrics
from dmpo_dist.experiment.parts import FOLDERS, Part
from dmpo_dist.experiment.stamps import EVALUATION_FILE, evaluation_folder, progress
from dmpo_dist.orchestration.runs import VALIDATION_METRICS, Run, read_run

LAST_SHARE = 0.2
"""Of the steps: the final loss is the mean of the log lines in this last part of the training."""
FEWEST_K = "the fewest K"
COUNTS = ("shots", "train_groups", "k")
LOSSES = ("loss", "preference_loss")
POINT = ["dataset", "evaluated_on", "shots", "train_groups", "k", "model", "free"]
"""What one point of a curve has in common; its seeds differ."""


def evaluations(parts: Sequence[Part], data: Mapping[str, PreparedData], output: Path) -> pd.DataFrame:
    """A row for each finished model or baseline and each dataset it was evaluated on.

    Columns: those of ``POINT`` (shots, train_groups and k are <NA> where they mean nothing; shots also for all), part,
    start (name of the SFT start), seed, objective (None but for cells), requests, ``folder`` of the evaluation, ``losses`` (see ``final_losses``).
    """
    rows = []
    for part in parts:
        if progress(part, data).state != "done":
            continue
        losses = final_losses(read_run(part.run)) if part.role == "cell" else {}
        for dataset in part.evaluate_on:
            folder = evaluation_folder(part, dataset)
            facts = _row(part, data) | {"evaluated_on": dataset, "losses": losses, "folder": folder}
            rows += [facts | {"model": model} for model in _read(folder)["models"]]
    for dataset in data:
        folder = output / BASELINES / dataset
        facts = {"dataset": dataset, "evaluated_on": dataset, "losses": {}, "free": "", "folder": folder}
        models = _read(folder)["models"] if (folder / EVALUATION_FILE).exists() else []
        rows += [facts | {"model": model} for model in models]
    columns = [*POINT, "part", "start", "seed", "objective", "losses", "folder"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.astype(dict.fromkeys((*COUNTS, "seed"), "Int64"))


def figures(found: pd.DataFrame) -> pd.DataFrame:
    """``experiment.parquet``: a row for each evaluation in ``found`` and each metric.

    Columns as in ``evaluations`` less the folder, then metric, value, low, high (95 % bootstrap over users), requests,
    and for cells final_train_loss and final_preference_loss.
    """
    rows = []
    for row in found.to_dict("records"):
        folder, losses = row.pop("folder"), row.pop("losses")
        evaluation = _read(folder)
        facts = {"final_train_loss": losses.get("loss"), "final_preference_loss": losses.get("preference_loss")}
        for metric, cell in evaluation["models"][row["model"]].items():
            rows.append(row | {"metric": metric, **cell, "requests": evaluation["requests"]} | facts)
    columns = [c for c in found.columns if c not in ("folder", "losses")]
    columns += ["metric", "value", "low", "high", "requests", "final_train_loss", "final_preference_loss"]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys((*COUNTS, "seed"), "Int64"))


def curves(parts: Sequence[Part], data: Mapping[str, PreparedData]) -> pd.DataFrame:
    """``curves.parquet``: validation metrics and training loss of every finished model by step, as they were logged."""
    rows = []
    for part in parts:
        if progress(part, data).state != "done":
            continue
        run = read_run(part.run)
        for series, frame, names in (("validation", run.validation, VALIDATION_METRICS), ("train", run.train, LOSSES)):
            for name in (name for name in names if name in frame):
                for step, value in frame[name].dropna().items():
                    rows.append(_row(part, data) | {"series": series, "metric": name, "step": step, "value": value})
    columns = [*(c for c in POINT if c not in ("evaluated_on", "model")), "part", "start", "seed", "objective"]
    frame = pd.DataFrame(rows, columns=[*columns, "series", "metric", "step", "value"])
    return frame.astype(dict.fromkeys((*COUNTS, "seed"), "Int64"))


def points(found: pd.DataFrame, samples: int) -> pd.DataFrame:
    """Means over seeds: a row for each point and metric.

    Columns: ``POINT``, metric, value (mean over seeds), low and high (95 % bootstrap over users of that mean), values (one
    per seed), seeds, and the mean losses first_preference_loss, final_preference_loss, final_train_loss.
    """
    rows = []
    for key, group in found.groupby(POINT, dropna=False, sort=False):
        of_seeds = _request_values(group)  # (n_seeds, n_requests, n_metrics)
        mean, low, high = bootstrap_interval(of_seeds.mean(axis=0), samples, seed=0)
        losses = _mean_losses(group)
        for i, metric in enumerate(METRICS):
            rows.append(
                dict(zip(POINT, key, strict=True))
                | {"metric": metric, "value": mean[i], "low": low[i], "high": high[i], "seeds": len(of_seeds)}
                | {"values": of_seeds[:, :, i].mean(axis=1).tolist(), **losses}
            )
    columns = [*POINT, "metric", "value", "low", "high", "seeds", "values"]
    frame = pd.DataFrame(rows, columns=[*columns, "first_preference_loss", "final_preference_loss", "final_train_loss"])
    return frame.astype(dict.fromkeys(COUNTS, "Int64"))


def differences(found: pd.DataFrame, samples: int) -> pd.DataFrame:
    """Cells against their SFT start, SFT continued and the same cell with the fewest K, on their own dataset.

    Columns: ``POINT``, against (sft, sft_continued or "K=1"), metric, value, low, high (95 % paired bootstrap over users of
    the mean over seeds), seeds.
    """
    own = found[found["dataset"] == found["evaluated_on"]]
    rows = []
    for key, group in own[own["objective"].notna()].groupby(POINT, dropna=False, sort=False):
        facts = dict(zip(POINT, key, strict=True))
        for against in ("sft", "sft_continued", FEWEST_K):
            found_others = [_counterpart(own, row, against) for row in group.to_dict("records")]
            others = [other for other in found_others if other is not None]
            if len(others) < len(group):
                continue
            name = f"K={others[0]['k']}" if against == FEWEST_K else against
            gain = (_request_values(group) - _request_values(pd.DataFrame(others))).mean(axis=0)
            mean, low, high = bootstrap_interval(gain, samples, seed=0)
            for metric in COMPARED_METRICS:
                i = METRICS.index(metric)
                row = {"against": name, "metric": metric, "value": mean[i], "low": low[i], "high": high[i]}
                rows.append(facts | row | {"seeds": len(others)})
    frame = pd.DataFrame(rows, columns=[*POINT, "against", "metric", "value", "low", "high", "seeds"])
    return frame.astype(dict.fromkeys(COUNTS, "Int64"))


def final_losses(run: Run) -> dict[str, float]:
    """Mean logged loss over the last part of the training, and what the preference loss was in the first step."""
    train = run.train
    last = train[train.index > (1 - LAST_SHARE) * train.index.max()]
    losses = {name: float(last[name].mean()) for name in LOSSES if name in train}
    if "preference_loss" in train:
        losses["first_preference_loss"] = float(train["preference_loss"].iloc[0])
    return losses


def _row(part: Part, data: Mapping[str, PreparedData]) -> dict[str, Any]:
    cell = part.cell
    return {
        "part": part.title,
        "start": part.start,
        "dataset": cell.dataset,
        "shots": part.shots,
        "train_groups": part.shots or len(data[cell.dataset].train),
        "k": cell.k if part.role == "cell" else None,
        "objective": cell.objective if part.role == "cell" else None,
        "seed": cell.seed,
        "free": ", ".join(f"{key}={value}" for key, value in part.free),
    }


def _request_values(group: pd.DataFrame) -> np.ndarray:
    values = zip(group["folder"], group["model"], strict=True)
    return np.stack([request_metrics(folder, model) for folder, model in values])


def _mean_losses(group: pd.DataFrame) -> dict[str, float]:
    found = pd.DataFrame(group["losses"].tolist())
    names = {"loss": "final_train_loss", "preference_loss": "final_preference_loss"}
    return found.rename(columns=names).mean().to_dict() if len(found.columns) else {}


def _counterpart(own: pd.DataFrame, row: dict[str, Any], name: str) -> dict[str, Any] | None:
    """What a cell's model is compared with: its SFT start, or that start trained on with the cell's groups and axes, or the
    cell that differs in having the fewest negatives (None for that cell itself)."""
    if name == "sft":
        same = own[(own["model"] == name) & (own["part"] == f"{FOLDERS['start']}/{row['start']}")]
    elif name == "sft_continued":
        same = own[
            (own["model"] == name) & (own["start"] == row["start"]) & (own["train_groups"] == row["train_groups"])
        ]
        same = same[[set(free.split(", ")) <= {*row["free"].split(", "), ""} for free in same["free"]]]
    else:
        same = own[own["objective"].notna()]
        for column in ("model", "dataset", "seed", "train_groups", "free"):
            same = same[same[column] == row[column]]
        same = same[same["k"] < row["k"]].sort_values("k")
    return same.to_dict("records")[0] if len(same) else None


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / EVALUATION_FILE).read_text(encoding="utf-8"))
