"""Scoring a split by a model, and saying how far it is."""

import numpy as np
from datasets import Dataset
from rich.console import Console

from dmpo_dist.modeling.ranking_model import RankingModel
from dmpo_dist.records.progress import UserProgress


def score_with_progress(model: RankingModel, rows: Dataset, title: str, console: Console) -> list[np.ndarray]:
    """``model.score_rows(rows)``, with a bar on a terminal and elsewhere with a line now and then."""
    with UserProgress(title, len(rows) * model.orders, 0, console, "loading the model") as progress:
        return model.score_rows(rows, progress.advance)
