"""The difference between two models' scores of the same candidates: in nats, and in the rankings that users see."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dmpo_dist.evaluation.metrics import ranking_metrics


@dataclass(frozen=True)
class Difference:
    """How far an exported model's log-probs are from the trained model's.

    Attributes:
        requests: what was scored, in words.
        trained_dtype: the dtype in which the trained model ran.
        candidates: how many log-probs were compared.
        max_nats, mean_nats: largest and mean absolute difference of the log-probs.
        top_changed: number of requests whose best candidate differs.
        order_changed: number of requests whose order of candidates differs.
        ndcg: NDCG@10 before and after; None where the requests are made up.
    """

    requests: str
    trained_dtype: str
    candidates: int
    max_nats: float
    mean_nats: float
    top_changed: int
    order_changed: int
    ndcg: tuple[float, ...] | None

    def __str__(self) -> str:
        ndcg = f", NDCG@10 {self.ndcg[0]:.4f} -> {self.ndcg[1]:.4f}" if self.ndcg else ""
        return (
            f"Against the trained model in {self.trained_dtype} on {self.requests}: log-probs of {self.candidates} "
            f"candidates differ by at most {self.max_nats:.2g} nats, on average {self.mean_nats:.2g}; another first "
            f"candidate in {self.top_changed} requests, another order in {self.order_changed}{ndcg}."
        )


def compare_scores(
    before: Sequence[np.ndarray], after: Sequence[np.ndarray], requests: str, real: bool, trained_dtype: str
) -> Difference:
    """Compare two models' log-probs, for each request a float64 array (1 + K,), the positive first.

    Args:
        requests: what was scored, in words.
        real: whether the users are known to like the first candidate of their request; without that there is no NDCG.
    """
    old, new = np.concatenate(before), np.concatenate(after)
    nats = np.abs(old - new)
    pairs = list(zip(before, after, strict=True))
    ndcg = None
    if real:
        ndcg = tuple(float(ranking_metrics(scores)["ndcg@10"].mean()) for scores in (before, after))
    return Difference(
        requests=requests,
        trained_dtype=trained_dtype,
        candidates=len(nats),
        max_nats=float(nats.max()),
        mean_nats=float(nats.mean()),
        top_changed=sum(int(a.argmax() != b.argmax()) for a, b in pairs),
        order_changed=sum(bool((a.argsort(kind="stable") != b.argsort(kind="stable")).any()) for a, b in pairs),
        ndcg=ndcg,
    )
