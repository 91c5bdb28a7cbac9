"""Baselines against hand counts, and blind to everything that comes later."""

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset

from dmpo_dist.evaluation.baselines import (
    fitted_popularity_scores,
    item_knn_scores,
    oracle_scores,
    popularity_scores,
    random_scores,
)

TIE = 1e-8  # above the tie-break of item-kNN


def make_rows(requests: list[tuple]) -> Dataset:
    """(user, timestamp, history, positive, negatives); titles are the items in capitals."""
    return Dataset.from_list(
        [
            {
                "user": user,
                "timestamp": timestamp,
                "history": [item.upper() for item in history],
                "history_items": history,
                "positive": positive.upper(),
                "positive_item": positive,
                "negatives": [item.upper() for item in negatives],
                "negative_items": negatives,
                "oracle": [],
                "prompt": None,
            }
            for user, timestamp, history, positive, negatives in requests
        ]
    )


def make_interactions(events: str, rating: float = 5.0) -> pd.DataFrame:
    """ "u1 a 10" per line."""
    rows = [line.split() for line in events.strip().splitlines()]
    return pd.DataFrame([(u, i, rating, int(t)) for u, i, t in rows], columns=["user", "item", "rating", "timestamp"])


EVENTS = make_interactions("""
    u1 a 1
    u2 a 2
    u1 b 3
    u2 b 4
    u3 b 5
    u3 c 6
    u4 c 7
    u5 d 7
""")
LATER = make_interactions("""
    u1 c 10
    u2 d 11
    u3 a 10
    u9 d 10
    u9 new 12
""")


def random_world(seed: int) -> tuple[pd.DataFrame, Dataset]:
    rng = np.random.default_rng(seed)
    pairs = np.unique(rng.integers([0, 0], [30, 20], size=(250, 2)), axis=0)
    events = pd.DataFrame({"user": [f"u{u}" for u, _ in pairs], "item": [f"i{i}" for _, i in pairs], "rating": 4.0})
    events["timestamp"] = rng.integers(0, 100, size=len(events)) + 10**9
    requests = []
    for n in range(25):
        items = [f"i{i}" for i in rng.permutation(23)]  # three items that nobody took
        k, h = rng.integers(1, 8), rng.integers(0, 6)
        requests.append((f"u{n}", int(10**9 + rng.integers(60, 120)), items[:h], items[h], items[h + 1 : h + 1 + k]))
    return events, make_rows(requests)


