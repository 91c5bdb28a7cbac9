"""Models and baselines on the same candidates of the test requests."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from dmpo_dist.config import RunConfig
from dmpo_dist.data.store import PreparedData
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.baselines import item_knn_scores, oracle_scores, popularity_scores, random_scores
from dmpo_dist.evaluation.report import comparison_lines, evaluate_scores, evaluation_table, write_evaluation
from dmpo_dist.evaluation.scoring import score_requests
from dmpo_dist.evaluation.whole_catalogue import WholeCatalogue, catalogue_table, summary
from dmpo_dist.modeling.backbone import find_model
from dmpo_dist.orchestration.stage import template_of

BASELINES = ("random", "popularity", "item_knn", "oracle")


def preflight(models: dict[str, str], config: RunConfig) -> PreparedData:
    """Check data and models in every way that needs no weights; returns the data.

    Raises:
        UserError: no prepared data, no test requests, a model named like a baseline; see also ``template_of``.
    """
    if config.data.path is None:
        raise UserError(
            "data.path is not set; give the folder that `dmpo data prepare` wrote, as in data.path=runs/data"
        )
    data = PreparedData.load(config.data.path)
    if not len(data.test):
        raise UserError(f"{config.data.path} holds no test requests to evaluate on; see its card.md")
    for name, path in models.items():
        if name in BASELINES:
            raise UserError(f"--model {name}={path}: {name} is the name of a baseline; choose another name")
        template_of(path, config)
    return data


def evaluate(
    models: dict[str, str], config: RunConfig, folder: Path, console: Console, catalogue: bool = False
) -> dict[str, Any]:
    """Rank the test requests by every model and baseline, write the figures to ``folder`` and show the table.

    Args:
        models: name in the table -> model folder or hub id.
        config: ``data.path`` says which requests.
        folder: gets evaluation.json, evaluation.md and scores.parquet.
        catalogue: also rank among the whole catalogue, under the key ``catalogue`` of evaluation.json.

    Raises:
        UserError: see ``preflight``, or a model that cannot be loaded or whose scores are not finite.
    """
    data = preflight(models, config)
    whole = WholeCatalogue(data) if catalogue else None
    scores = baseline_scores(data, config, console)
    torch.set_num_threads(os.cpu_count() or 1)
    for name, path in models.items():
        _note_quantization(name, path, config, console)
        with console.status(f"scoring {name}"):
            scores[name] = score_requests(path, config, data.test)
        _require_finite(f"--model {name}={path}", scores[name], config.model.dtype)
    oracle = oracle_scores(data.test)
    if oracle is not None:
        scores["oracle"] = oracle
    evaluation = evaluate_scores(scores, data.test, config.evaluation.bootstrap_samples, config.seed)
    evaluation["data"] = {"path": str(config.data.path), "fingerprint": data.fingerprint}
    evaluation["folders"] = models
    if whole is not None:
        metrics = whole.baselines(config)
        for name, path in models.items():
            with console.status(f"ranking the whole catalogue by {name}"):
                metrics[name] = whole.model(path, config)
        evaluation["catalogue"] = summary(metrics, len(whole.items), config.evaluation.bootstrap_samples, config.seed)
    write_evaluation(folder, evaluation, scores, data.test)
    console.print(evaluation_table(evaluation))
    for line in comparison_lines(evaluation):
        console.print(line, highlight=False)
    if whole is not None:
        console.print(catalogue_table(evaluation["catalogue"], evaluation["requests"]))
    console.print(f"written to {folder}/evaluation.json, evaluation.md and scores.parquet", highlight=False)
    return evaluation


def _note_quantization(name: str, path: str, config: RunConfig, console: Console) -> None:
    """Say so where a model is ranked on another base than it was trained on."""
    trained, now = find_model(path).stamp.get("quantization", "none"), config.model.quantization
    if trained != now:
        console.print(
            f"note: {name} was trained with model.quantization={trained} and is scored with {now}", highlight=False
        )


def _require_finite(model: str, scores: list[np.ndarray], dtype: str) -> None:
    flat = np.concatenate(scores)
    bad = ~np.isfinite(flat)
    if bad.any():
        raise UserError(
            f"{model}: {int(bad.sum())} of {len(flat)} scores are not finite, the first is {flat[bad][0]}; its training "
            f"diverged or its weights are damaged, or model.dtype={dtype} is too narrow for it: try model.dtype=float32"
        )


def baseline_scores(data: PreparedData, config: RunConfig, console: Console) -> dict[str, list[np.ndarray]]:
    """Random, and where there is an interaction log, popularity at request time and item-kNN up to the test cut."""
    scores = {"random": random_scores(data.test, config.seed)}
    if data.interactions is None:
        console.print("no popularity and item-kNN baselines: the data came as ready preferences, without a log")
        return scores
    scores["popularity"] = popularity_scores(data.test, data.interactions)
    if data.card["cuts"] is None:
        console.print("no item-kNN baseline: with leave-one-out there is no moment that parts training from test")
        return scores
    cut = data.card["cuts"]["test"]["timestamp"]
    scores["item_knn"] = item_knn_scores(data.test, data.interactions, config.evaluation.knn_neighbours, cut)
    return scores
