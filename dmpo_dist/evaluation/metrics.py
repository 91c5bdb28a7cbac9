"""Ranking metrics of one positive among K negatives, and bootstrap intervals over users.

Pure functions of float64 arrays; nothing here knows about models or files.
"""

from collections.abc import Sequence

import numpy as np

CUTOFFS = (1, 5, 10, 20)
"""Of ``top_metrics``."""

METRICS = ("hr@1", "hr@5", "hr@10", "ndcg@5", "ndcg@10", "mrr", "auc", "pair_accuracy")


def ranking_metrics(scores: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Rank the positive of each request among its negatives; a tie counts as its exact expectation under a fair draw.

    With one relevant item, hr@k is recall@k and ndcg@k is 1 / log2(1 + rank) within the first k, else 0. ``auc`` is
    the share of a request's negatives below its positive, ties half. ``pair_accuracy`` is the same share pooled over
    all (positive, negative) pairs, so a request weighs by its K. A request's value of it is its linearised
    contribution p + K_i (auc_i - p) / mean(K): the mean of the values is the pooled share p, a bootstrap over them
    has the spread of the ratio estimator, and where K is constant it is ``auc``.

    Args:
        scores: per request a float array (1 + K,), the positive first; K >= 1 may differ between requests.

    Returns:
        One (n_requests,) float64 array for each name in ``METRICS``.

    Raises:
        ValueError: no requests, a request without negatives, or a score that is not finite (names the request).
    """
    sizes, above, tied = _places(scores)
    negatives = sizes - 1
    auc = (negatives - above - tied / 2) / negatives
    pooled = negatives @ auc / negatives.sum()

    rank = np.arange(1, sizes.max() + 1)
    discount = 1 / np.log2(1 + rank)
    return {
        **{f"hr@{k}": _expected_gain(rank <= k, above, tied) for k in (1, 5, 10)},
        **{f"ndcg@{k}": _expected_gain(np.where(rank <= k, discount, 0), above, tied) for k in (5, 10)},
        "mrr": _expected_gain(1 / rank, above, tied),
        "auc": auc,
        "pair_accuracy": pooled + negatives * (auc - pooled) / negatives.mean(),
    }


def top_metrics(scores: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """hr@k, ndcg@k, recall@k and mrr@k for each k in ``CUTOFFS``: arguments, ties and errors as in ``ranking_metrics``.

    With one relevant item recall@k is hr@k; mrr@k is 1 / rank within the first k, else 0.
    """
    sizes, above, tied = _places(scores)
    rank = np.arange(1, sizes.max() + 1)
    gains = {"hr": np.ones(len(rank)), "ndcg": 1 / np.log2(1 + rank), "recall": np.ones(len(rank)), "mrr": 1 / rank}
    return {
        f"{name}@{k}": _expected_gain(np.where(rank <= k, gain, 0), above, tied)
        for name, gain in gains.items()
        for k in CUTOFFS
    }


def bootstrap_interval(values: np.ndarray, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over users and its 95 % percentile interval.

    Args:
        values: (n_users,), or (n_users, m) for m quantities at once, such as several metrics.

    Returns:
        (mean, low, high), scalars or (m,). Calls with one (n_users, samples, seed) resample the same users, so
        intervals of different metrics and models can be compared.
    """
    values = np.asarray(values, dtype=np.float64)
    low, high = np.percentile(_resampled_means(values, samples, seed), [2.5, 97.5], axis=0)
    return values.mean(axis=0), low, high


def paired_bootstrap(
    a: np.ndarray, b: np.ndarray, samples: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean of ``a - b`` over the same users, its 95 % percentile interval and a two-sided bootstrap p-value.

    Args:
        a, b: (n_users,) or (n_users, m), row i of both is the same user.

    Returns:
        (difference, low, high, p), scalars or (m,). p is twice the smaller share of resampled differences on either
        side of 0, counting the sample itself, so it is never below 2 / (samples + 1).
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired samples need one shape, got {a.shape} and {b.shape}")
    means = _resampled_means(a - b, samples, seed)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    smaller_side = np.minimum((means <= 0).sum(axis=0), (means >= 0).sum(axis=0))
    return (a - b).mean(axis=0), low, high, np.minimum(1.0, 2 * (1 + smaller_side) / (samples + 1))


def _places(scores: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each request its candidates, the negatives above its positive, and those level with it."""
    sizes = _checked_sizes(scores)
    flat = np.concatenate(scores).astype(np.float64, copy=False)
    first = np.cumsum(sizes) - sizes
    if not np.isfinite(flat).all():
        bad = int(np.flatnonzero(~np.isfinite(flat))[0])
        request = int(np.searchsorted(first, bad, side="right")) - 1
        raise ValueError(f"request {request}: score {flat[bad]} of candidate {bad - first[request]} is not finite")
    positive = np.repeat(flat[first], sizes)
    above = np.add.reduceat((flat > positive).astype(np.int64), first)
    tied = np.add.reduceat((flat == positive).astype(np.int64), first) - 1  # the positive equals itself
    return sizes, above, tied


def _checked_sizes(scores: Sequence[np.ndarray]) -> np.ndarray:
    """(n_requests,) number of candidates 1 + K."""
    if len(scores) == 0:
        raise ValueError("there are no requests to rank")
    for request, candidates in enumerate(scores):
        if np.ndim(candidates) != 1 or len(candidates) < 2:
            raise ValueError(
                f"request {request}: needs a positive and at least one negative in one dimension, "
                f"got scores of shape {np.shape(candidates)}"
            )
    return np.array([len(candidates) for candidates in scores])


def _expected_gain(gain: np.ndarray, above: np.ndarray, tied: np.ndarray) -> np.ndarray:
    """Mean of ``gain[rank - 1]`` over the ranks above + 1 .. above + tied + 1, all equally likely. (n_requests,)"""
    total = np.concatenate([[0.0], np.cumsum(gain)])
    return (total[above + tied + 1] - total[above]) / (tied + 1)


def _resampled_means(values: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """(samples,) or (samples, m) means over users drawn with replacement.

    Counts times values needs O(n) memory and one product for all m; scipy.stats.bootstrap gathers samples x n x m.
    """
    rng = np.random.default_rng(seed)
    n = len(values)
    means = np.empty((samples, *values.shape[1:]))
    for i in range(samples):
        counts = np.bincount(rng.integers(n, size=n), minlength=n).astype(np.float64)
        means[i] = counts @ values / n
    return means
