"""Whether an attribution says what a model does: deletion curves against other orders. Pure functions.

History items are taken away one after another and the title's value is watched. If contributions are right, their order
(largest first) pulls it down faster than a random order, and the inverse order slower. The deletion metric is that
of Petsiuk et al. (RISE, BMVC 2018, arXiv 1806.07421); ours compares curves instead of taking one's area alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest

from dmpo_dist.evaluation.metrics import bootstrap_interval
from dmpo_dist.explanation.contributions import Values

SHARES = np.linspace(0, 1, 21)
"""Where curves of histories of different lengths are averaged, see ``mean_curves``."""


@dataclass(frozen=True)
class Deletion:
    """The curves of one request with n >= 2 history items.

    Attributes:
        user: whose request.
        attribution, inverse: (n,) largest contribution first, smallest first.
        recent: (n,) the newest item first.
        random: (orders, n).
    """

    user: str
    attribution: np.ndarray
    inverse: np.ndarray
    recent: np.ndarray
    random: np.ndarray

    @property
    def areas(self) -> dict[str, float]:
        """How far each comparison's first curve is below its second, see ``area_between``.

        ``attribution_vs_random_after_first`` leaves out the first step, which leave-one-out wins by construction; it
        takes three items.
        """
        random = self.random.mean(axis=0)
        areas = {
            "attribution_vs_random": area_between(random, self.attribution),
            "attribution_vs_recent": area_between(self.recent, self.attribution),
            "recent_vs_random": area_between(random, self.recent),
            "inverse_vs_random": area_between(random, self.inverse),
        }
        if len(random) > 2:
            areas["attribution_vs_random_after_first"] = area_between(random, self.attribution, first=2)
        return areas


def area_between(upper: np.ndarray, lower: np.ndarray, first: int = 1) -> float:
    """Mean of ``upper - lower`` over k = first .. n - 1, in units of the value; both start from the whole history."""
    return float((upper - lower)[first:].mean())


def delete(user: str, values: Values, contributions: np.ndarray, orders: int, rng: np.random.Generator) -> Deletion:
    """All curves of one request.

    Args:
        values: of its title.
        contributions: (n,) what is tested.
        orders: how many random orders.
        rng: draws them.
    """
    n = len(contributions)
    largest_first = np.argsort(-contributions, kind="stable").tolist()
    shuffled = [rng.permutation(n).tolist() for _ in range(orders)]
    named = [largest_first, largest_first[::-1], list(range(n))[::-1]]
    sets = [frozenset(order[:k]) for order in named + shuffled for k in range(n)]  # all at once: they pack better
    curves = values(sets).reshape(-1, n)
    return Deletion(user, curves[0], curves[1], curves[2], curves[3:])


def summarise(deletions: Sequence[Deletion], samples: int, seed: int) -> dict[str, Any]:
    """Mean areas with 95 % bootstrap intervals over users, sign tests and mean curves, as plain JSON types.

    A user's area is the mean over that user's requests. The sign test counts users whose area is above and below 0
    (none of them at 0) and gives the two-sided binomial p-value of that split.
    """
    of_user: dict[str, dict[str, list[float]]] = {}  # comparison -> user -> areas
    for deletion in deletions:
        for name, area in deletion.areas.items():
            of_user.setdefault(name, {}).setdefault(deletion.user, []).append(area)
    areas = {
        name: _area(np.array([np.mean(one) for one in by_user.values()]), samples, seed)
        for name, by_user in of_user.items()
    }
    return {
        "users": len({deletion.user for deletion in deletions}),
        "requests": len(deletions),
        "random_orders": len(deletions[0].random),
        "bootstrap": {"samples": samples, "seed": seed},
        "areas": areas,
        "curves": {"share_removed": SHARES.tolist(), **mean_curves(deletions)},
    }


def mean_curves(deletions: Sequence[Deletion]) -> dict[str, list[float]]:
    """Mean change of the value since k = 0 at each of ``SHARES``, where a curve's share is k / (n - 1)."""
    curves = {
        "attribution": [d.attribution for d in deletions],
        "random": [d.random.mean(axis=0) for d in deletions],
        "recent": [d.recent for d in deletions],
        "inverse": [d.inverse for d in deletions],
    }
    return {
        name: np.mean([np.interp(SHARES, np.linspace(0, 1, len(c)), c - c[0]) for c in of_name], axis=0).tolist()
        for name, of_name in curves.items()
    }


def _area(of_users: np.ndarray, samples: int, seed: int) -> dict[str, float | int]:
    mean, low, high = (float(number) for number in bootstrap_interval(of_users, samples, seed))
    above, below = int((of_users > 0).sum()), int((of_users < 0).sum())
    p = float(binomtest(above, above + below).pvalue) if above + below else 1.0
    return {"area": mean, "low": low, "high": high, "users_above": above, "users_below": below, "sign_test_p": p}
