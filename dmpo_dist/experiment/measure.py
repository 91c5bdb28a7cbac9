"""Evaluating all models of an experiment and all baselines on the same test candidates of each dataset."""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from dmpo_dist.artifacts.evaluation import SCORES_FILE, weights_digest
from dmpo_dist.commands.scored_parts import PartScorer
from dmpo_dist.config import RunConfig
from dmpo_dist.data.store import PreparedData
from dmpo_dist.evaluation.baseline_scores import baseline_scores, notes_of
from dmpo_dist.evaluation.baselines import oracle_scores
from dmpo_dist.evaluation.metrics import METRICS, ranking_metrics
from dmpo_dist.evaluation.ranking import load_ranking_model
from dmpo_dist.evaluation.report import evaluate_scores, write_evaluation
from dmpo_dist.evaluation.rules import RuledScores, asks_for_rules, ruled_scores, rules_figures
from dmpo_dist.experiment.baselines import BaselineFit
from dmpo_dist.experiment.parts import Part
from dmpo_dist.experiment.stamps import baseline_settings, evaluated, evaluation_folder, model_settings, to_evaluate


def measure_part(part: Part, data: Mapping[str, PreparedData], study: Path, console: Console) -> None:
    """Evaluate a trained part on each of its datasets, unless it has an evaluation there by the same settings.

    Args:
        study: its folder keeps parts of the scores, which other parts of the study may ask for, too.

    Raises:
        UserError: the model cannot be loaded, or its scores are not finite.
    """
    for dataset in to_evaluate(part, data):
        scores: dict[str, list[np.ndarray]] = {}
        ruled: dict[str, RuledScores] = {}
        for name, path in part.measured.items():
            model = load_ranking_model(str(path), part.config)
            title = f"{part.called(name)} of {part.title} on {dataset}"
            score = PartScorer(
                title, str(path), str(path), model, data[dataset], part.config, study, console, here=True
            )
            scores[name] = score("test")
            if asks_for_rules(part.config.evaluation):
                ruled[name] = ruled_scores(model, scores[name], data[dataset], part.config, score)
                scores[name] = ruled[name].scores
        about: dict[str, Any] = {
            "folders": {name: str(path) for name, path in part.measured.items()},
            "weights": {name: digest for name, path in part.measured.items() if (digest := weights_digest(path))},
            "settings": model_settings(part.config),
        }
        if ruled:
            about["rules"] = rules_figures(ruled, part.config.evaluation.bootstrap_samples, part.config.seed)
        _write(evaluation_folder(part, dataset), scores, data[dataset], part.config, about)


def measure_baselines(fits: Iterable[BaselineFit], data: Mapping[str, PreparedData], console: Console) -> None:
    """Evaluate the baselines by each of ``fits``, unless its folder has an evaluation of them by its settings."""
    for fit in fits:
        prepared, settings = data[fit.dataset], baseline_settings(fit.config)
        if evaluated(fit.folder, prepared, settings):
            continue
        found = baseline_scores(prepared, fit.config, False, lambda line: console.print(line, highlight=False))
        about = {
            "folders": {},
            "settings": settings,
            "notes": notes_of(prepared, fit.config),
            "baselines": found.details,
        }
        oracle = None if fit.few else oracle_scores(prepared.test)
        scores = found.scores | ({} if oracle is None else {"oracle": oracle})
        if scores:  # ready preference rows have no log that a baseline could be fitted on
            _write(fit.folder, scores, prepared, fit.config, about)


def request_metrics(folder: Path, model: str) -> np.ndarray:
    """(n_requests, len(METRICS)) values of a model, in the order of the test requests, the same for all models."""
    file = folder / SCORES_FILE
    return _request_metrics(file, model, file.stat().st_mtime_ns)


@lru_cache(maxsize=1024)  # each cell is paired with the same baselines
def _request_metrics(file: Path, model: str, changed: int) -> np.ndarray:
    table = pd.read_parquet(file, columns=["request", "score"], filters=[("model", "==", model)])
    scores = [group.to_numpy() for _, group in table.groupby("request", sort=True)["score"]]
    values = ranking_metrics(scores)
    return np.stack([values[metric] for metric in METRICS], axis=1)


def _write(
    folder: Path,
    scores: dict[str, list[np.ndarray]],
    data: PreparedData,
    config: RunConfig,
    about: dict[str, Any],
) -> None:
    evaluation = evaluate_scores(scores, data.test, config.evaluation.bootstrap_samples, config.seed)
    evaluation.data = data.about()
    for name, value in about.items():
        setattr(evaluation, name, value)
    write_evaluation(folder, evaluation, scores, data.test)
