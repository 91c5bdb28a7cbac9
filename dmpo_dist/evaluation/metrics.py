"""Ranking metrics of one positive among K negatives, and bootstrap intervals over users.

Pure functions of float64 arrays; nothing here knows about models or files.
"""

from collections.abc import Sequence

import numpy as np

CUTOFFS = (1, 5, 10, 20)
"""Of HR, NDCG, recall and MRR."""

TOP_METRICS = tuple(f"{name}@{k}" for name in ("hr", "ndcg", "recall", "mrr") for k in CUTOFFS)
METRICS = (*TOP_METRICS, "mrr", "auc", "pair_accuracy", "pooled_auc")


def ranking_metrics(scores: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Rank the positive of each request among its negatives; a tie counts as its exact expectation under a fair draw.

    With one relevant item, hr@k is recall@k, ndcg@k is 1 / log2(1 + rank) and mrr@k is 1 / rank within the first k,
    else 0. ``auc`` is the share of a request's negatives below its positive, ties half. ``pair_accuracy`` is the same
    share pooled over all (positive, negative) pairs, so a request weighs by its K. A request's value of it is its
    linearised contribution p + K_i (auc_i - p) / mean(K): the mean of the values is the pooled share p, a bootstrap
    over them has the spread of the ratio estimator, and where K is constant it is ``auc``. ``pooled_auc`` compares
    every positive with the negatives of all requests (see ``pooled_auc``), so it asks that scores mean the same for
    every user, which a ranking does not need.

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
    return {
        **_top(sizes, above, tied),
        "mrr": _expected_gain(1 / np.arange(1, sizes.max() + 1), above, tied),
        "auc": auc,
        "pair_accuracy": pooled + negatives * (auc - pooled) / negatives.mean(),
        "pooled_auc": pooled_auc(scores),
    }


def top_metrics(scores: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """The ``TOP_METRICS`` alone: arguments, ties and errors as in ``ranking_metrics``."""
    return _top(*_places(scores))


def sure_hits(negatives: int) -> tuple[str, ...]:
    """The metrics that are 1 in any order of a positive and at most ``negatives`` others: hr@k and recall@k of all of them."""
    return tuple(f"{name}@{k}" for name in ("hr", "recall") for k in CUTOFFS if k > negatives)


def pooled_auc(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Area under the ROC curve of all candidates of all requests together, as (n_requests,) contributions.

    Their mean is the area A. A request contributes A + (V(positive) - A) + (n / M) sum (V(negative) - A): V of the
    positive is the share of all M negatives below it, V of a negative the share of the n positives above it, ties half.
    A bootstrap over these linearised values has the spread of clustered data (Obuchowski, Biometrics 1997).

    Args:
        scores: as in ``ranking_metrics``, finite.
    """
    positives = np.array([candidates[0] for candidates in scores], dtype=np.float64)
    negatives = np.concatenate([candidates[1:] for candidates in scores]).astype(np.float64)
    first = np.cumsum([0, *(len(candidates) - 1 for candidates in scores[:-1])])
    below = _share_below(positives, negatives)
    area = below.mean()
    above = 1 - _share_below(negatives, positives)
    return below + len(positives) / len(negatives) * np.add.reduceat(above - area, first)


def coverage(shown: np.ndarray, items: int) -> float:
    """The share of a catalogue of ``items`` that is in any list; ``shown``: item numbers of all lists together."""
    return len(np.unique(shown)) / items


def gini(shown: np.ndarray, items: int) -> float:
    """How unevenly lists show a catalogue of ``items``: 0 all alike, near 1 a few only.

    The Gini coefficient of how often each item is shown, never included: sum (2 i - n - 1) x_i / (n sum x) over the
    ascending counts x_1 .. x_n.
    """
    counts = np.sort(np.bincount(shown, minlength=items))
    rank = np.arange(1, items + 1)
    return float((2 * rank - items - 1) @ counts / (items * counts.sum()))


def bootstrap_interval(values: np.ndarray, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over users and its 95 % percentile interval.

    Args:
        values: (n_users,), or (n_users, m) for m quantities at once, such as several metrics.

    Returns:
        (mean, low, high), scalars or (m,). Calls with one (n_users, samples, seed) resample the same users, so
        intervals of different metrics and models can be compared.
    """
    values = np.asarray(values, dtype=np.float64)
    low, high = np.percentile(resampled_means(values, samples, seed), [2.5, 97.5], axis=0)
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
    means = resampled_means(a - b, samples, seed)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return (a - b).mean(axis=0), low, high, bootstrap_p(means)


def bootstrap_p(differences: np.ndarray) -> np.ndarray:
    """Two-sided p-values from resampled differences (samples,) or (samples, m): see ``paired_bootstrap``."""
    smaller_side = np.minimum((differences <= 0).sum(axis=0), (differences >= 0).sum(axis=0))
    return np.minimum(1.0, 2 * (1 + smaller_side) / (len(differences) + 1))


def resampled_means(values: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """(samples,) or (samples, m) means over users drawn with replacement; values as in ``bootstrap_interval``.

    Counts times values needs O(n) memory and one product for all m; scipy.stats.bootstrap gathers samples x n x m.
    """
    rng = np.random.default_rng(seed)
    n = len(values)
    means = np.empty((samples, *values.shape[1:]))
    for i in range(samples):
        counts = np.bincount(rng.integers(n, size=n), minlength=n).astype(np.float64)
        means[i] = counts @ values / n
    return means


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


def _top(sizes: np.ndarray, above: np.ndarray, tied: np.ndarray) -> dict[str, np.ndarray]:
    rank = np.arange(1, sizes.max() + 1)
    gains = {"hr": np.ones(len(rank)), "ndcg": 1 / np.log2(1 + rank), "recall": np.ones(len(rank)), "mrr": 1 / rank}
    return {
        f"{name}@{k}": _expected_gain(np.where(rank <= k, gain, 0), above, tied)
        for name, gain in gains.items()
        for k in CUTOFFS
    }


def _share_below(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each of ``values`` the share of ``others`` below it, ties half."""
    others = np.sort(others)
    return (np.searchsorted(others, values, "left") + np.searchsorted(others, values, "right")) / (2 * len(others))
