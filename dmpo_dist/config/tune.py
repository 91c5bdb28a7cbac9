"""The ``tune`` section of the configuration: what `dmpo tune` searches, and for how long."""

import math
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from dmpo_dist.config.section import Section

Kind = Literal["choice", "uniform", "loguniform", "integers", "logintegers"]
Space = dict[str, dict[Kind, list[Any]]]
"""Dotted key -> how its values are drawn, such as {"train.learning_rate": {"loguniform": [1e-6, 1e-3]}}."""
Tunable = Literal["item_knn", "ease", "sasrec", "bert4rec"]
USUAL_SPACES: dict[Tunable, Space] = {
    "item_knn": {"evaluation.knn_neighbours": {"logintegers": [5, 500]}},
    "ease": {"evaluation.ease_regularization": {"loguniform": [10, 100_000]}},
    "sasrec": {
        "evaluation.transformer.learning_rate": {"loguniform": [1e-4, 1e-2]},
        "evaluation.transformer.factors": {"choice": [32, 64, 128]},
        "evaluation.transformer.blocks": {"choice": [1, 2, 3]},
        "evaluation.transformer.dropout": {"uniform": [0, 0.5]},
    },
}
USUAL_SPACES["bert4rec"] = USUAL_SPACES["sasrec"]


class TuneConfig(Section):
    stage: Literal["train", "sft"] = "train"
    """The stage to tune: its command trains by the best settings found."""
    space: Space = Field(default_factory=dict)
    """Key -> how its values are drawn: {choice: [a, b, c]}, or {uniform: [low, high]}, loguniform, integers,
    logintegers (both ends included), as in {train.learning_rate: {loguniform: [1e-6, 1e-3]}}."""
    trials: int = Field(20, ge=1)
    """Most settings to try; each baseline gets as many."""
    hours: float | None = Field(None, gt=0)
    """Most hours to spend on trials, over all interruptions; each baseline gets as many. None: no limit."""
    concurrent: int = Field(1, ge=1)
    """Trials at a time, each of one worker."""
    earliest_stop: float = Field(0.1, gt=0, le=1)
    """Share of its steps after which a trial may be stopped (ASHA) because others were better at that point; 1 lets
    all trials finish."""
    reduction_factor: float = Field(3.0, gt=1)
    """Of the trials that reach a point of comparison, about one in so many goes on; the next point is so many times
    later."""
    baselines: dict[Tunable, Space] | None = None
    """Baseline -> its space, {} for the usual one. None takes those of ``evaluation.baselines`` that have settings."""

    @field_validator("space", "baselines")
    @classmethod
    def _can_be_drawn(cls, value: Any, info: ValidationInfo) -> Any:
        spaces = [value] if info.field_name == "space" else [*(value or {}).values()]
        for key, axis in (pair for space in spaces for pair in space.items()):
            _check_axis(key, axis)
        return value


def _check_axis(key: str, axis: dict[Kind, list[Any]]) -> None:
    """Raise ValueError for an axis that nothing can be drawn from; numbers in it may be texts, as YAML reads 1e-4."""
    if len(axis) != 1:
        raise ValueError(f"{key}: give one of choice, uniform, loguniform, integers or logintegers (got {[*axis]})")
    [(kind, values)] = axis.items()
    if kind == "choice":
        if not values:
            raise ValueError(f"{key}: choice has no values; give at least one")
        return
    low, high = _ends(key, kind, values)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"{key}: {kind} needs [low, high] with low below high (got {values})")
    if kind.startswith("log") and low <= 0:
        raise ValueError(f"{key}: {kind} needs a low above 0 (got {values})")
    if kind.endswith("integers") and not (low.is_integer() and high.is_integer()):
        raise ValueError(f"{key}: {kind} needs whole numbers (got {values})")


def _ends(key: str, kind: str, values: list[Any]) -> tuple[float, float]:
    try:
        low, high = map(float, values)
    except (TypeError, ValueError):
        raise ValueError(f"{key}: {kind} needs [low, high], two numbers (got {values})") from None
    return low, high
