"""What single users saw: the ranks of their targets by several models, and the ranked lists of a few of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from dmpo_dist.artifacts.evaluation import SCORES_FILE, Evaluation
from dmpo_dist.config.evaluation import BASELINES
from dmpo_dist.errors import UserError
from dmpo_dist.parsing import parsing
from dmpo_dist.report.headline import METRIC, subject_of
from dmpo_dist.report.study_headline import FAIR

ADVICE = "run `dmpo evaluate` again, or leave this folder out"
COLUMNS = ("request", "user", "timestamp", "item", "title", "is_positive", "model", "score")


@dataclass(frozen=True)
class RankedList:
    """The candidates of one request in the order of a model, best first.

    Attributes:
        titles: of all candidates.
        target: index of the item that the user took.
    """

    titles: Sequence[str]
    target: int


@dataclass(frozen=True)
class RankedRequest:
    """One test request and its list by each model."""

    user: str
    timestamp: int
    lists: dict[str, RankedList]


def compared_models(evaluation: Evaluation, scored: Sequence[str]) -> dict[str, str]:
    """The model that the page is about, what it is fairly compared with, and the best baseline, in this order.

    Args:
        scored: the names in scores.parquet, where a model of several seeds is name@seed.

    Returns:
        Name in tables -> name in scores.parquet, of several seeds that of the first; those with scores alone.
    """
    subject = subject_of(evaluation)
    baselines = [name for name in evaluation.models if name in BASELINES and METRIC in evaluation.models[name]]
    best = max(baselines, key=lambda name: evaluation.models[name][METRIC].value, default=None)
    wanted = [subject, *[name for name in FAIR if name in evaluation.models and name != subject][:2], best]
    entries = {name: next((e for e in sorted(scored) if e in (name, f"{name}@{e.rpartition('@')[2]}")), None)
               for name in wanted if name is not None}  # fmt: skip
    return {name: entry for name, entry in entries.items() if entry is not None}


def scored_models(folder: Path) -> list[str]:
    """The names of the models in a folder's scores.parquet; none where there is no such file.

    Raises:
        UserError: it cannot be read, or lacks a column.
    """
    file = folder / SCORES_FILE
    if not file.exists():
        return []
    with parsing(file, ADVICE):
        table = pd.read_parquet(file, columns=["model"]) if _complete(file) else None
    if table is None:
        raise UserError(f"{file}: has not the columns {', '.join(COLUMNS)}; {ADVICE}")
    return table["model"].unique().tolist()


def target_ranks(folder: Path, model: str) -> pd.Series:
    """(n_requests,) the rank of each request's target, by request; ties count as the middle of their ranks."""
    columns = ["request", "is_positive", "score"]
    with parsing(folder / SCORES_FILE, ADVICE):
        table = pd.read_parquet(folder / SCORES_FILE, columns=columns, filters=[("model", "==", model)])
    ranks = table.groupby("request")["score"].rank(ascending=False, method="average")
    targets = table["is_positive"].to_numpy(dtype=bool)
    return pd.Series(ranks[targets].to_numpy(), index=table["request"][targets]).sort_index()


def spread_over(ranks: pd.Series, count: int) -> list[int]:
    """``count`` requests from the best rank of the target to the worst, at equal distances; fewer where there are."""
    ordered = ranks.sort_values(kind="stable").index
    places = np.unique(np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int))
    return [int(ordered[place]) for place in places]


def ranked_requests(folder: Path, models: dict[str, str], requests: Sequence[int]) -> list[RankedRequest]:
    """The lists of ``requests`` by ``models`` (name in tables -> name in scores.parquet)."""
    filters = [("model", "in", [*models.values()]), ("request", "in", [*requests])]
    with parsing(folder / SCORES_FILE, ADVICE):
        table = pd.read_parquet(folder / SCORES_FILE, filters=filters)
    found = []
    for request in requests:
        of_request = table[table["request"] == request]
        lists = {name: _list(of_request[of_request["model"] == entry]) for name, entry in models.items()}
        first = of_request.iloc[0]
        found.append(RankedRequest(str(first["user"]), int(first["timestamp"]), lists))
    return found


def _list(rows: pd.DataFrame) -> RankedList:
    # Of equal scores the target comes last: a list must not look better than the model is.
    ordered = rows.sort_values(["score", "is_positive"], ascending=[False, True], kind="stable")
    target = int(np.argmax(ordered["is_positive"].to_numpy(dtype=bool)))
    return RankedList(ordered["title"].astype(str).tolist(), target)


def _complete(file: Path) -> bool:
    import pyarrow.parquet as pq

    return set(COLUMNS) <= set(pq.read_schema(file).names)
