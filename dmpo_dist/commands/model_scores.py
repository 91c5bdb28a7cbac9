"""One model on the test requests: its scores, and whatever else is asked of it while it is in memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from rich.console import Console
from rich.text import Text

from dmpo_dist.artifacts.evaluation import GeneratedFigures
from dmpo_dist.commands.scored_parts import PartScorer
from dmpo_dist.config import RunConfig
from dmpo_dist.data.store import PreparedData
from dmpo_dist.data.tokenization import tokenize_rows
from dmpo_dist.evaluation.generated import generated_figures
from dmpo_dist.evaluation.order import ORDERS, order_spread
from dmpo_dist.evaluation.ranking import load_ranking_model, require_finite
from dmpo_dist.evaluation.rules import RuledScores, asks_for_rules, ruled_scores
from dmpo_dist.modeling.backbone import find_model, unlike_training
from dmpo_dist.modeling.ranking_model import RankingModel
from dmpo_dist.records.progress import UserProgress

LOOKED_AT = 1000
"""Requests of which the prompts are looked at before they are scored."""


@dataclass(frozen=True)
class ModelScores:
    """A model's scores of the test requests by its rule.

    Attributes:
        spread: how far they move with other orders; {} if that is not asked for.
        generated: what it writes by itself; None if that is not asked for.
        ruled: by each rule; None where none is asked for.
    """

    scores: list[np.ndarray]
    spread: dict[str, Any]
    generated: GeneratedFigures | None
    ruled: RuledScores | None


def model_scores(
    name: str, path: str, data: PreparedData, config: RunConfig, folder: Path, console: Console
) -> ModelScores:
    """Load the model in ``path``, called ``name``, and score the test requests of ``data``, in parts below ``folder``.

    The model is gone when this returns: the next one, or the ranking of the whole catalogue, has the memory to itself.

    Raises:
        UserError: it cannot be loaded or used, or a score is not finite.
    """
    for difference in unlike_training(find_model(path), config.model):
        console.print(f"note: {name} was trained with {difference}", highlight=False)
    again, write, seed = config.evaluation.order_requests, config.evaluation.generate, config.seed
    model = load_ranking_model(path, config)
    in_parts = PartScorer(f"scoring {name}", f"--model {name}={path}", path, model, data, config, folder, console)
    _note_shortened(name, model, data.test, console)
    scores = in_parts("test")
    spread = _order_spread(name, model, data.test, scores, again, seed, console) if again else {}
    if write and not console.is_terminal:
        console.print(f"[{name}] writes titles for up to {write} requests", markup=False, highlight=False)
    with console.status(Text(f"{name} writes titles")):
        generated = generated_figures(model, data.test, scores, write, seed) if write else None
    if not asks_for_rules(config.evaluation):
        return ModelScores(scores, spread, generated, None)

    ruled = ruled_scores(model, scores, data, config, in_parts)
    for rule, by_rule in ruled.by_rule.items():
        require_finite(f"--model {name}={path}, rule {rule}", by_rule, config.model.dtype)
    return ModelScores(ruled.scores, spread, generated, ruled)


def _note_shortened(name: str, model: RankingModel, rows: Dataset, console: Console) -> None:
    """Say how many histories the model sees only in part, of the first ``LOOKED_AT`` requests."""
    looked_at = rows.select(range(min(LOOKED_AT, len(rows))))
    before = model.encode.truncated
    tokenize_rows(looked_at, model.encode)
    shortened = model.encode.truncated - before
    if shortened:
        console.print(
            f"note: {name} sees {shortened} of {len(looked_at)} test histories without their oldest titles, which do "
            f"not fit into its {model.encode.max_length} tokens (model.max_length)",
            highlight=False,
            soft_wrap=True,
        )


def _order_spread(
    name: str, model: RankingModel, rows: Dataset, scores: list[np.ndarray], again: int, seed: int, console: Console
) -> dict[str, Any]:
    """``order_spread`` of the model, which may score more than the evaluation itself, with its progress."""
    total = (ORDERS + 1) * min(again, len(rows))  # other orders of the candidates, then other neighbours
    title = f"{name} in other orders"
    with UserProgress(title, total, 0, console, "scoring some requests again", "requests") as progress:

        def score(part: Dataset) -> list[np.ndarray]:
            of_part = model.score_rows(part)
            progress.advance(len(part))
            return of_part

        return order_spread(score, rows, scores, again, seed)
