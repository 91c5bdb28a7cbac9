"""Several seeds as one model: intervals by the theory of two-way samples, pairing, and names."""

import numpy as np
import pytest

from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.metrics import bootstrap_interval
from dmpo_dist.evaluation.seeds import SeededValues, by_name, on_common_seeds, seed_weights, split_name, stacked


def test_one_seed_is_the_plain_bootstrap():
    values = np.random.default_rng(0).normal(size=(50, 3))
    expected = bootstrap_interval(values, 300, 7)
    for seen, wanted in zip(SeededValues(("",), values[:, None]).interval(300, 7), expected, strict=True):
        np.testing.assert_allclose(seen, wanted, atol=1e-12)


def test_the_spread_is_that_of_users_and_of_seeds():
    """Variance of the mean: s^2 / S over seeds plus that over users, each by its textbook formula."""
    rng = np.random.default_rng(1)
    users, seeds = 400, 4
    values = rng.normal(size=(users, 1, 1)) + rng.normal(scale=0.2, size=(1, seeds, 1)) + np.zeros((users, seeds, 1))
    drawn = SeededValues(tuple("abcd"), values).resampled(20_000, 0)[:, 0]
    by_user, by_seed = values.mean(axis=1)[:, 0], values.mean(axis=0)[:, 0]
    assert drawn.var() == pytest.approx(by_user.var() / users + by_seed.var(ddof=1) / seeds, rel=0.05)
    assert drawn.mean() == pytest.approx(values.mean(), abs=0.01)


def test_equal_seeds_are_paired_and_others_are_not():
    np.testing.assert_array_equal(seed_weights(("0", "1", "2"), 99, 5), seed_weights(("0", "1", "2"), 99, 5))
    assert (seed_weights(("0", "1", "2"), 99, 5) != seed_weights(("3", "4", "5"), 99, 5)).any()
    np.testing.assert_allclose(seed_weights(("0", "1"), 99, 5).sum(axis=1), 1)
    # a shift that all seeds and users share is seen exactly, however far seeds are apart
    values = np.random.default_rng(0).normal(size=(30, 3, 1)) + np.array([0, 10, -10])[None, :, None]
    a, b = SeededValues(("0", "1", "2"), values + 0.5), SeededValues(("0", "1", "2"), values)
    np.testing.assert_allclose(a.resampled(200, 0) - b.resampled(200, 0), 0.5)


def test_unequal_sets_are_paired_on_the_seeds_that_both_have():
    values = np.random.default_rng(0).normal(size=(30, 3, 1)) + np.array([0, 10, -10])[None, :, None]
    a, b = on_common_seeds(SeededValues(("0", "1", "2"), values + 0.5), SeededValues(("2", "0"), values[:, [2, 0]]))
    assert a.seeds == b.seeds == ("0", "2")
    np.testing.assert_allclose(a.resampled(200, 0) - b.resampled(200, 0), 0.5)
    apart = SeededValues(("0",), values[:, :1]), SeededValues(("",), values[:, 1:2])
    assert on_common_seeds(*apart) == apart


def test_names():
    assert split_name("dmpo@1") == ("dmpo", "1")
    assert split_name("dmpo") == ("dmpo", "")
    assert by_name(["b@1", "a", "b@0"]) == {"b": {"0": "b@0", "1": "b@1"}, "a": {"": "a"}}
    values = {"b@1": np.ones((2, 1)), "a": np.zeros((2, 1)), "b@0": np.full((2, 1), 3.0)}
    assert stacked(values)["b"].by_seed().tolist() == [[3.0], [1.0]]
    for bad in ("@1", "dmpo@"):
        with pytest.raises(UserError, match="NAME@SEED=FOLDER"):
            split_name(bad)
    with pytest.raises(UserError, match=r"--model dmpo=.*also given with seeds \(dmpo@1\)"):
        by_name(["dmpo", "dmpo@1"])
