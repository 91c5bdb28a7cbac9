"""Ray Tune: trials of one worker each, some at a time, stopped early by asynchronous successive halving (ASHA)."""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

from dmpo_dist.cluster.resources import WITHOUT_GPUS
from dmpo_dist.cluster.train import gpus_per_worker_of, require_resources
from dmpo_dist.config import ClusterConfig

Report = Callable[[Mapping[str, Any]], None]
Body = Callable[[Any, Report], None]
SHARE, VALUE, END = "share", "value", "end"
"""Keys of a report: percent of the steps that are done, the figure to compare, and in the last one the outcome."""


class Watch(Protocol):
    """Hears of every trial, by its number among those of a call, in the driver's process."""

    def began(self, trial: int) -> None: ...

    def reported(self, trial: int, report: Mapping[str, Any]) -> None: ...

    def ended(self, trial: int, error: str) -> None:
        """The trial is over: it reported its ``END``, or was stopped, or died of ``error``."""
        ...

    def tick(self) -> None:
        """Time has passed."""
        ...


@dataclass(frozen=True)
class Halving:
    """When a trial is compared with the others, and what is known from trials of an earlier call.

    Attributes:
        earliest: percent of its steps after which a trial may be stopped.
        factor: of those compared about one in ``factor`` goes on; the next comparison is ``factor`` times later.
        earlier: for each earlier trial its (percent, value) in order.
    """

    earliest: float
    factor: float
    earlier: Sequence[Sequence[tuple[float, float]]] = field(default_factory=tuple)


def run_trials(
    trials: Sequence[Any],
    body: Body,
    watch: Watch,
    cluster: ClusterConfig,
    concurrent: int,
    seconds: float | None,
    halving: Halving,
    scratch: Path,
) -> None:
    """Run ``body(trial, report)`` for each of ``trials`` in a process of its own; call within ``ray_session``.

    A process that dies starts again up to ``cluster.max_failures`` times. Ray Tune's own files are
    removed at the end: what a trial leaves, and how it goes on after an interruption, is the body's.

    Args:
        body: a function at a module's top; higher values are better, and its last report has the key ``END``.
        concurrent: most trials at a time.
        seconds: after which all trials are stopped; None lets them finish.
        scratch: folder for Ray Tune's files, on storage that all nodes share; what an earlier call left there goes.

    Raises:
        UserError: the cluster is too small for one trial.
    """
    # Ray reads these later: no files for other viewers, no tables beside our lines, and Ctrl-C is ours.
    os.environ |= {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_SIGINT_HANDLER": "1",
    }  # fmt: skip
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    gpus = gpus_per_worker_of(cluster)
    require_resources(cluster, gpus)
    scheduler = ASHAScheduler(
        time_attr=SHARE, metric=VALUE, mode="max", max_t=100, grace_period=halving.earliest,
        reduction_factor=halving.factor, stop_last_trials=False,
    )  # fmt: skip
    _remember(scheduler, halving.earlier)

    def trainable(config: dict[str, Any], payload: Sequence[Any]) -> None:
        if not gpus:
            os.environ |= WITHOUT_GPUS  # before anything in this process, the trial's own, has looked for them
        body(payload[config["trial"]], tune.report)

    shutil.rmtree(scratch, ignore_errors=True)
    with_data = tune.with_parameters(trainable, payload=list(trials))
    tuner = tune.Tuner(
        tune.with_resources(with_data, {"cpu": cluster.cpus_per_worker, "gpu": gpus}),
        param_space={"trial": tune.grid_search(list(range(len(trials))))},
        tune_config=tune.TuneConfig(scheduler=scheduler, max_concurrent_trials=concurrent, time_budget_s=seconds),
        run_config=tune.RunConfig(
            name="trials",
            storage_path=str(scratch),
            verbose=0,
            callbacks=[_callback(watch)],
            failure_config=tune.FailureConfig(max_failures=cluster.max_failures),
        ),
    )
    try:
        tuner.fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _remember(scheduler: Any, earlier: Sequence[Sequence[tuple[float, float]]]) -> None:
    """Tell ``scheduler`` what earlier trials reached, so that later ones are compared with them too."""
    for number, reports in enumerate(earlier):
        trial = SimpleNamespace(trial_id=f"earlier-{number}")
        scheduler.on_trial_add(None, trial)
        for share, value in reports:
            scheduler.on_trial_result(None, trial, {SHARE: share, VALUE: value})


def _callback(watch: Watch) -> Any:
    """Ray Tune's callback that passes everything on to ``watch``."""
    from ray import tune

    class Passes(tune.Callback):
        def __init__(self, watch: Watch) -> None:
            self._watch = watch

        def __getstate__(self) -> dict[str, Any]:
            """Ray keeps a copy for restoring, which we do not do."""
            return {"_watch": None}

        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            self._watch.began(trial.config["trial"])

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
            self._watch.reported(trial.config["trial"], result)

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            self._watch.ended(trial.config["trial"], "")

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            text = str(trial.get_error() or "its process died").strip()
            self._watch.ended(trial.config["trial"], text.splitlines()[-1])

        def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
            self._watch.tick()

    return Passes(watch)
