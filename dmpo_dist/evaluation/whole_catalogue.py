"""The test requests ranked among the whole catalogue: each user's positive against all items not taken before."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from datasets import Dataset
from rich import box
from rich.table import Table

from dmpo_dist.config import RunConfig
from dmpo_dist.data.requests import Catalogue, RankingRequest
from dmpo_dist.data.store import ROW_FEATURES, PreparedData
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.baselines import item_knn_scores, popularity_scores, random_scores
from dmpo_dist.evaluation.metrics import bootstrap_interval, top_metrics
from dmpo_dist.evaluation.ranking import Ranker

CANDIDATES_AT_ONCE = 1_000_000
"""Requests times items whose titles are held at once for the baselines."""
SHOWN = ("hr@1", "hr@5", "hr@10", "hr@20", "ndcg@10", "ndcg@20", "mrr@20")

Block = list[np.ndarray]
"""For each of some requests the scores of its candidates, the positive first."""


class WholeCatalogue:
    """The test requests of ``data`` with every catalogue item as a candidate but those the user took before.

    Raises:
        UserError: the data has no catalogue.
    """

    def __init__(self, data: PreparedData) -> None:
        if data.items is None or data.interactions is None:
            raise UserError(f"--catalogue: {data.path} was made from ready preferences, which have no catalogue")
        self._data, self._log = data, data.interactions
        self._cut = int(data.card["cuts"]["test"]["timestamp"])
        self.items, self.titles = data.items["item"].to_numpy(), data.items["title"].to_numpy()
        place = {item: index for index, item in enumerate(self.items.tolist())}
        test = data.test
        self._users, self._times = test["user"][:], test["timestamp"][:]
        log = self._log[self._log["user"].isin(set(self._users))]
        by_user = {user: (part["item"].map(place).to_numpy(), part["timestamp"].to_numpy())
                   for user, part in log.groupby("user", sort=False)}  # fmt: skip
        self._candidates = []
        for user, time, positive in zip(self._users, self._times, test["positive_item"][:], strict=True):
            taken, when = by_user.get(user, (np.empty(0, np.int64), np.empty(0, np.int64)))
            left = np.ones(len(self.items), dtype=bool)
            left[taken[when < time]] = False
            left[place[positive]] = False
            self._candidates.append(np.concatenate([[place[positive]], np.flatnonzero(left)]))

    def baselines(self, config: RunConfig) -> dict[str, dict[str, np.ndarray]]:
        """Metrics (n_requests,) of random, popularity at request time and item-kNN up to the test cut."""
        systems: dict[str, Callable[[Dataset], Block]] = {
            "random": lambda rows: random_scores(rows, config.seed),
            "popularity": lambda rows: popularity_scores(rows, self._log),
            "item_knn": lambda rows: item_knn_scores(rows, self._log, config.evaluation.knn_neighbours, self._cut),
        }
        blocks = [{name: top_metrics(score(rows)) for name, score in systems.items()} for rows in self._rows()]
        return {name: _joined([block[name] for block in blocks]) for name in systems}

    def model(self, path: str, config: RunConfig) -> dict[str, np.ndarray]:
        """Metrics (n_requests,) of the model in ``path`` under ``config.ranking``; popularity is that at the test cut."""
        counts = self._log[self._log["timestamp"] < self._cut]["item"].value_counts()
        popularity = self._data.items["item"].map(counts).fillna(0).to_numpy(np.int64)  # pyrefly: ignore
        ranker = Ranker(path, config, Catalogue(tuple(self.titles.tolist()), popularity), top=1)
        rows = zip(self._users, self._data.test["history"][:], self._candidates, strict=True)
        metrics = []
        for user, history, candidates in rows:
            scores = ranker.scores(RankingRequest(user, tuple(history), None), self.titles)
            if not np.isfinite(scores).all():
                raise UserError(f"{path}: a score of user {user!r} is not finite; try model.dtype=float32")
            metrics.append(top_metrics([scores[candidates]]))
        return _joined(metrics)

    def _rows(self) -> Iterator[Dataset]:
        """The requests with all candidates written out, some at a time."""
        step = max(1, CANDIDATES_AT_ONCE // len(self.items))
        for start in range(0, len(self._candidates), step):
            rows = self._data.test.select(range(start, min(start + step, len(self._candidates)))).to_dict()
            negatives = [candidates[1:] for candidates in self._candidates[start : start + step]]
            rows["negatives"] = [self.titles[at].tolist() for at in negatives]
            rows["negative_items"] = [self.items[at].tolist() for at in negatives]
            yield Dataset.from_dict(rows, features=ROW_FEATURES)


def summary(metrics: dict[str, dict[str, np.ndarray]], items: int, samples: int, seed: int) -> dict[str, Any]:
    """For evaluation.json: ``items`` and ``models`` (name -> metric -> value, low, high: 95 % over users)."""
    models = {}
    for name, of_model in metrics.items():
        interval = bootstrap_interval(np.stack(list(of_model.values()), axis=1), samples, seed)
        models[name] = {
            metric: dict(zip(("value", "low", "high"), (float(x[i]) for x in interval), strict=True))
            for i, metric in enumerate(of_model)
        }
    return {"items": items, "models": models}


def catalogue_table(result: dict[str, Any], requests: int) -> Table:
    """The main metrics, one row a model."""
    title = f"{requests} requests among all {result['items']} items, those taken before left out; 95 % intervals"
    table = Table("model", *SHOWN, title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, of_model in result["models"].items():
        cells = [of_model[metric] for metric in SHOWN]
        table.add_row(name, *(f"{c['value']:.3f}\n{c['low']:.3f}\u2013{c['high']:.3f}" for c in cells))
    return table


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {metric: np.concatenate([part[metric] for part in parts]) for metric in parts[0]}
