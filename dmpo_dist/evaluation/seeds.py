"""Several trainings of one model that differ in their seed, as one row of a table.

``name@seed`` is one training. The model's value for a user is the mean over its seeds. An interval covers the variation
over both users and seeds: users are drawn with replacement as for every model, and so are seeds. Models with equal
seeds get the same draws of seeds, so that a stage is paired with the one it started from. Two models that share only
some seeds are compared on these seeds, as draws from different sets cannot be paired.

The standard deviation of a bootstrap over S seeds is too small by the factor sqrt((S - 1) / S), 0.82 for three seeds.
So draws are widened by the inverse factor, and seeds add exactly s^2 / S to the variance, where s is the standard
deviation over seeds. With one seed the interval covers users alone.
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
    """The contribution of each user to m metrics under each seed of a model.

    Attributes:
        seeds: S labels; a single empty label for a model without seeds.
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
        """(samples, m) means over drawn users and drawn seeds."""
        users, seeds, metrics = self.values.shape
        # First the mean over drawn users for each seed and metric, then a weighted mean of these over seeds. Both draws
        # depend on ``seed`` alone, so resamples of two models can be subtracted in pairs.
        means = resampled_means(self.values.reshape(users, seeds * metrics), samples, seed)  # (samples, S * m)
        return np.einsum("bs,bsm->bm", seed_weights(self.seeds, samples, seed), means.reshape(samples, seeds, metrics))

    def interval(self, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean and 95 % interval, each (m,)."""
        low, high = np.percentile(self.resampled(samples, seed), [2.5, 97.5], axis=0)
        return self.mean(), low, high

    def of_seeds(self, labels: tuple[str, ...]) -> "SeededValues":
        """These values for the seeds ``labels`` alone."""
        return SeededValues(labels, self.values[:, [self.seeds.index(label) for label in labels]])

    def of_users(self, chosen: np.ndarray) -> "SeededValues":
        """These values for the users in the mask or index ``chosen`` alone."""
        return SeededValues(self.seeds, self.values[chosen])


def on_common_seeds(a: SeededValues, b: SeededValues) -> tuple[SeededValues, SeededValues]:
    """Both on the seeds that they share, so that they can be paired; unchanged where they share none."""
    common = tuple(label for label in a.seeds if label in b.seeds)
    return (a.of_seeds(common), b.of_seeds(common)) if common else (a, b)


def seed_weights(seeds: tuple[str, ...], samples: int, seed: int) -> np.ndarray:
    """(samples, S) weights that add up to 1: draws of S seeds with replacement, widened by sqrt(S / (S - 1)).

    A weight can be negative.
    """
    count = len(seeds)
    if count == 1:
        return np.ones((samples, 1))
    # The labels are part of the random seed: models with the same seeds get the same draws, others do not.
    rng = np.random.default_rng([seed, zlib.crc32("\0".join(seeds).encode())])
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=samples) / count
    return 1 / count + (drawn - 1 / count) * np.sqrt(count / (count - 1))


def split_name(entry: str) -> tuple[str, str]:
    """Name and seed of ``name@seed``; the seed of a plain name is "".

    Raises:
        UserError: the name or the seed is empty.
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
    """name -> seed -> entry; names in the given order, seeds sorted.

    Raises:
        UserError: a name is given both with and without seeds.
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
    """entry -> (n_users, m) becomes name -> values of all its seeds."""
    return {
        name: SeededValues(tuple(seeds), np.stack([values[entry] for entry in seeds.values()], axis=1))
        for name, seeds in by_name(values).items()
    }