def test_random_depends_on_seed_user_and_time_alone():
    rows = make_rows([(f"u{i % 40}", i // 40, [], "a", ["b"] * 9) for i in range(400)])
    scores = random_scores(rows, seed=1)
    reordered = random_scores(rows.select([7, 300, 2]), seed=1)
    for i, again in zip([7, 300, 2], reordered, strict=True):
        np.testing.assert_array_equal(scores[i], again)
    assert len({s[0] for s in scores} | {s[0] for s in random_scores(rows, seed=2)}) == 800
    wins = np.mean([np.argmax(s) == 0 for s in scores])
    assert wins == pytest.approx(0.1, abs=0.05)


def test_popularity_counts_strictly_before_the_request():
    rows = make_rows(
        [
            ("u9", 5, [], "b", ["a", "c", "never"]),  # the event of b at 5 is not before 5
            ("u9", 7, [], "c", ["d", "b"]),
            ("u9", 0, [], "a", ["b"]),
            ("u9", 10**12, [], "d", ["c", "never", "a"]),
        ]
    )
    assert [s.tolist() for s in popularity_scores(rows, EVENTS)] == [[2, 2, 0, 0], [1, 0, 3], [0, 0], [1, 2, 0, 2]]


def test_popularity_agrees_with_counting():
    events, rows = random_world(0)
    for row, scores in zip(rows, popularity_scores(rows, events.sample(frac=1, random_state=0)), strict=True):
        before = events[events["timestamp"] < row["timestamp"]]
        expected = [(before["item"] == item).sum() for item in [row["positive_item"], *row["negative_items"]]]
        assert scores.tolist() == expected


def test_item_knn_by_hand():
    # a: {u1 u2}, b: {u1 u2 u3}, c: {u3 u4}, d: {u5}. cos(a,b) = 2/sqrt(6), cos(b,c) = 1/sqrt(6), all others 0.
    rows = make_rows(
        [
            ("u9", 8, ["a"], "b", ["c", "d"]),
            ("u9", 8, ["a", "c", "unknown"], "b", ["d", "unknown"]),
            ("u9", 9, [], "d", ["b", "unknown"]),
        ]
    )
    ab, bc = 2 / np.sqrt(6), 1 / np.sqrt(6)
    scores = item_knn_scores(rows, EVENTS, neighbours=10)
    for got, expected in zip(scores, [[ab, 0, 0], [ab + bc, 0, 0], [0, 0, 0]], strict=True):
        np.testing.assert_allclose(got, expected, atol=TIE)
    # Where similarities tie, popularity decides: c was taken twice, d once, an unknown item never.
    assert scores[0][1] > scores[0][2] > 0
    assert scores[2][1] > scores[2][0] > scores[2][2] == 0
    # With one neighbour, b keeps a alone, while c keeps b.
    rows = make_rows([("u9", 8, ["b"], "a", ["c"]), ("u9", 8, ["c"], "b", ["a"])])
    one = item_knn_scores(rows, EVENTS, neighbours=1)
    np.testing.assert_allclose(one, [[ab, 0], [bc, 0]], atol=TIE)


def test_item_knn_agrees_with_dense_cosines():
    events, rows = random_world(1)
    before = 10**9 + 60
    past = events[events["timestamp"] < before]
    table = pd.crosstab(past["user"], past["item"]).astype(float)
    unit = table / np.sqrt((table**2).sum())
    cosine = (unit.T @ unit).reindex(index=[f"i{i}" for i in range(23)], columns=[f"i{i}" for i in range(23)]).fillna(0)
    np.fill_diagonal(cosine_values := cosine.to_numpy(copy=True), 0)
    cosine.loc[:, :] = cosine_values
    for row, scores in zip(rows, item_knn_scores(rows, past, neighbours=23), strict=True):
        candidates = [row["positive_item"], *row["negative_items"]]
        np.testing.assert_allclose(scores, cosine.loc[row["history_items"], candidates].sum(), atol=TIE)


def test_popularity_does_not_see_the_request_or_anything_later():
    rows = make_rows([("u1", 10, ["a", "b"], "c", ["d", "new"]), ("u2", 10, ["b"], "d", ["c", "a"])])
    more = pd.concat([LATER, EVENTS])
    for a, b in zip(popularity_scores(rows, EVENTS), popularity_scores(rows, more), strict=True):
        np.testing.assert_array_equal(a, b)


def test_fitted_popularity_counts_the_log_it_is_given():
    rows = make_rows([("u1", 0, [], "b", ["a", "never", "d"]), ("u2", 99, [], "c", ["b"])])
    assert [s.tolist() for s in fitted_popularity_scores(rows, EVENTS)] == [[3, 2, 0, 1], [2, 3]]


def test_oracle_is_all_or_nothing():
    rows = make_rows([("u1", 1, [], "a", ["b"]), ("u2", 1, [], "a", ["b", "c"])])
    assert oracle_scores(rows) is None
    known = rows.remove_columns("oracle").add_column("oracle", [[1.0, 0.5], [0.0, -1.0, 2.0]])
    assert [s.tolist() for s in oracle_scores(known)] == [[1.0, 0.5], [0.0, -1.0, 2.0]]
    partly = rows.remove_columns("oracle").add_column("oracle", [[1.0, 0.5], []])
    assert oracle_scores(partly) is None
