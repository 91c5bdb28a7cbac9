"""The search over a baseline's settings: as many trials and hours as the stage gets, on the same requests."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console

from dmpo_dist.artifacts.tuning import Search, Trial
from dmpo_dist.config import RunConfig
from dmpo_dist.config.tune import USUAL_SPACES, Space
from dmpo_dist.data.store import PreparedData
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.baselines import item_knn_scores
from dmpo_dist.evaluation.classical import CLASSICAL, classical_validation
from dmpo_dist.evaluation.fitting_log import fitting_log, of_same_users
from dmpo_dist.evaluation.metrics import ranking_metrics
from dmpo_dist.tuning.space import with_values

METRIC = "ndcg@10"
"""What baselines are compared by, which is what those of RecTools choose by, too."""


def baseline_spaces(config: RunConfig, data: PreparedData) -> dict[str, Space]:
    """Baseline -> its space: those of ``tune.baselines``, or those of ``evaluation.baselines`` that have settings.

    Raises:
        UserError: baselines are asked for, and the data has no log to fit them on, or they are to be fitted on the
            whole log and on a few groups, for which other settings may be the best.
    """
    asked = config.tune.baselines
    if data.interactions is None:
        if asked:
            raise UserError(f"tune.baselines: {data.path} came as ready preferences, without a log; leave them out")
        return {}
    both = {*config.evaluation.fit_on} == {"log", "shots"}
    named = {name: {} for name in config.evaluation.baselines if name in USUAL_SPACES} if asked is None else asked
    if named and both:
        raise UserError(
            "evaluation.fit_on=[log, shots]: baselines are tuned on one of them; tune with evaluation.fit_on=[log] and "
            "with evaluation.fit_on=[shots], each in an output_dir of its own, or without baselines (tune.baselines={})"
        )
    return {name: space or USUAL_SPACES[name] for name, space in named.items()}


def data_to_fit_on(config: RunConfig, data: PreparedData) -> PreparedData:
    """``data``, which has a log, with the log that ``evaluation.fit_on`` names, as an evaluation would fit on it.

    Raises:
        UserError: fewer training groups than ``data.shots``.
    """
    return of_same_users(data, config.data) if config.evaluation.fit_on == ["shots"] else data


def search_baseline(
    search: Search, values: list[dict[str, Any]], config: RunConfig, data: PreparedData, save: Callable[[], None],
    console: Console,
) -> None:  # fmt: skip
    """Try the ``values`` that ``search`` has not tried yet, one after the other, while its budget lasts.

    The budget is looked at between trials. A trial of a network (sasrec, bert4rec) chooses its epochs by itself.
    """
    for number in range(1 + len(search.trials), len(values) + 1):
        if search.seconds_left == 0:
            return
        began = time.monotonic()
        trial = Trial(number=number, values=values[number - 1], state="done", share=100)
        try:
            trial.value = _validation(search.name, with_values(config, trial.values), data)
        except UserError as error:
            if number == 1:  # not a matter of the settings
                raise
            trial.state, trial.error = "failed", str(error)
        trial.seconds = round(time.monotonic() - began, 2)
        search.trials = [*search.trials, trial]
        search.seconds += trial.seconds
        save()
        shown = ", ".join(f"{key}={value}" for key, value in trial.values.items())
        figure = trial.error or f"{METRIC} {trial.value:.4f}"
        console.print(
            f"{search.name}, trial {number} of {len(values)}: {shown}: {figure}", highlight=False, markup=False,
            soft_wrap=True,
        )  # fmt: skip


def _validation(name: str, config: RunConfig, data: PreparedData) -> float:
    """The metric of a baseline on the validation requests, fitted on what it may know then."""
    if name in CLASSICAL:
        tried = classical_validation(name, data, config.evaluation, config.seed, lambda line: None)
        return max(tried.values())
    scores = item_knn_scores(data.validation, fitting_log(data, "validation"), config.evaluation.knn_neighbours)
    return float(np.mean(ranking_metrics(scores)[METRIC]))
