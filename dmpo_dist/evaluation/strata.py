"""Requests by how popular their positive is, how much of the user is known, and how rarely the item was seen."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from datasets import Dataset

from dmpo_dist.artifacts.evaluation import Interval, Stratum
from dmpo_dist.evaluation.seeds import SeededValues

LENGTHS = (1, 5, 10, 20)
"""Strata of history lengths begin here."""
TIMES_SEEN = (0, 1, 5, 20)
"""Strata of how often an item was taken begin here."""
Strata = dict[str, np.ndarray]
"""stratum -> (n_requests,) mask."""


def strata_of(rows: Dataset, log: pd.DataFrame | None) -> dict[str, Strata]:
    """The strata of the requests ``rows``; those that need a log or a history are left out where there is none.

    ``popularity``: head, mid and tail, items that hold a third of the interactions each. ``history``: likes the model
    is shown. ``item_cold``: how often the positive was taken in the log. Empty strata are left out.

    Args:
        log: what baselines may be fitted on (``fitting_log``), column item.
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
    """item -> head, mid or tail: by falling count, an item belongs where the interactions before it put it.

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
        values: name -> what each request contributes to ``metrics``.
    """

    def figures(mask: np.ndarray) -> Stratum:
        of_users = {name: of_model.of_users(mask) for name, of_model in values.items()}
        models = {name: cells(metrics, of_model.interval(samples, seed)) for name, of_model in of_users.items()}
        return Stratum(requests=int(mask.sum()), models=models)

    return {kind: {name: figures(mask) for name, mask in masks.items()} for kind, masks in strata.items()}


def cells(metrics: Sequence[str], interval: tuple[np.ndarray, np.ndarray, np.ndarray]) -> dict[str, Interval]:
    """Figures by metric. Metrics lie between 0 and 1, which draws widened for few seeds can leave."""
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
