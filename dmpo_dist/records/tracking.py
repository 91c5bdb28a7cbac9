"""Weights & Biases and MLflow: checked before a run starts, then fed by ``sinks.Background``."""

import logging
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from dmpo_dist.artifacts.environment import Environment
from dmpo_dist.artifacts.files import write_whole
from dmpo_dist.artifacts.log import LogRecord, StepRecord, ValidationRecord
from dmpo_dist.config.section import dotted
from dmpo_dist.config.tracking import MlflowConfig, TrackingConfig, WandbConfig
from dmpo_dist.errors import UserError
from dmpo_dist.figures.curves import CURVES_FILE
from dmpo_dist.records.sinks import Background, Sink, figures
from dmpo_dist.training.job import Job

ID_FILE = "{}-run-id"
"""File in a run folder with the run's id in a tracker, so that a resumed run continues there."""
EXTRA = 'pip install -c constraints.txt -e ".[track]"'
MLFLOW_LONGEST_VALUE, MLFLOW_MOST_PARAMETERS = 6000, 100


def check_tracking(config: TrackingConfig) -> None:
    """Check that the trackers can be used, before anything is written.

    Raises:
        UserError: a package is missing, there is no API key, or the server or store cannot be used.
    """
    if config.wandb is not None:
        _require_package("wandb", "wandb")
        _check_wandb(config.wandb)
    if config.mlflow is not None:
        for package in ("mlflow", "sqlalchemy", "alembic"):
            _require_package("mlflow", package)
        _check_mlflow(config.mlflow)


def open_trackers(job: Job, warn: Callable[[str], None]) -> list[Sink]:
    """The trackers that ``job`` asks for; if one fails, ``warn`` gets a line and the run goes on."""
    config = job.config.tracking
    sinks: list[Sink] = []
    if config.wandb is not None:
        sinks.append(Background("wandb", partial(WandbRun, job, config.wandb), warn))
    if config.mlflow is not None:
        sinks.append(Background("mlflow", partial(MlflowRun, job, config.mlflow), warn))
    return sinks


class WandbRun:
    """A run in Weights & Biases; a resumed run continues the same one."""

    def __init__(self, job: Job, config: WandbConfig) -> None:
        import wandb

        self._curves = job.output / CURVES_FILE
        self._image = wandb.Image
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            mode=config.mode,
            name=_name(job),
            job_type=job.section,
            tags=_tags(job),
            config=job.config.model_dump(mode="json") | {"environment": _environment(job).content()},
            dir=str(job.output),
            id=_read_id(job.output, "wandb") or uuid.uuid4().hex[:8],
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )
        _write_id(job.output, "wandb", self._run.id)
        for group in ("train", "validation"):
            self._run.define_metric(f"{group}/*", step_metric="step")

    def write(self, record: LogRecord) -> None:
        if isinstance(record, StepRecord | ValidationRecord):
            self._run.log(figures(record) | {"step": record.step})

    def close(self, result: Mapping[str, float], finished: bool) -> None:
        if self._curves.exists():
            self._run.log({"curves": self._image(str(self._curves))})
        self._run.summary.update({f"final/{name}": value for name, value in result.items()})
        self._run.finish(exit_code=0 if finished else 1)


class MlflowRun:
    """A run in MLflow; a resumed run continues the same one."""

    def __init__(self, job: Job, config: MlflowConfig) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient(config.tracking_uri)
        self._curves = job.output / CURVES_FILE
        if known := _read_id(job.output, "mlflow"):
            self._id = known
            self._client.update_run(self._id, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(config.experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(config.experiment)
        tags = {"stage": job.section} | {tag: "yes" for tag in _tags(job)}
        if commit := _environment(job).git_commit:
            tags["mlflow.source.git.commit"] = commit
        self._id = self._client.create_run(experiment, run_name=_name(job), tags=tags).info.run_id
        _write_id(job.output, "mlflow", self._id)
        values = dotted(job.config.model_dump(mode="json")).items()
        parameters = [Param(key, str(value)[:MLFLOW_LONGEST_VALUE]) for key, value in values]
        for first in range(0, len(parameters), MLFLOW_MOST_PARAMETERS):
            self._client.log_batch(self._id, params=parameters[first : first + MLFLOW_MOST_PARAMETERS])

    def write(self, record: LogRecord) -> None:
        if isinstance(record, StepRecord | ValidationRecord):
            self._log(figures(record), record.step)

    def close(self, result: Mapping[str, float], finished: bool) -> None:
        self._log({f"final/{name}": value for name, value in result.items()}, 0)
        if self._curves.exists():
            self._client.log_artifact(self._id, str(self._curves))
        self._client.set_terminated(self._id, "FINISHED" if finished else "FAILED")

    def _log(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(name.replace("@", "_at_"), value, now, step) for name, value in values.items()]  # no @ there
        self._client.log_batch(self._id, metrics=metrics)


def _require_package(tracker: str, package: str) -> None:
    if find_spec(package) is None:
        raise UserError(f"tracking.{tracker} is set, but the package {package} is not installed; {EXTRA}")


def _check_wandb(config: WandbConfig) -> None:
    import wandb

    if config.mode == "offline":
        return
    try:
        known = wandb.login(prompt=False)
    except Exception as error:
        raise UserError(
            f"tracking.wandb: {_first_line(error)}; run `wandb login --relogin`, or set tracking.wandb.mode=offline"
        ) from None
    if not known:
        raise UserError(
            "tracking.wandb: there is no API key (or WANDB_MODE switches wandb off); run `wandb login` or set "
            "WANDB_API_KEY, or set tracking.wandb.mode=offline"
        )


def _check_mlflow(config: MlflowConfig) -> None:
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)  # these log many lines when they create a store
    try:
        MlflowClient(config.tracking_uri).search_experiments(max_results=1)
    except Exception as error:
        server = config.tracking_uri or "MLFLOW_TRACKING_URI or mlflow.db"
        raise UserError(
            f"tracking.mlflow.tracking_uri={server}: cannot be used ({_first_line(error)}); correct it, for example "
            "http://server:5000 or sqlite:///runs/mlflow.db"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def _name(job: Job) -> str:
    return job.config.tracking.name or job.output.name


def _tags(job: Job) -> list[str]:
    objective = [job.config.objective.name] if job.kind == "preference" else []
    return list(dict.fromkeys([job.section, *objective, *job.config.tracking.tags]))


def _environment(job: Job) -> Environment:
    return Environment.read_if_there(job.output) or Environment()


def _read_id(folder: Path, tracker: str) -> str | None:
    file = folder / ID_FILE.format(tracker)
    return file.read_text(encoding="utf-8").strip() if file.exists() else None


def _write_id(folder: Path, tracker: str, run: str) -> None:
    write_whole(folder / ID_FILE.format(tracker), run + "\n")
