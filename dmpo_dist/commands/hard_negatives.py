"""Hard negatives: the stored negatives of each training group that a model itself scores highest."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dmpo_dist.commands.scoring import score_with_progress
from dmpo_dist.commands.train import template_of
from dmpo_dist.config import RunConfig
from dmpo_dist.data.folder import require_free, rewrite
from dmpo_dist.data.negatives import request_stream
from dmpo_dist.data.splits import likes
from dmpo_dist.data.store import PreparedData
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.ranking import load_ranking_model, require_finite
from dmpo_dist.modeling.backbone import find_model, with_length_of
from dmpo_dist.records.log import make_console


def mine_hard_negatives(
    model: str,
    config: RunConfig,
    output: Path,
    keep: int,
    skip_top: int,
    draw_from: int | None,
    echo: Callable[[str], None],
) -> PreparedData:
    """Write ``config.data.path`` again with ``keep`` hard negatives for each training group, hardest first.

    Validation and test stay as they are, so that figures on both versions can be compared. The card notes the share of
    chosen negatives that their user liked later: these are likely false negatives, and ``echo`` gets a warning.

    Args:
        model: folder or hub id of the model that scores.
        skip_top: number of the very hardest negatives to leave out; the user may like these without the log showing it.
        draw_from: after the skipped ones draw ``keep`` among this many of the hardest, seeded by ``config.seed``; None
            takes the hardest.

    Raises:
        UserError: no prepared data, too few negatives in a group, a model that cannot be loaded or whose scores are not
            finite, or an ``output`` that exists.
    """
    if config.data.path is None:
        raise UserError("data.path is not set; give the folder that `dmpo data prepare` wrote")
    require_free(output)
    data = PreparedData.for_training(config.data)
    if any(data.lists()):
        raise UserError(
            f"{config.data.path}: training groups have several positives or levels (data.levels), of which hard "
            "negatives cannot be told; prepare the data with data.levels=none"
        )
    fewest = min(data.stored_negatives(), default=0)
    _check_numbers(keep, skip_top, draw_from, fewest, config.data.path)
    config = with_length_of([find_model(model)], config)
    template_of(model, config)
    rows = data.train.to_list()
    pool = keep if draw_from is None else draw_from
    found = score_with_progress(load_ranking_model(model, config), data.train, "scoring negatives", make_console())
    require_finite(model, found, config.model.dtype)
    for row, scores in zip(rows, found, strict=True):
        hardest = np.argsort(-scores[1:], kind="stable")[skip_top : skip_top + pool]
        if draw_from is not None:
            drawn = request_stream(config.seed, row["user"], row["timestamp"]).choice(pool, keep, replace=False)
            hardest = hardest[np.sort(drawn)]
        for name in ("negatives", "negative_items"):
            row[name] = [row[name][index] for index in hardest.tolist()] if row[name] else []
        for name in ("oracle", "scores"):  # of all candidates, where they are known
            if row.get(name):
                row[name] = [row[name][0], *(row[name][1 + index] for index in hardest.tolist())]
    drawn_among = "" if draw_from is None else f"{keep} drawn among "
    note = (
        f"Training negatives: {drawn_among}the {pool} that {model} scores highest of {fewest} or more, after the first "
        f"{skip_top}."
    )
    if data.interactions is not None:
        note += _liked_later(rows, data.interactions, data.card.config["rating_threshold"], echo)
    made = {"negatives": "hard", "negatives_per_group": keep}
    return rewrite(data, {"train": rows}, made, note, output, echo)


def _check_numbers(keep: int, skip_top: int, draw_from: int | None, fewest: int, path: Path) -> None:
    if draw_from is not None and draw_from < keep:
        raise UserError(f"--draw-from {draw_from} holds fewer negatives than --keep {keep}; raise it or lower --keep")
    name, pool = ("--keep", keep) if draw_from is None else ("--draw-from", draw_from)
    if pool + skip_top > fewest:
        raise UserError(
            f"{name} {pool} and --skip-top {skip_top} need {pool + skip_top} negatives, but a training group of {path} "
            f"holds {fewest}; lower them, or prepare the data with a higher data.negatives_per_group"
        )


def _liked_later(
    rows: list[dict[str, Any]], interactions: pd.DataFrame, rating_threshold: float, echo: Callable[[str], None]
) -> str:
    """A sentence for the card on negatives that their user liked after the request; warns if there are any."""
    liked = likes(interactions, rating_threshold)
    when = dict(zip(zip(liked["user"], liked["item"], strict=True), liked["timestamp"], strict=True))
    later = [
        when.get((row["user"], item), row["timestamp"]) > row["timestamp"]
        for row in rows
        for item in row["negative_items"]
    ]
    share = (
        f"{sum(later) / max(len(later), 1):.1%} of them ({sum(later)} of {len(later)}) were liked by their user later."
    )
    if any(later):
        echo(
            f"WARNING: likely false negatives: {share} Leave out more of the hardest (--skip-top) or draw from more of "
            "them (--draw-from)."
        )
    return f" {share}"
