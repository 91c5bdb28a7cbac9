"""A scorer that looks at places is found out; one that does not has no spread."""

import numpy as np
import pytest
from datasets import Dataset

from dmpo_dist.config import RunConfig, ScratchModel
from dmpo_dist.data.store import ROW_FEATURES
from dmpo_dist.evaluation.order import order_spread
from dmpo_dist.evaluation.ranking import load_ranking_model
from dmpo_dist.modeling.backbone import make_scratch_model


@pytest.fixture(scope="module")
def rows():
    titles = [f"Title {word}" for word in "alpha beta gamma delta epsilon zeta eta theta".split()]
    rng = np.random.default_rng(0)
    table = []
    for user in range(12):
        order = rng.permutation(8)
        names, items = [titles[i] for i in order], [f"i{i}" for i in order]
        table.append(
            {
                "user": f"u{user}", "timestamp": user, "history": names[:2], "history_items": items[:2],
                "positive": names[2], "positive_item": items[2], "negatives": names[3 : 6 + user % 3],
                "negative_items": items[3 : 6 + user % 3], "oracle": [], "prompt": None,
            }
        )  # fmt: skip
    return Dataset.from_list(table, features=ROW_FEATURES)


def by_title(rows):
    groups = zip(rows["positive"], rows["negatives"], strict=True)
    return [
        np.array([float(sum(map(ord, title))) for title in (positive, *negatives)]) for positive, negatives in groups
    ]


def test_places_are_found_out(rows):
    def first_is_better(rows):
        return [scores + np.eye(1, len(scores))[0] * 500 for scores in by_title(rows)]

    def neighbours_matter(rows):
        return [scores + 0.25 * index for index, scores in enumerate(by_title(rows))]

    blind = order_spread(by_title, rows, by_title(rows), requests=6, seed=0)
    assert blind["candidates"]["max_difference"] == blind["packing"]["max_difference"] == 0
    assert blind["candidates"]["ndcg@10"]["lowest"] == blind["candidates"]["ndcg@10"]["highest"]
    cheating = order_spread(first_is_better, rows, first_is_better(rows), requests=6, seed=0)
    assert cheating["candidates"]["max_difference"] == 500
    assert cheating["candidates"]["ndcg@10"]["lowest"] < cheating["candidates"]["ndcg@10"]["highest"]
    packed = order_spread(neighbours_matter, rows, neighbours_matter(rows), requests=6, seed=0)
    assert packed["packing"]["max_difference"] > 0


def test_a_language_model_has_no_spread(rows, tmp_path):
    scratch = ScratchModel(hidden_size=16, layers=1, heads=2, intermediate_size=16, vocab_size=280)
    make_scratch_model(tmp_path / "model", scratch, sorted({t for n in rows["negatives"] for t in n}), 128, seed=0)
    config = RunConfig.model_validate({"model": {"max_length": 128}, "evaluation": {"token_budget": 200}})
    score_rows = load_ranking_model(str(tmp_path / "model"), config).score_rows
    spread = order_spread(score_rows, rows, score_rows(rows), requests=8, seed=0)
    assert spread["candidates"]["max_difference"] < 1e-4
    assert spread["packing"]["max_difference"] < 1e-4
