"""Strata by hand, and figures that are those of the stratum's requests alone."""

import numpy as np
import pandas as pd
from datasets import Dataset

from dmpo_dist.evaluation.metrics import METRICS, ranking_metrics
from dmpo_dist.evaluation.seeds import SeededValues
from dmpo_dist.evaluation.strata import popularity_thirds, strata_figures, strata_of


def test_thirds_hold_a_third_of_the_interactions_each():
    counts = pd.Series({"a": 30, "b": 20, "c": 10, "d": 10, "e": 10, "f": 5, "g": 5}).rename_axis("item")
    # 90 in all: a ends at 30, where the second third begins
    assert popularity_thirds(counts).to_dict() == {
        "a": "head", "b": "mid", "c": "mid", "d": "tail", "e": "tail", "f": "tail", "g": "tail",
    }  # fmt: skip


def test_strata_part_the_requests():
    log = pd.DataFrame({"item": ["a"] * 30 + ["b"] * 20 + ["c"] * 4 + ["d"]})
    rows = Dataset.from_dict(
        {
            "positive_item": ["a", "b", "c", "d", "never"],
            "history_items": [["x"] * n for n in (1, 4, 5, 19, 40)],
        }
    )
    strata = strata_of(rows, log)
    seen = {
        kind: {name: np.flatnonzero(mask).tolist() for name, mask in masks.items()} for kind, masks in strata.items()
    }
    assert seen == {
        "popularity": {"head": [0], "mid": [1], "tail": [2, 3, 4]},
        "item_cold": {"0": [4], "1-4": [2, 3], "20+": [0, 1]},
        "history": {"1-4": [0, 1], "5-9": [2], "10-19": [3], "20+": [4]},
    }
    without = Dataset.from_dict({"positive_item": [""], "history_items": [[]]})
    assert strata_of(without, None) == {}


def test_figures_of_a_stratum_are_those_of_its_requests_alone():
    rng = np.random.default_rng(0)
    scores = [rng.normal(size=6) for _ in range(40)]
    mask = rng.random(40) < 0.4

    def values(some):
        return SeededValues(("",), np.stack([ranking_metrics(some)[m] for m in METRICS], axis=1)[:, None])

    strata = {"kind": {"some": mask, "rest": ~mask}}
    figures = strata_figures(strata, {"m": values(scores)}, METRICS, 200, 3)["kind"]["some"]
    alone = values([s for s, chosen in zip(scores, mask, strict=True) if chosen])
    expected = dict(zip(METRICS, zip(*alone.interval(200, 3), strict=True), strict=True))
    assert figures.requests == mask.sum()
    for metric in set(METRICS) - {"pooled_auc"}:  # which compares with the negatives of all requests
        cell = figures.models["m"][metric]
        np.testing.assert_allclose([cell.value, cell.low, cell.high], expected[metric], atol=1e-12)
