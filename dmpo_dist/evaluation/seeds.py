"""Several trainings of one model that differ in their seed, as one row of a table.

``name@seed`` is one of them. A user's value of the model is its mean over the seeds, and an interval covers both what
other users and what other seeds would have given: users are drawn with replacement as for every model, and seeds are
drawn with replacement beside them. Models with equal seeds get the same draws, so that a stage is paired with the one
it started from. Of two models that have some seeds in common only those are compared: draws of unequal sets would not
be the same ones.

A bootstrap of S seeds spreads too little by sqrt((S - 1) / S), which is a lot for three. Draws are widened by its
inverse, so that seeds add exactly s^2 / S to the variance, s the standard deviation over seeds. With one seed the
interval covers users alone.
"""

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.metrics import resampled_means

SEPARATOR = "@"


@dataclass(frozen=True)
class SeededValues:
    """What each user contributes to some metrics under each seed of a model.

    Attributes:
        seeds: S labels; one empty label where a model has no seeds.
        values: (n_users, S, m) float64.
    """

    seeds: tuple[str, ...]
    values: np.ndarray

    def mean(self) -> np.ndarray:
        """(m,) over users and seeds."""
        return self.values.mean(axis=(0, 1))

    def by_seed(self) -> np.ndarray:
        """(S, m) over users."""
        return self.values.mean(axis=0)

    def resampled(self, samples: int, seed: int) -> np.ndarray:
        """(samples, m) means over drawn users and seeds."""
        users, seeds, metrics = self.values.shape
        means = resampled_means(self.values.reshape(users, seeds * metrics), samples, seed)
        return np.einsum("bs,bsm->bm", seed_weights(self.seeds, samples, seed), means.reshape(samples, seeds, metrics))

    def interval(self, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean and 95 % interval, each (m,)."""
        low, high = np.percentile(self.resampled(samples, seed), [2.5, 97.5], axis=0)
        return self.mean(), low, high

    def of_seeds(self, labels: tuple[str, ...]) -> "SeededValues":
        """The same for the seeds ``labels`` alone."""
        return SeededValues(labels, self.values[:, [self.seeds.index(label) for label in labels]])

    def of_users(self, chosen: np.ndarray) -> "SeededValues":
        """The same for the users in the mask or index ``chosen``."""
        return SeededValues(self.seeds, self.values[chosen])


def on_common_seeds(a: SeededValues, b: SeededValues) -> tuple[SeededValues, SeededValues]:
    """Both on the seeds that both have, so that they can be paired; as they are where they share none."""
    common = tuple(label for label in a.seeds if label in b.seeds)
    return (a.of_seeds(common), b.of_seeds(common)) if common else (a, b)


def seed_weights(seeds: tuple[str, ...], samples: int, seed: int) -> np.ndarray:
    """(samples, S) weights that add up to 1: draws of S seeds with replacement, widened by sqrt(S / (S - 1))."""
    count = len(seeds)
    if count == 1:
        return np.ones((samples, 1))
    rng = np.random.default_rng([seed, zlib.crc32("\0".join(seeds).encode())])
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=samples) / count
    return 1 / count + (drawn - 1 / count) * np.sqrt(count / (count - 1))


def split_name(entry: str) -> tuple[str, str]:
    """Name and seed of ``name@seed``; the seed is "" for a name alone.

    Raises:
        UserError: one of them is empty.
    """
    name, separator, seed = entry.rpartition(SEPARATOR)
    if not separator:
        return entry, ""
    if not name or not seed:
        raise UserError(
            f"--model {entry}=...: is not of the form NAME@SEED=FOLDER, for example dmpo@1=runs/dmpo1/model"
        )
    return name, seed


def by_name(entries: Iterable[str]) -> dict[str, dict[str, str]]:
    """name -> seed -> entry, in the order given but seeds sorted.

    Raises:
        UserError: a name comes with and without seeds.
    """
    groups: dict[str, dict[str, str]] = {}
    for entry in entries:
        name, seed = split_name(entry)
        groups.setdefault(name, {})[seed] = entry
    for name, seeds in groups.items():
        if "" in seeds and len(seeds) > 1:
            others = ", ".join(entry for seed, entry in seeds.items() if seed)
            raise UserError(
                f"--model {name}=...: is also given with seeds ({others}); give each one a seed or another name"
            )
    return {name: dict(sorted(seeds.items())) for name, seeds in groups.items()}


def stacked(values: Mapping[str, np.ndarray]) -> dict[str, SeededValues]:
    """name -> values of its seeds, from entry -> (n_users, m)."""
    return {
        name: SeededValues(tuple(seeds), np.stack([values[entry] for entry in seeds.values()], axis=1))
        for name, seeds in by_name(values).items()
    }
