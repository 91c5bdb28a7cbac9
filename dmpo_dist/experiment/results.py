"""The results of an experiment as tables: a row for each figure, means over seeds, paired differences."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dmpo_dist.artifacts.evaluation import Evaluation
from dmpo_dist.data.store import PreparedData
from dmpo_dist.evaluation.comparisons import COMPARED_METRICS
from dmpo_dist.evaluation.metrics import METRICS, bootstrap_p
from dmpo_dist.evaluation.seeds import SeededValues
from dmpo_dist.experiment.baselines import baseline_fits
from dmpo_dist.experiment.measure import request_metrics
from dmpo_dist.experiment.parts import CONTINUED, FOLDERS, UNTUNED, ZERO_SHOT, Part
from dmpo_dist.experiment.stamps import baseline_settings, evaluated, evaluation_folder, progress
from dmpo_dist.records.read import VALIDATION_METRICS, Run, read_run

LAST_SHARE = 0.2
"""The final loss is the mean over the log lines in this last share of the steps."""
FEWEST_K = "the fewest K"
_BEFORE = {"k": None, "objective": None, "losses": {}, "others": {}}
SAME_CELL = ("dataset", "seed", "train_groups", "free")
BOOTSTRAP_SEED = 0
"""The default of `dmpo evaluate`, so that both give the same interval for the same models."""
COUNTS = ("shots", "train_groups", "k")
LOSSES = ("loss", "preference_loss")
POINT = ["dataset", "evaluated_on", "shots", "train_groups", "k", "model", "free"]
"""Columns that identify a point of a curve; its rows differ in their seed."""
NOT_SHOWN = ("losses", "folder", "others", "scored_as")


def evaluations(parts: Sequence[Part], data: Mapping[str, PreparedData], output: Path) -> pd.DataFrame:
    """A row for each finished model or baseline and each dataset it was evaluated on.

    Columns: those of ``POINT`` (shots, train_groups and k are <NA> where they do not apply, and shots also where all
    groups are used), part, start (name of the SFT start), seed, objective (None except for cells), and four that no
    file shows: ``folder`` of the evaluation, ``scored_as`` (the model's name in it), ``losses`` (see ``final_losses``),
    ``others`` (arm -> the part that holds what a cell is compared with).
    """
    rows = []
    for part in parts:
        if progress(part, data).state != "done":
            continue
        losses = final_losses(read_run(part.run)) if part.role == "cell" else {}
        for dataset in part.evaluate_on:
            folder = evaluation_folder(part, dataset)
            described = _row(part, data) | {"evaluated_on": dataset, "losses": losses, "folder": folder}
            for model in Evaluation.read(folder).models:
                before = _BEFORE | {"free": part.distinct_before} if model == UNTUNED and part.role == "cell" else {}
                rows.append(described | before | {"model": part.called(model), "scored_as": model})
    for fit in baseline_fits(list(data), parts, output):
        prepared = data[fit.dataset]
        described = {
            "dataset": fit.dataset,
            "evaluated_on": fit.dataset,
            "losses": {},
            "free": "",
            "folder": fit.folder,
        }
        if fit.few:
            described |= {"shots": fit.shots, "train_groups": fit.shots or len(prepared.train), "seed": fit.seed}
        current = evaluated(fit.folder, prepared, baseline_settings(fit.config))
        models = Evaluation.read(fit.folder).models if current else []
        rows += [described | {"model": model, "scored_as": model} for model in models]
    columns = [*POINT, "part", "start", "seed", "objective", *NOT_SHOWN]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.astype(dict.fromkeys((*COUNTS, "seed"), "Int64"))


def figures(found: pd.DataFrame) -> pd.DataFrame:
    """``experiment.parquet``: a row for each evaluation in ``found`` and each metric.

    Columns as in ``evaluations`` without ``NOT_SHOWN``, then metric, value, low, high (95 % bootstrap over users),
    requests, and for cells final_train_loss and final_preference_loss.
    """
    rows = []
    for row in found.to_dict("records"):
        losses, folder, _, scored_as = (row.pop(name) for name in NOT_SHOWN)
        evaluation = Evaluation.read(folder)
        described = {"final_train_loss": losses.get("loss"), "final_preference_loss": losses.get("preference_loss")}
        for metric, cell in evaluation.models[scored_as].items():
            rows.append(row | {"metric": metric, **cell.content(), "requests": evaluation.requests} | described)
    columns = [c for c in found.columns if c not in NOT_SHOWN]
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

    Columns: ``POINT``, metric, value (mean over seeds), low and high (95 % bootstrap over users and seeds), values (one
    per seed), seeds, and the mean losses first_preference_loss, final_preference_loss, final_train_loss.
    """
    rows = []
    for key, group in found.groupby(POINT, dropna=False, sort=False):
        seeded = _seeded(group)
        mean, low, high = seeded.interval(samples, BOOTSTRAP_SEED)
        losses = _mean_losses(group)
        for i, metric in enumerate(METRICS):
            rows.append(
                dict(zip(POINT, key, strict=True))
                | {"metric": metric, "value": mean[i], "low": low[i], "high": high[i], "seeds": len(seeded.seeds)}
                | {"values": seeded.by_seed()[:, i].tolist(), **losses}
            )
    columns = [*POINT, "metric", "value", "low", "high", "seeds", "values"]
    frame = pd.DataFrame(rows, columns=[*columns, "first_preference_loss", "final_preference_loss", "final_train_loss"])
    return frame.astype(dict.fromkeys(COUNTS, "Int64"))


def differences(found: pd.DataFrame, samples: int) -> pd.DataFrame:
    """Cells minus others on their own dataset, paired.

    The others are what a cell started from (zero-shot or untuned, and SFT), SFT continued at equal steps and at equal
    compute, the same cell with the fewest negatives, the same cell with the first objective of the grid, and the
    baselines. A baseline has one fit for all seeds.

    Columns: ``POINT``, against (a model's name, or "K=1"), metric, value, low, high (95 % bootstrap over users and
    seeds, paired over both), p (two-sided, before any correction), seeds.
    """
    own = found[found["dataset"] == found["evaluated_on"]]
    baselines = list(dict.fromkeys(own[own["part"].isna()]["model"]))
    cells = own[own["objective"].notna()]
    first = cells.groupby("dataset")["model"].first()  # in the order of the grid
    rows = []
    for key, group in cells.groupby(POINT, dropna=False, sort=False):
        described = dict(zip(POINT, key, strict=True))
        rows_of_seeds = group.to_dict("records")
        objective = {first[described["dataset"]]} - {described["model"]}
        for against in (ZERO_SHOT, UNTUNED, "sft", *CONTINUED, FEWEST_K, *objective, *baselines):
            if against == FEWEST_K:
                found_others = _fewest_negatives(own, rows_of_seeds)
            else:
                found_others = [_counterpart(own, row, against) for row in rows_of_seeds]
            others = [other for other in found_others if other is not None]
            if len(others) < len(group):
                continue
            name = f"K={others[0]['k']}" if against == FEWEST_K else against
            own_values, other_values = _seeded(group), _seeded(pd.DataFrame(others))
            gain = SeededValues(own_values.seeds, own_values.values - other_values.values)
            drawn = gain.resampled(samples, BOOTSTRAP_SEED)
            low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
            mean, p = gain.mean(), bootstrap_p(drawn, len(gain.values))
            for metric in COMPARED_METRICS:
                i = METRICS.index(metric)
                row = {"against": name, "metric": metric, "value": mean[i], "low": low[i], "high": high[i], "p": p[i]}
                rows.append(described | row | {"seeds": len(others)})
    frame = pd.DataFrame(rows, columns=[*POINT, "against", "metric", "value", "low", "high", "p", "seeds"])
    return frame.astype(dict.fromkeys(COUNTS, "Int64"))


def final_losses(run: Run) -> dict[str, float]:
    """Mean logged losses over the last part of the training, and the preference loss of the first step."""
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
        "free": part.distinct,
        "others": part.others,
    }


