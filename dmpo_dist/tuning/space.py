"""What a search draws: settings of one trial, checked against the schema before anything is trained."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from dmpo_dist.commands.run_folder import is_free
from dmpo_dist.config import RunConfig
from dmpo_dist.config.load import with_keys
from dmpo_dist.config.tune import Space
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.backbone import find_model
from dmpo_dist.training.job import Kind

NETWORK = "evaluation.transformer"
BASELINE_SETTINGS = {
    "item_knn": "evaluation.knn_neighbours",
    "ease": "evaluation.ease_regularization",
    "sasrec": NETWORK,
    "bert4rec": NETWORK,
}
"""Baseline that can be tuned -> the key that it heeds, or the section."""
YARDSTICK = ("select", "select_metric", "validate_every")
"""Keys of a stage that say how trials are compared."""
EXAMPLE = "tune.space={train.learning_rate: {loguniform: [1e-6, 1e-3]}, objective.beta: {choice: [0.1, 0.3, 1]}}"
TRIES = 100
"""Draws in a row without a new setting after which a space counts as exhausted."""


def require_stage_space(config: RunConfig, kind: Kind) -> None:
    """Raise UserError unless every axis of ``tune.space`` is a key that changes what the stage learns."""
    if not config.tune.space:
        raise UserError(f"tune.space is empty: say which keys to tune, as in '{EXAMPLE}'")
    section = "sft" if kind == "sft" else "train"
    for key in config.tune.space:
        where = f"tune.space.{key}"
        if key in ("seed", "data.shots_seed"):
            raise UserError(
                f"{where}: the best of several seeds is luck; leave it out and repeat the result over seeds"
            )
        if key.startswith("data.") and key != "data.shots":
            raise UserError(f"{where}: decided when data is prepared; prepare it both ways and tune on each")
        if key in {f"{section}.{name}" for name in YARDSTICK}:
            raise UserError(f"{where}: says how trials are compared, so it must be the same for all; leave it out")
        if key.startswith("model.lora") and config.model.path != "scratch" and find_model(config.model.path).is_adapter:
            raise UserError(
                f"{where}: {config.model.path} is an adapter, whose shape training keeps; tune it in the stage that "
                "makes the adapter"
            )
        if key == f"{section}.epochs" and getattr(config, section).steps is not None:
            raise UserError(f"{where}: has no effect while {section}.steps is set; set {section}.steps=null")
        if is_free(key, kind):
            raise UserError(f"{where}: changes nothing that dmpo {section} learns; leave it out")
    _require_values(config, config.tune.space, "tune.space")


def require_baseline_spaces(config: RunConfig, spaces: Mapping[str, Space]) -> None:
    """Raise UserError unless every axis is a setting of its baseline, and of no other that is tuned."""
    networks = [name for name in spaces if BASELINE_SETTINGS[name] == NETWORK]
    if len(networks) > 1:
        raise UserError(
            f"tune.baselines: {' and '.join(networks)} share {NETWORK}, and best.yaml could hold the best settings of "
            f"one alone; tune each in an output_dir of its own, as by 'tune.baselines={{{networks[0]}: {{}}}}'"
        )
    for name, space in spaces.items():
        own = BASELINE_SETTINGS[name]
        for key in space:
            if key != own and not key.startswith(f"{own}."):
                raise UserError(f"tune.baselines.{name}.{key}: is no setting of {name}, which has {own}")
        _require_values(config, space, f"tune.baselines.{name}")


def trial_values(config: RunConfig, space: Space, trials: int, seed: int) -> list[dict[str, Any]]:
    """The settings of up to ``trials`` trials, no two alike: first those of ``config``, then random ones.

    More trials keep the earlier ones. A space with fewer settings gives fewer trials.
    """
    found = [{key: value_of(config, key) for key in space}]
    seen = {json.dumps(found[0], default=str)}
    without_news = 0
    for draw in _draws(space, seed):
        if len(found) == trials or without_news == TRIES:
            break
        values = {key: value_of(with_values(config, draw), key) for key in space}
        text = json.dumps(values, default=str)
        without_news = without_news + 1 if text in seen else 0
        found += [] if text in seen else [values]
        seen.add(text)
    return found


def with_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """``config`` with the settings of a trial; of a key that holds a list, a single value is a list of one."""
    lists = {key: [value] for key, value in values.items() if _holds_list(config, key) and not isinstance(value, list)}
    first = sorted(values, key=lambda key: not key.endswith(".name"))  # another objective drops options set before
    return with_keys(config, {key: lists.get(key, values[key]) for key in first})


def value_of(config: RunConfig, key: str) -> Any:
    """The value of a dotted key as JSON has it; None where its section is missing."""
    value: Any = config.model_dump(mode="json")
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _draws(space: Space, seed: int) -> Iterator[dict[str, Any]]:
    number = 0
    while True:
        number += 1
        rng = np.random.default_rng([seed, number])
        yield {key: _drawn(*next(iter(space[key].items())), rng) for key in sorted(space)}


def _drawn(kind: str, values: list[Any], rng: np.random.Generator) -> Any:
    if kind == "choice":
        return values[int(rng.integers(len(values)))]
    low, high = map(float, values)
    if kind == "integers":
        return int(rng.integers(int(low), int(high) + 1))
    if kind == "uniform":
        return float(f"{rng.uniform(low, high):.3g}")
    if kind == "logintegers":  # each whole number has the interval around it, so that both ends can be drawn
        return int(np.clip(round(math.exp(rng.uniform(math.log(low - 0.5), math.log(high + 0.5)))), low, high))
    return float(f"{math.exp(rng.uniform(math.log(low), math.log(high))):.3g}")


def ends(axis: Mapping[Any, list[Any]]) -> list[Any]:
    """All values of a choice; the least and the greatest of a range."""
    [(kind, values)] = axis.items()
    if kind == "choice":
        return values
    return [int(float(value)) if "integers" in kind else float(value) for value in values]


def _require_values(config: RunConfig, space: Space, where: str) -> None:
    """Raise UserError where a key is none of the configuration, or may not hold what would be drawn for it."""
    for key, axis in space.items():
        for value in ends(axis):
            try:
                with_values(config, {key: value})
            except UserError as error:
                raise UserError(f"{where}: {str(error).splitlines()[-1].strip()}") from None


def _holds_list(config: RunConfig, key: str) -> bool:
    return isinstance(value_of(config, key), list)
