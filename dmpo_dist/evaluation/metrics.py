"""Ranking metrics of one positive among K negatives, and bootstrap intervals over users.

All are pure functions of float64 arrays, without models or files.
"""

from collections.abc import Sequence

import numpy as np

CUTOFFS = (1, 5, 10, 20)
"""Cutoffs k of HR@k, NDCG@k, recall@k and MRR@k among some candidates."""
CATALOGUE_CUTOFFS = (1, 3, 5, 10, 20)
"""And among a whole catalogue: papers on it also report 3."""


def _metrics_at(cutoffs: Sequence[int]) -> tuple[str, ...]:
    return tuple(f"{name}@{k}" for name in ("hr", "ndcg", "recall", "mrr") for k in cutoffs)


TOP_METRICS = _metrics_at(CUTOFFS)
CATALOGUE_METRICS = _metrics_at(CATALOGUE_CUTOFFS)
METRICS = (*TOP_METRICS, "mrr", "auc", "pair_accuracy", "pooled_auc")


def ranking_metrics(scores: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Rank the positive of each request among its negatives; ties count as their expectation under a random order.

    - With one relevant item hr@k equals recall@k. Within the first k ranks, ndcg@k is 1 / log2(1 + rank) and mrr@k is
      1 / rank; below them both are 0.
    - ``auc`` is the share of a request's negatives below its positive, ties half.
    - ``pair_accuracy`` is that share p over the (positive, negative) pairs of all requests together, so a request
      counts in proportion to its K. The value of request i is its linearised contribution p + K_i (auc_i - p) /
      mean(K). The mean of these values is p, and a bootstrap over them has the spread of the ratio estimator. Where K
      is constant the value is ``auc``.
    - ``pooled_auc`` compares every positive with the negatives of all requests (see the function). It is high only if
      scores are comparable between users, which a ranking does not need.

    Args:
        scores: for each request a float array (1 + K,), the positive first; K >= 1 may differ between requests.

    Returns:
        One (n_requests,) float64 array for each name in ``METRICS``.

    Raises:
        ValueError: no requests, a request without negatives, or a score that is not finite (names the request).
    """
    sizes, above, tied = _counts(scores)  # each (n_requests,)
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


def catalogue_metrics(scores: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """The ``CATALOGUE_METRICS``: arguments, ties and errors as in ``ranking_metrics``."""
    return _top(*_counts(scores), CATALOGUE_CUTOFFS)


def sure_hits(negatives: int) -> tuple[str, ...]:
    """The metrics that are 1 for every model where requests have at most ``negatives`` negatives: hr@k and recall@k."""
    return tuple(f"{name}@{k}" for name in ("hr", "recall") for k in CUTOFFS if k > negatives)


def pooled_auc(scores: Sequence[np.ndarray]) -> np.ndarray:
    """The ROC curve's area A over the candidates of all requests together, as (n_requests,) contributions.

    The mean of the contributions is A. A request contributes A + (V(positive) - A) + (n / M) sum (V(negative) - A),
    where V of a positive is the share of all M negatives below it, and V of a negative is the share of the n positives
    above it, ties half. A bootstrap over these linearised values has the spread that the estimator has when candidates
    come in clusters, one for each request (Obuchowski, Biometrics 1997).

    Args:
        scores: as in ``ranking_metrics``, finite.
    """
    positives = np.array([candidates[0] for candidates in scores], dtype=np.float64)
    negatives = np.concatenate([candidates[1:] for candidates in scores]).astype(np.float64)
    first = np.cumsum([0, *(len(candidates) - 1 for candidates in scores[:-1])])  # each request's first negative
    below = _share_below(positives, negatives)
    area = below.mean()
    above = 1 - _share_below(negatives, positives)
    return below + len(positives) / len(negatives) * np.add.reduceat(above - area, first)


def coverage(shown: np.ndarray, items: int) -> float:
    """The share of a catalogue of ``items`` items that is in at least one list.

    Args:
        shown: the item numbers of all lists together.
    """
    return len(np.unique(shown)) / items


def gini(shown: np.ndarray, items: int) -> float:
    """The Gini coefficient of how often lists show each of ``items`` items: 0 if equally often, near 1 if only a few.

    It is sum (2 i - n - 1) x_i / (n sum x) over the ascending counts x_1 .. x_n, items that are never shown included.
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


FEWEST_USERS = 6
"""With fewer users no p-value of ``paired_bootstrap`` is below 0.05."""


def paired_bootstrap(
    a: np.ndarray, b: np.ndarray, samples: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean of ``a - b`` over the same users, its 95 % percentile interval and a two-sided bootstrap p-value.

    Args:
        a, b: (n_users,) or (n_users, m), row i of both is the same user.

    Returns:
        (difference, low, high, p), scalars or (m,). p is twice the smaller share of resampled differences on either
        side of 0, counting the sample itself, so it is never below 2 / (samples + 1); nor is it below 2^(1 - n_users),
        the chance that n differences of random sign all have one sign.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired samples need one shape, got {a.shape} and {b.shape}")
    means = resampled_means(a - b, samples, seed)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return (a - b).mean(axis=0), low, high, bootstrap_p(means, len(a))


def bootstrap_p(differences: np.ndarray, users: int) -> np.ndarray:
    """Two-sided p-values from (samples,) or (samples, m) resampled differences: see ``paired_bootstrap``."""
    smaller_side = np.minimum((differences <= 0).sum(axis=0), (differences >= 0).sum(axis=0))
    return np.clip(2 * (1 + smaller_side) / (len(differences) + 1), 2.0 ** (1 - users), 1.0)


def resampled_means(values: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """(samples,) or (samples, m) means over users drawn with replacement; values as in ``bootstrap_interval``.

    A resample is a count for each user: its mean is counts @ values / n. That needs O(n) memory and one product for all
    m metrics, where scipy.stats.bootstrap would gather samples x n x m values.
    """
    rng = np.random.default_rng(seed)
    n = len(values)
    means = np.empty((samples, *values.shape[1:]))
    for i in range(samples):
        counts = np.bincount(rng.integers(n, size=n), minlength=n).astype(np.float64)  # (n,) draws of each user
        means[i] = counts @ values / n
    return means


def _counts(scores: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each request the numbers of candidates, of negatives above its positive, and of negatives tied with it."""
    sizes = _checked_sizes(scores)
    flat = np.concatenate(scores).astype(np.float64, copy=False)  # (sum of sizes,)
    first = np.cumsum(sizes) - sizes  # index of each request's positive in ``flat``
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
    """(n_requests,) the mean of ``gain[rank - 1]`` over the equally likely ranks above + 1 .. above + tied + 1."""
    # A mean over consecutive ranks is a difference of two prefix sums.
    total = np.concatenate([[0.0], np.cumsum(gain)])
    return (total[above + tied + 1] - total[above]) / (tied + 1)


def _top(
    sizes: np.ndarray, above: np.ndarray, tied: np.ndarray, cutoffs: Sequence[int] = CUTOFFS
) -> dict[str, np.ndarray]:
    rank = np.arange(1, sizes.max() + 1)
    gains = {"hr": np.ones(len(rank)), "ndcg": 1 / np.log2(1 + rank), "recall": np.ones(len(rank)), "mrr": 1 / rank}
    return {
        f"{name}@{k}": _expected_gain(np.where(rank <= k, gain, 0), above, tied)
        for name, gain in gains.items()
        for k in cutoffs
    }


def _share_below(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """For each of ``values`` the share of ``others`` below it, ties half."""
    others = np.sort(others)
    return (np.searchsorted(others, values, "left") + np.searchsorted(others, values, "right")) / (2 * len(others))
