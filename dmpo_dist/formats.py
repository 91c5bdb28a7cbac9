"""The one way to write numbers, metrics and lists of names for people."""

import math
from collections.abc import Mapping, Sequence

MISSING = "\u2013"
NAMES = {
    "pair_accuracy": "pair accuracy",
    "pooled_auc": "pooled AUC",
    "recall": "Recall",
    "coverage": "coverage",
    "gini": "Gini",
}


def metric_name(metric: str) -> str:
    """``ndcg@10`` as people write it: NDCG@10."""
    name, at, cutoff = metric.partition("@")
    return NAMES.get(name, name.replace("_", " ").upper()) + at + cutoff


def number(value: float | None, form: str = ".3f") -> str:
    """The number with a real minus sign, or a dash where it is None or NaN."""
    return MISSING if value is None or math.isnan(value) else format(value, form).replace("-", "\u2212")


def interval(low: float | None, high: float | None, form: str = ".3f") -> str:
    """``[0.501, 0.532]``; empty where an end is missing."""
    return "" if low is None or high is None else f"[{number(low, form)}, {number(high, form)}]"


def size(count: int) -> str:
    """A number of bytes as ``1.2 MB``."""
    if count < 1000:
        return f"{count} B"
    for unit, of_bytes in (("kB", 1e3), ("MB", 1e6)):
        if count < 1000 * of_bytes:
            return f"{count / of_bytes:.3g} {unit}"
    return f"{count / 1e9:.3g} GB"


def candidates(negatives: Mapping[str, int]) -> str:
    """Candidates per request, ``1 + 19``, or ``1 + 5 to 19`` where requests differ."""
    fewest, most = negatives.get("fewest", min(negatives.values())), negatives.get("most", max(negatives.values()))
    return f"1 + {fewest}" if fewest == most else f"1 + {fewest} to {most}"


def joined(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
