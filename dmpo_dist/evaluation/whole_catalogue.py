"""The test requests ranked among the whole catalogue: each user's positive against all items not taken before."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from datasets import Dataset

from dmpo_dist.artifacts.evaluation import CatalogueRanking
from dmpo_dist.config import RunConfig
from dmpo_dist.data.requests import Catalogue, RankingRequest
from dmpo_dist.data.store import ROW_FEATURES, PreparedData
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.baselines import (
    fitted_popularity_scores,
    item_knn_scores,
    popularity_scores,
    random_scores,
)
from dmpo_dist.evaluation.fitting_log import fitting_log, known_likes
from dmpo_dist.evaluation.metrics import CATALOGUE_CUTOFFS, CATALOGUE_METRICS, catalogue_metrics, coverage, gini
from dmpo_dist.evaluation.seeds import SEPARATOR, by_name, split_name, stacked
from dmpo_dist.evaluation.strata import cells
from dmpo_dist.modeling.trie_search import Beam

CANDIDATES_AT_ONCE = 1_000_000
"""Requests times items whose titles are held at once for the baselines."""
LIST_LENGTH = 10
"""Of the lists whose coverage and Gini index are measured."""
BEST = max(LIST_LENGTH, *CATALOGUE_CUTOFFS)
"""Titles of a request, and those that tie with the last of them, that all figures depend on."""


@dataclass(frozen=True)
class Ranked:
    """What one model makes of the requests.

    Attributes:
        metrics: ``CATALOGUE_METRICS``, (n_requests,) each.
        shown: item numbers of the first ``LIST_LENGTH`` of every list, one after the other.
    """

    metrics: dict[str, np.ndarray]
    shown: np.ndarray


def require_catalogue(data: PreparedData) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Items and log of ``data``; raises UserError where it has none."""
    if data.items is None or data.interactions is None:
        raise UserError(f"--catalogue: {data.path} was made from ready preferences, which have no catalogue")
    return data.items, data.interactions


def catalogue_at_test(data: PreparedData) -> Catalogue:
    """All titles in the order of ``data.items``, and how often each was taken in what may be known before the test.

    Counts are None where the data has no log. Raises UserError where it has no items.
    """
    if data.items is None:
        raise UserError(f"{data.path}: was made from ready preferences and has no catalogue; give --catalogue a file")
    titles, ids = tuple(data.items["title"].tolist()), tuple(data.items["item"].tolist())
    if data.interactions is None:
        return Catalogue(titles, None, ids)
    taken = fitting_log(data, "test")["item"].value_counts()
    return Catalogue(titles, data.items["item"].map(taken).fillna(0).to_numpy(np.int64), ids)


