"""Metrics against scikit-learn, against enumeration of all tie-breaks, and under what must not change them."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score, roc_auc_score

from dmpo_dist.evaluation.metrics import (
    CATALOGUE_METRICS,
    CUTOFFS,
    FEWEST_USERS,
    METRICS,
    TOP_METRICS,
    bootstrap_interval,
    catalogue_metrics,
    coverage,
    gini,
    paired_bootstrap,
    ranking_metrics,
)

# Few distinct values: ties are common. Ragged K.
requests = st.lists(st.lists(st.integers(-4, 4), min_size=2, max_size=14), min_size=1, max_size=6).map(
    lambda lists: [np.array(scores, dtype=np.float64) for scores in lists]
)


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys() == set(METRICS)
    for metric in METRICS:
        np.testing.assert_allclose(a[metric], b[metric], rtol=0, atol=1e-12, err_msg=metric)


def test_agree_with_scikit_learn_without_ties():
    rng = np.random.default_rng(0)
    scores = [rng.permutation(size).astype(float) for size in (2, 5, 6, 11, 20, 40, 40, 40)]
    ours = ranking_metrics(scores)
    for i, candidates in enumerate(scores):
        relevant = np.eye(1, len(candidates))
        for k in CUTOFFS:
            assert ours[f"ndcg@{k}"][i] == pytest.approx(ndcg_score(relevant, [candidates], k=k), abs=1e-12)
        assert ours["auc"][i] == pytest.approx(roc_auc_score(relevant[0], candidates), abs=1e-12)
        rank = 1 + np.argsort(-candidates).tolist().index(0)
        assert ours["mrr"][i] == pytest.approx(1 / rank, abs=1e-12)
        assert [ours[f"hr@{k}"][i] for k in CUTOFFS] == [rank <= k for k in CUTOFFS]
        assert [ours[f"mrr@{k}"][i] for k in CUTOFFS] == pytest.approx([(rank <= k) / rank for k in CUTOFFS])
    pairs = np.concatenate([s[0] > s[1:] for s in scores])
    assert ours["pair_accuracy"].mean() == pytest.approx(pairs.mean(), abs=1e-12)


@pytest.mark.parametrize("scores", [[1, 1, 0, 2], [0, 0, 0, 0, 0, 0], [3, 3, 3, 5, 5, 1, 3], [2, 1, 1, 1]])
def test_ties_are_the_mean_over_all_tie_breaks(scores):
    """Every order of the candidates, used as tie-break, is one tie-free ranking; the value is their mean."""
    orders = [
        np.lexsort([order, scores]).argsort().astype(float) for order in itertools.permutations(range(len(scores)))
    ]
    broken = ranking_metrics(orders)
    tied = ranking_metrics([np.array(scores, dtype=float)])
    for metric in METRICS:
        assert tied[metric][0] == pytest.approx(broken[metric].mean(), abs=1e-12), metric


@settings(max_examples=40, deadline=None)
@given(requests)
def test_catalogue_metrics_are_the_ranking_metrics_cut(scores):
    cut, whole = catalogue_metrics(scores), ranking_metrics(scores)
    assert tuple(cut) == CATALOGUE_METRICS
    assert set(TOP_METRICS) < set(CATALOGUE_METRICS)
    for metric in TOP_METRICS:
        np.testing.assert_array_equal(cut[metric], whole[metric])
    for k in CUTOFFS:
        np.testing.assert_array_equal(cut[f"recall@{k}"], cut[f"hr@{k}"])
    longest = max(map(len, scores))
    assert longest <= max(CUTOFFS)
    np.testing.assert_allclose(cut["mrr@20"], whole["mrr"])  # nothing is cut off
    np.testing.assert_allclose(cut["mrr@1"], whole["hr@1"])


@settings(max_examples=60, deadline=None)
@given(requests, st.randoms(use_true_random=False))
def test_only_the_order_of_scores_counts(scores, random):
    expected = ranking_metrics(scores)
    assert_same(ranking_metrics([np.exp(s / 3) * 7 - 100 for s in scores]), expected)
    shuffled = [np.array([s[0], *random.sample(s[1:].tolist(), len(s) - 1)]) for s in scores]
    assert_same(ranking_metrics(shuffled), expected)
    # Each request by itself: only the pooled ones look beyond it.
    for i, s in enumerate(scores):
        alone = ranking_metrics([s])
        for metric in set(METRICS) - {"pair_accuracy", "pooled_auc"}:
            assert alone[metric][0] == pytest.approx(expected[metric][i], abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.floats(-1e6, 1e6))
def test_constant_scores_give_chance(k, value):
    chance = {name: v[0] for name, v in ranking_metrics([np.full(1 + k, value)]).items()}
    for at in CUTOFFS:
        assert chance[f"hr@{at}"] == pytest.approx(min(at, 1 + k) / (1 + k))
    assert chance["mrr"] == pytest.approx(np.mean(1 / np.arange(1, k + 2)))
    assert chance["auc"] == chance["pair_accuracy"] == chance["pooled_auc"] == 0.5


def test_pair_accuracy_pools_pairs_and_its_bootstrap_is_that_of_the_ratio():
    rng = np.random.default_rng(1)
    scores = [rng.normal(size=1 + k) + np.eye(1, 1 + k)[0] for k in rng.integers(1, 30, size=300)]
    k = np.array([len(s) - 1 for s in scores])
    metrics = ranking_metrics(scores)
    assert metrics["pair_accuracy"].mean() == pytest.approx(k @ metrics["auc"] / k.sum(), abs=1e-12)
    assert abs(metrics["pair_accuracy"].mean() - metrics["auc"].mean()) > 1e-4
    _, low, high = bootstrap_interval(metrics["pair_accuracy"], samples=2000, seed=0)
    draws = rng.integers(300, size=(2000, 300))
    ratios = (k * metrics["auc"])[draws].sum(axis=1) / k[draws].sum(axis=1)
    np.testing.assert_allclose([low, high], np.percentile(ratios, [2.5, 97.5]), atol=5e-3)


@settings(max_examples=30, deadline=None)
@given(requests)
def test_pooled_auc_is_that_of_all_candidates(scores):
    labels = np.concatenate([np.eye(1, len(s))[0] for s in scores])
    expected = roc_auc_score(labels, np.concatenate(scores))
    assert ranking_metrics(scores)["pooled_auc"].mean() == pytest.approx(expected, abs=1e-12)


def test_the_bootstrap_of_pooled_auc_resamples_whole_requests():
    rng = np.random.default_rng(2)
    scores = [rng.normal() + rng.normal(size=1 + k) + np.eye(1, 1 + k)[0] for k in rng.integers(1, 9, size=100)]
    _, low, high = bootstrap_interval(ranking_metrics(scores)["pooled_auc"], samples=2000, seed=0)
    areas = []
    for draw in rng.integers(100, size=(250, 100)):
        drawn = [scores[i] for i in draw]
        areas.append(roc_auc_score(np.concatenate([np.eye(1, len(s))[0] for s in drawn]), np.concatenate(drawn)))
    np.testing.assert_allclose([low, high], np.percentile(areas, [2.5, 97.5]), atol=0.02)
    assert high - low > 0.08


def test_coverage_and_gini_in_closed_form():
    everybody_the_same = np.tile(np.arange(10), 30)
    assert coverage(everybody_the_same, 400) == 10 / 400
    assert gini(everybody_the_same, 400) == pytest.approx(1 - 10 / 400)
    assert gini(np.tile(np.arange(40), 3), 40) == pytest.approx(0, abs=1e-12)
    shown = np.random.default_rng(0).zipf(1.5, size=500) % 60
    counts = np.bincount(shown, minlength=60)
    pairs = np.abs(counts[:, None] - counts[None, :]).sum() / (
        2 * 60 * counts.sum()
    )  # half the relative mean difference
    assert gini(shown, 60) == pytest.approx(pairs)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([], "no requests"),
        ([[1.0, 0.0], [1.0]], "request 1: .*at least one negative"),
        ([[1.0, 0.0], [1.0, 2.0, np.nan]], "request 1: score nan of candidate 2"),
        ([[np.inf, 0.0]], "request 0: score inf of candidate 0"),
        ([[0.0, 1.0], [-np.inf, 0.0]], "request 1: score -inf of candidate 0"),
    ],
)
def test_bad_scores_name_the_request(scores, message):
    with pytest.raises(ValueError, match=message):
        ranking_metrics([np.array(s) for s in scores])


def test_intervals_have_the_width_of_the_normal_theory():
    values = np.random.default_rng(0).normal(2, 1, size=(400, 2))
    mean, low, high = bootstrap_interval(values, samples=2000, seed=3)
    np.testing.assert_allclose(mean, values.mean(axis=0))
    np.testing.assert_allclose(high - low, 2 * 1.96 * values.std(axis=0) / 20, rtol=0.1)
    # One quantity alone sees the same resampled users.
    np.testing.assert_allclose(bootstrap_interval(values[:, 1], samples=2000, seed=3), (mean[1], low[1], high[1]))


def test_paired_bootstrap_sees_a_shift_that_intervals_cannot():
    rng = np.random.default_rng(0)
    a = rng.normal(size=500)
    b = a - 0.01 + rng.normal(scale=0.01, size=500)
    difference, low, high, p = paired_bootstrap(a, b, samples=999, seed=0)
    assert low < 0.01 < high
    assert low > 0
    assert p == pytest.approx(2 / 1000)
    assert difference == pytest.approx((a - b).mean())
    reverse = paired_bootstrap(b, a, samples=999, seed=0)
    np.testing.assert_allclose(reverse, (-difference, -high, -low, p), atol=1e-12)
    assert [float(x) for x in paired_bootstrap(a, a, samples=100, seed=0)] == [0, 0, 0, 1]
    for users in range(1, FEWEST_USERS + 1):  # all differences on one side, as in one of 2^(n-1) by chance
        p = float(paired_bootstrap(a[:users] + 9, a[:users], samples=999, seed=0)[3])
        assert (p, p < 0.05) == (2.0 ** (1 - users), users == FEWEST_USERS)
    with pytest.raises(ValueError, match="one shape"):
        paired_bootstrap(a, b[1:], samples=100, seed=0)
