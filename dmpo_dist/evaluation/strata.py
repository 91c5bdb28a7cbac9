"""Strata of requests: by popularity of the positive, by length of the history, by how rarely the item was seen."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from datasets import Dataset

from dmpo_dist.artifacts.evaluation import Interval, Stratum
from dmpo_dist.evaluation.seeds import SeededValues

LENGTHS = (1, 5, 10, 20)
"""The shortest history of each stratum."""
TIMES_SEEN = (0, 1, 5, 20)
"""The fewest times that an item of each stratum was taken."""
Strata = dict[str, np.ndarray]
"""stratum -> (n_requests,) mask."""


def strata_of(rows: Dataset, log: pd.DataFrame | None) -> dict[str, Strata]:
    """kind -> the strata of the requests ``rows``.

    - ``popularity``: head, mid and tail, the items with a third of the interactions each; needs a log.
    - ``item_cold``: by the number of times that the positive was taken in the log; needs a log.
    - ``history``: by the number of likes in the prompt; needs a history.

    Kinds whose data is missing, and empty strata, are left out.

    Args:
        log: the interactions that baselines may be fitted on (``fitting_log``), column item.
    """
    found: dict[str, Strata] = {}
    if log is not None:
        counts = log["item"].value_counts()
        positives = rows["positive_item"][:]
        group = popularity_thirds(counts).reindex(positives).fillna("tail").to_numpy()
        found["popularity"] = {name: group == name for name in ("head", "mid", "tail")}
        found["item_cold"] = _bins(counts.reindex(positives).fillna(0).to_numpy(), TIMES_SEEN)
    lengths = np.array([len(history) for history in rows["history_items"][:]])
    if lengths.any():
        found["history"] = _bins(lengths, LENGTHS)
    return {kind: {name: mask for name, mask in strata.items() if mask.any()} for kind, strata in found.items()}


def popularity_thirds(counts: pd.Series) -> pd.Series:
    """item -> head, mid or tail: by the share of interactions that more popular items have, < 1/3, < 2/3 or more.

    Args:
        counts: item -> interactions, at least one each.
    """
    ordered = counts.reset_index(name="n").sort_values(["n", "item"], ascending=[False, True]).set_index("item")["n"]
    before = (ordered.cumsum() - ordered) / ordered.sum()
    third = np.minimum((3 * before).astype(int), 2)
    return third.map(dict(enumerate(("head", "mid", "tail"))))


def strata_figures(
    strata: Mapping[str, Strata], values: Mapping[str, SeededValues], metrics: Sequence[str], samples: int, seed: int
) -> dict[str, dict[str, Stratum]]:
    """Kind -> stratum -> the figures of all models on its requests.

    Args:
        values: name -> the contribution of each request to ``metrics``.
    """

    def figures(mask: np.ndarray) -> Stratum:
        of_users = {name: of_model.of_users(mask) for name, of_model in values.items()}
        models = {name: cells(metrics, of_model.interval(samples, seed)) for name, of_model in of_users.items()}
        return Stratum(requests=int(mask.sum()), models=models)

    return {kind: {name: figures(mask) for name, mask in masks.items()} for kind, masks in strata.items()}


def cells(metrics: Sequence[str], interval: tuple[np.ndarray, np.ndarray, np.ndarray]) -> dict[str, Interval]:
    """Figures by metric; ends of intervals are clipped to [0, 1], which draws widened for few seeds can exceed."""
    rows = np.stack(interval, axis=1).tolist()
    return {
        metric: Interval(value=value, low=max(low, 0.0), high=min(high, 1.0))
        for metric, (value, low, high) in zip(metrics, rows, strict=True)
    }


def _bins(numbers: np.ndarray, starts: Sequence[int]) -> Strata:
    """Masks of "0", "1-4", ... and "20+"."""
    strata = {}
    for start, end in zip(starts, [*starts[1:], None], strict=True):
        name = f"{start}+" if end is None else str(start) if end == start + 1 else f"{start}-{end - 1}"
        strata[name] = (numbers >= start) & (numbers < (np.inf if end is None else end))
    return strata