class WholeCatalogue:
    """The test requests of ``data`` with every catalogue item as a candidate but those the user took before.

    Args:
        exclude_history: ``ranking.exclude_history``; False leaves those among the candidates too.

    Attributes:
        repeated: number of requests whose positive the user took before.

    Raises:
        UserError: the data has no catalogue.
    """

    def __init__(self, data: PreparedData, exclude_history: bool = True) -> None:
        items, self._log = require_catalogue(data)
        self._data = data
        self.items, self.titles = items["item"].to_numpy(), items["title"].to_numpy()
        index_of = {item: index for index, item in enumerate(self.items.tolist())}
        test = data.test
        self._users, self._times = test["user"][:], test["timestamp"][:]
        self.requests = len(test)
        log = self._log[self._log["user"].isin(set(self._users))]
        by_user = {user: (part["item"].map(index_of).to_numpy(), part["timestamp"].to_numpy())
                   for user, part in log.groupby("user", sort=False)}  # fmt: skip
        self._candidates, self.repeated = [], 0
        for user, time, positive in zip(self._users, self._times, test["positive_item"][:], strict=True):
            taken, when = by_user.get(user, (np.empty(0, np.int64), np.empty(0, np.int64)))
            left = np.ones(len(self.items), dtype=bool)
            before = taken[when < time]
            self.repeated += index_of[positive] in before
            if exclude_history:
                left[before] = False
            left[index_of[positive]] = False
            self._candidates.append(np.concatenate([[index_of[positive]], np.flatnonzero(left)]))

    def baselines(self, names: Sequence[str], config: RunConfig, fit_on: PreparedData) -> dict[str, Ranked]:
        """Those of ``names`` that need no environment of their own, fitted on the log of ``fit_on``."""
        known, fitting = known_likes(fit_on), fitting_log(fit_on, "test")
        systems: dict[str, Callable[[Dataset], list[np.ndarray]]] = {
            "random": lambda rows: random_scores(rows, config.seed),
            "popularity": lambda rows: popularity_scores(rows, known),
            "pop_fitted": lambda rows: fitted_popularity_scores(rows, fitting),
            "item_knn": lambda rows: item_knn_scores(rows, fitting, config.evaluation.knn_neighbours),
        }
        systems = {name: system for name, system in systems.items() if name in names}
        blocks: dict[str, list[Ranked]] = {name: [] for name in systems}
        for start, rows in self._rows():
            for name, system in systems.items():
                blocks[name].append(_ranked(system(rows), self._candidates[start : start + len(rows)]))
        return {name: _joined(parts) for name, parts in blocks.items()}

    def scored(self, blocks: Iterable[np.ndarray]) -> Ranked:
        """A model that scored every item: blocks of some requests each, (n, n_items) in the order of ``items``."""
        parts, start = [], 0
        for scores in blocks:
            candidates = self._candidates[start : start + len(scores)]
            own = [row[columns] for row, columns in zip(scores, candidates, strict=True)]
            parts.append(_ranked(own, candidates))
            start += len(scores)
        assert start == len(self._candidates), "every request is scored"
        return _joined(parts)

    def request(self, index: int) -> tuple[RankingRequest, np.ndarray]:
        """A request, and (n_items,) bool, which items are its candidates: what ``Ranker.best`` asks for."""
        allowed = np.zeros(len(self.items), dtype=bool)
        allowed[self._candidates[index]] = True
        row = self._data.test[index]
        return RankingRequest(row["user"], tuple(row["history"]), None), allowed

    def ranked(self, best: Sequence[Sequence[Beam]]) -> Ranked:
        """A model that found the ``BEST`` titles of each request, see ``Ranker.best``, or some of them by beams."""
        return _joined([_ranked_among_best(*of_request) for of_request in zip(best, self._candidates, strict=True)])

    def _rows(self) -> Iterator[tuple[int, Dataset]]:
        """The first request and the requests with all candidates written out, some at a time."""
        step = max(1, CANDIDATES_AT_ONCE // len(self.items))
        for start in range(0, len(self._candidates), step):
            rows = self._data.test.select(range(start, min(start + step, len(self._candidates)))).to_dict()
            negatives = [candidates[1:] for candidates in self._candidates[start : start + step]]
            rows["negatives"] = [self.titles[at].tolist() for at in negatives]
            rows["negative_items"] = [self.items[at].tolist() for at in negatives]
            yield start, Dataset.from_dict(rows, features=ROW_FEATURES)


def summary(
    ranked: dict[str, Ranked], items: int, samples: int, seed: int, without_taken: bool = True
) -> CatalogueRanking:
    """Figures by model (95 % intervals over users and seeds), and means over seeds of coverage and gini.

    These two belong to the users' lists as a whole, so resampled users would only bias them.
    """
    values = {entry: np.stack([r.metrics[m] for m in CATALOGUE_METRICS], axis=1) for entry, r in ranked.items()}
    coverages, ginis = (
        {
            model: float(np.mean([measure(ranked[entry].shown, items) for entry in entries.values()]))
            for model, entries in by_name(ranked).items()
        }
        for measure in (coverage, gini)
    )
    models = {n: cells(CATALOGUE_METRICS, of_model.interval(samples, seed)) for n, of_model in stacked(values).items()}
    return CatalogueRanking(items=items, without_taken=without_taken, models=models, coverage=coverages, gini=ginis)


def beams_row(entry: str, beams: int) -> str:
    """What the model ``entry``, name or name@seed, is called where its titles come from ``beams`` beams."""
    name, seed = split_name(entry)
    return f"{name}, {beams} beam{'s' * (beams > 1)}" + (SEPARATOR + seed if seed else "")


def _ranked(scores: list[np.ndarray], candidates: Sequence[np.ndarray]) -> Ranked:
    """Metrics and lists; equal scores are listed in the order of the catalogue, whichever the positive is."""
    shown = [c[np.lexsort((c, -s))[:LIST_LENGTH]] for s, c in zip(scores, candidates, strict=True)]
    return Ranked(catalogue_metrics(scores), np.concatenate(shown))


def _ranked_among_best(best: Sequence[Beam], candidates: np.ndarray) -> Ranked:
    """Of one request whose best titles alone are known; a positive that is not among them counts as not ranked.

    Args:
        best: those that ``Ranker.best`` found among ``candidates``.
        candidates: item numbers, the positive first.
    """
    titles, log_probs = np.array([b.title for b in best]), np.array([b.log_prob for b in best])
    scores = np.full(candidates.max() + 1, log_probs.min() - 1)  # all others: below the best
    scores[titles] = log_probs
    metrics = catalogue_metrics([scores[candidates]])
    found = candidates[0] in titles
    return Ranked({metric: values * found for metric, values in metrics.items()}, titles[:LIST_LENGTH])


def _joined(parts: Sequence[Ranked]) -> Ranked:
    metrics = {metric: np.concatenate([part.metrics[metric] for part in parts]) for metric in CATALOGUE_METRICS}
    return Ranked(metrics, np.concatenate([part.shown for part in parts]))
