"""All baselines that a configuration asks for, on the test requests of prepared data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np

from dmpo_dist.config import RunConfig
from dmpo_dist.config.evaluation import SAME_USERS, Baseline
from dmpo_dist.data.store import PreparedData
from dmpo_dist.evaluation.baselines import (
    fitted_popularity_scores,
    item_knn_scores,
    popularity_scores,
    random_scores,
)
from dmpo_dist.evaluation.classical import CLASSICAL, classical_scores
from dmpo_dist.evaluation.fitting_log import fitting_log, known_likes, knows_the_future, of_same_users
from dmpo_dist.evaluation.whole_catalogue import Ranked, WholeCatalogue

Scores = dict[str, list[np.ndarray]]
"""Model -> per request a float64 array (1 + K,), the positive first."""


@dataclass(frozen=True)
class BaselineScores:
    """What the baselines give.

    Attributes:
        scores: baseline -> its scores of the test requests.
        catalogue: baseline -> its ranking of the whole catalogue, of those from RecTools where that was asked for.
        details: baseline -> what is known of its training, of those from RecTools.
    """

    scores: Scores = field(default_factory=dict)
    catalogue: Mapping[str, Ranked] = field(default_factory=dict)
    details: Mapping[str, dict[str, Any]] = field(default_factory=dict)


def baseline_scores(
    data: PreparedData, config: RunConfig, catalogue: bool, echo: Callable[[str], None]
) -> BaselineScores:
    """The baselines of ``config``, fitted on all that ``evaluation.fit_on`` names.

    Args:
        catalogue: also rank the whole catalogue, by those from RecTools that are fitted on the whole log.
        echo: gets a line for each thing to know of them and for each training.

    Raises:
        UserError: see ``classical_scores``; fewer training groups than ``data.shots``.
    """
    for note in notes_of(data, config):
        echo(f"note: {note}")
    found = BaselineScores()
    if "log" in config.evaluation.fit_on:
        found = _fitted_on(data, config, catalogue, echo)
    if "shots" in config.evaluation.fit_on and data.interactions is not None:
        few = _fitted_on(of_same_users(data, config.data), config, False, echo)
        named = {name + SAME_USERS: scores for name, scores in few.scores.items() if name != "random"}
        details = {name + SAME_USERS: known for name, known in few.details.items()}
        found = BaselineScores(found.scores | named, found.catalogue, {**found.details, **details})
    return found


def names_of(data: PreparedData, config: RunConfig) -> list[str]:
    """The baselines that are asked for and that the data allows, before they are named by what they are fitted on."""
    return [name for name in config.evaluation.baselines if name == "random" or data.interactions is not None]


def rows_of_baselines(data: PreparedData, config: RunConfig) -> list[str]:
    """What the baselines are called in tables."""
    asked, fit_on = names_of(data, config), config.evaluation.fit_on
    whole = asked if "log" in fit_on else []
    return [*whole, *(name + SAME_USERS for name in asked if name != "random" and "shots" in fit_on)]


def notes_of(data: PreparedData, config: RunConfig) -> list[str]:
    """What a reader of the figures must know of the baselines."""
    asked = set(config.evaluation.baselines)
    if data.interactions is None:
        left = ", ".join(name for name in config.evaluation.baselines if name != "random")
        notes = [f"no {left}: the data came as ready preferences, without a log"] if left else []
        rows, users = len(data.test), data.card.users.get("test", len(data.test))
        if users < rows:
            notes.append(
                f"the {rows} test rows have {users} different histories or prompts; intervals take rows as "
                "independent, and are too narrow where one user has several"
            )
        return notes
    notes = []
    fitted = [name for name in get_args(Baseline) if name in asked - {"random", "popularity"}]
    if fitted and knows_the_future(data):
        notes.append(
            f"leave-one-out: what is fitted ({', '.join(fitted)}) knows what other users did after a request, and of "
            "its own user nothing from it on; popularity counts what came before it. Not comparable with figures of a "
            "time split"
        )
    if "shots" in config.evaluation.fit_on and asked - {"random"}:
        few = config.data.shots or len(data.train)
        notes.append(
            f"(same users): fitted on nothing but the likes that the {few} training groups show, their histories and "
            "positives; tuned on the same validation requests as the others"
        )
    return notes


def _fitted_on(data: PreparedData, config: RunConfig, catalogue: bool, echo: Callable[[str], None]) -> BaselineScores:
    """The baselines fitted on the log of ``data``."""
    names, test, settings = names_of(data, config), data.test, config.evaluation
    scores: Scores = {}
    if "random" in names:
        scores["random"] = random_scores(test, config.seed)
    if data.interactions is None:
        return BaselineScores(scores)
    if "popularity" in names:
        scores["popularity"] = popularity_scores(test, known_likes(data))
    known = fitting_log(data, "test")
    if "pop_fitted" in names:
        scores["pop_fitted"] = fitted_popularity_scores(test, known)
    if "item_knn" in names:
        scores["item_knn"] = item_knn_scores(test, known, settings.knn_neighbours)
    classical = [name for name in names if name in CLASSICAL]
    if not classical:
        return BaselineScores(scores)
    whole = WholeCatalogue(data, config.ranking.exclude_history) if catalogue else None
    trained = classical_scores(classical, data, settings, config.seed, whole, echo)
    return BaselineScores(scores | trained.candidates, trained.catalogue, trained.details)