def _seeded(group: pd.DataFrame) -> SeededValues:
    """A point's values (n_requests, n_seeds, n_metrics), with its seeds in the order of `dmpo evaluate`."""
    ordered = group.assign(label=group["seed"].astype(str)).sort_values("label")
    values = [request_metrics(*row) for row in zip(ordered["folder"], ordered["scored_as"], strict=True)]
    return SeededValues(tuple(ordered["label"]), np.stack(values, axis=1))


def _mean_losses(group: pd.DataFrame) -> dict[str, float]:
    found = pd.DataFrame(group["losses"].tolist())
    names = {"loss": "final_train_loss", "preference_loss": "final_preference_loss"}
    return found.rename(columns=names).mean().to_dict() if len(found.columns) else {}


def _counterpart(own: pd.DataFrame, row: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The row that a cell's model is compared with.

    By ``name`` that is its SFT start or what this started from, the start continued by SFT on the cell's groups, the
    cell that has another objective and all else alike, or a baseline, fitted on the whole log or on the cell's own
    groups. None where there is no such row.
    """
    if name in ("sft", ZERO_SHOT, UNTUNED):
        with_it = row["others"].get(name, f"{FOLDERS['start']}/{row['start']}")
        same = own[(own["model"] == name) & (own["part"] == with_it)]
    elif name in CONTINUED:
        same = own[(own["model"] == name) & (own["part"] == row["others"].get(name))]
    elif name in set(own["objective"]):
        same = _like(row, own[own["objective"] == name], ("k", *SAME_CELL))
    else:
        same = own[(own["model"] == name) & own["part"].isna() & (own["dataset"] == row["dataset"])]
        for column in ("train_groups", "seed"):  # a baseline may have one fit for all of either
            same = same[same[column].isna() | (same[column] == row[column]).fillna(False)]
    return same.to_dict("records")[0] if len(same) else None


def _fewest_negatives(own: pd.DataFrame, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any] | None]:
    """For each seed's row of a cell the same cell with the fewest negatives of which all these seeds have one."""
    by_k: list[dict[int, dict[str, Any]]] = []  # of each seed: K -> the cell
    for row in rows:
        same = _like(row, own[own["objective"].notna() & (own["k"] < row["k"])], ("model", *SAME_CELL))
        by_k.append({other["k"]: other for other in same.to_dict("records")})
    fewest = min(set.intersection(*map(set, by_k)), default=None)
    return [None if fewest is None else others[fewest] for others in by_k]


def _like(row: dict[str, Any], others: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Those of ``others`` that are equal to ``row`` in ``columns``."""
    for column in columns:
        others = others[others[column] == row[column]]
    return others


def notes(found: pd.DataFrame) -> list[str]:
    """Notes on the baselines in ``found`` that a reader must know."""
    baselines = found[found["part"].isna()].drop_duplicates("folder")
    return [
        f"{dataset}: {note}"
        for dataset, folder in zip(baselines["dataset"], baselines["folder"], strict=True)
        for note in Evaluation.read(folder).notes
    ]
