"""Hard negatives: the stored negatives of each training group that a model itself scores highest."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from dmpo_dist.commands.train import template_of
from dmpo_dist.config import RunConfig
from dmpo_dist.data.folder import rewrite
from dmpo_dist.data.store import PreparedData
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.ranking import load_ranking_model


def mine_hard_negatives(
    model: str, config: RunConfig, output: Path, keep: int, skip: int, echo: Callable[[str], None]
) -> PreparedData:
    """Write ``config.data.path`` again with the ``keep`` hardest negatives of each training group, hardest first.

    Validation and test stay as they are, so figures before and after compare.

    Args:
        model: folder or hub id of the model that scores.
        skip: leave out that many of the very hardest, which may be likes the log does not know.

    Raises:
        UserError: no prepared data, fewer than ``keep + skip`` negatives in a group, or a model that will not do.
    """
    if config.data.path is None:
        raise UserError("data.path is not set; give the folder that `dmpo data prepare` wrote")
    data = PreparedData.load(config.data.path)
    fewest = min(data.stored_negatives(), default=0)
    if keep + skip > fewest:
        raise UserError(
            f"--keep {keep} and --skip {skip} need {keep + skip} negatives, but a training group of {config.data.path} "
            f"holds {fewest}; lower them, or prepare the data with a higher data.negatives_per_group"
        )
    template_of(model, config)
    rows = data.train.to_list()
    for row, scores in zip(rows, load_ranking_model(model, config).score_rows(data.train), strict=True):
        hardest = np.argsort(-scores[1:], kind="stable")[skip : skip + keep].tolist()
        for name in ("negatives", "negative_items"):
            row[name] = [row[name][index] for index in hardest] if row[name] else []
        if row["oracle"]:
            row["oracle"] = [row["oracle"][0], *(row["oracle"][1 + index] for index in hardest)]
    note = f"Training negatives: the {keep} that {model} scores highest of {fewest} or more, after the first {skip}."
    return rewrite(data, {"train": rows}, note, output, echo)
