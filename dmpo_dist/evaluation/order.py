"""Do scores depend on the order in which candidates and requests come? They should not, and here it is measured."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from dmpo_dist.data.candidates import balance_line, place_of
from dmpo_dist.data.store import groups_from_rows
from dmpo_dist.evaluation.metrics import ranking_metrics

ORDERS = 3
Score = Callable[[Dataset], list[np.ndarray]]


def order_spread(score: Score, rows: Dataset, scores: Sequence[np.ndarray], requests: int, seed: int) -> dict[str, Any]:
    """Score some requests again, with candidates shuffled ``ORDERS`` times and with other neighbours in packed rows.

    Args:
        score: rows -> per request (1 + K,), the positive first.
        rows: the requests.
        scores: of all of them, as they come.
        requests: how many to score again, drawn by ``seed``.

    Returns:
        ``candidates`` and ``packing``, each with ``max_difference`` (of a candidate's score, in nats) and ``ndcg@10``
        (lowest and highest mean over these requests).
    """
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(len(rows), min(requests, len(rows)), replace=False))
    few = rows.select(chosen)
    before = [np.asarray(scores[index]) for index in chosen]
    shuffled = [_shuffled(score, few, rng) for _ in range(ORDERS)]
    order = rng.permutation(len(few))
    moved = score(few.select(order))
    packed = [moved[index] for index in np.argsort(order)]
    return {"candidates": _spread(before, shuffled), "packing": _spread(before, [packed])}


def lists_note(names: Sequence[str], rows: Dataset, seed: int, orders: int) -> str:
    """A sentence on the models ``names``, whose prompts list the candidates of ``rows``: where the positives stand."""
    groups = groups_from_rows(rows)
    places = [
        place_of(group, (group.positive, *group.negatives), seed, draw) for group in groups for draw in range(orders)
    ]
    mean = f"scores are the mean over {orders} orders" if orders > 1 else "one order each"
    return f"prompts of {', '.join(names)} list the candidates, {mean}: {balance_line(places)}"


def _shuffled(score: Score, rows: Dataset, rng: np.random.Generator) -> list[np.ndarray]:
    """Scores with each request's candidates in another order, put back into the old one."""
    orders = [rng.permutation(1 + len(negatives)) for negatives in rows["negatives"][:]]
    table = rows.to_dict()
    for one, others in (("positive", "negatives"), ("positive_item", "negative_items")):
        lists = [[p, *n] for p, n in zip(table[one], table[others], strict=True)]
        lists = [
            [titles[i] for i in order] if len(titles) == len(order) else titles
            for titles, order in zip(lists, orders, strict=True)
        ]
        table[one], table[others] = [titles[0] for titles in lists], [titles[1:] for titles in lists]
    again = score(Dataset.from_dict(table, features=rows.features))
    return [values[np.argsort(order)] for values, order in zip(again, orders, strict=True)]


def _spread(before: list[np.ndarray], others: Sequence[list[np.ndarray]]) -> dict[str, Any]:
    ndcg = [float(ranking_metrics(scores)["ndcg@10"].mean()) for scores in (before, *others)]
    largest = max(float(np.abs(a - b).max()) for scores in others for a, b in zip(before, scores, strict=True))
    return {"max_difference": largest, "ndcg@10": {"lowest": min(ndcg), "highest": max(ndcg)}}
