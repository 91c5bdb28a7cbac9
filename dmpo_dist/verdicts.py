"""When a difference counts as one: the rule behind every "ahead of", "no clear difference", bold figure and filled dot.

A difference is clear where its 95 % interval and its p-value agree:

- both ends of the interval, as they are printed (three decimals), lie on one side of 0;
- its p-value is below 0.05 after a correction for all differences that are shown together. The correction is that of
  Benjamini and Hochberg (1995), by ``scipy.stats.false_discovery_control``: among the differences that are called
  clear, at most 5 % are expected to be none.

Without an interval or a p-value, as in files of earlier versions, no difference is clear.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

LEVEL = 0.05
DECIMALS = 3

Verdict = Literal["ahead of", "behind", "level with"]
Difference = tuple[float | None, float | None, float | None]
"""Low, high and the two-sided p-value before any correction; None or nan where it is not known."""


@dataclass(frozen=True)
class Judged:
    """What a difference shows: its verdict, and its p-value after the correction (None where it has none)."""

    verdict: Verdict
    p: float | None

    @property
    def clear(self) -> bool:
        """Whether it is a difference at all."""
        return self.verdict != "level with"


def judge(differences: Iterable[Difference]) -> list[Judged]:
    """The verdicts on all differences that are shown together, in their order."""
    shown = list(differences)
    ps = _corrected([_known(p) for _, _, p in shown])
    return [Judged(_verdict(_known(low), _known(high), p), p) for (low, high, _), p in zip(shown, ps, strict=True)]


def rule(count: int) -> str:
    """The rule in a sentence, for readers of ``count`` differences."""
    corrected = f", corrected for the {count} differences (Benjamini-Hochberg)," if count > 1 else ""
    return (
        "A difference is clear where its 95 % interval, as printed, lies on one side of 0 and its p-value"
        f"{corrected} is below {LEVEL:g}."
    )


def _verdict(low: float | None, high: float | None, p: float | None) -> Verdict:
    if low is None or high is None or p is None or round(p, DECIMALS) >= LEVEL:
        return "level with"
    return "ahead of" if round(low, DECIMALS) > 0 else "behind" if round(high, DECIMALS) < 0 else "level with"


def _corrected(ps: list[float | None]) -> list[float | None]:
    """The p-values after the correction; those that are not known stay so and do not count."""
    from scipy.stats import false_discovery_control  # half a second that most commands do not need

    known = [p for p in ps if p is not None]
    corrected = iter(false_discovery_control(known).tolist() if known else ())
    return [None if p is None else next(corrected) for p in ps]


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)
