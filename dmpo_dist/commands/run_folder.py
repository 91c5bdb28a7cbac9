"""The folder of a run: opened for a new one, and again to go on with what it began with."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from dmpo_dist.artifacts.environment import Environment
from dmpo_dist.artifacts.evaluation import EvaluationOrder
from dmpo_dist.artifacts.files import write_whole
from dmpo_dist.artifacts.locks import LOCK_FILE
from dmpo_dist.artifacts.log import (
    COMMANDS,
    METRICS_FILE,
    CheckpointRecord,
    EndRecord,
    LogRecord,
    StartRecord,
    read_log,
)
from dmpo_dist.artifacts.run_folder import (
    FAILED_FILE,
    clear_run_folder,
    config_file,
    failed_early,
    is_submission,
)
from dmpo_dist.artifacts.stamp import ModelStamp
from dmpo_dist.artifacts.tuning import Tuning
from dmpo_dist.config import RunConfig, dump_config, load_config
from dmpo_dist.config.section import dotted
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.model_files import damage_of
from dmpo_dist.records.environment import describe_environment
from dmpo_dist.training.engine import SET_BY, resolve_config
from dmpo_dist.training.job import Job, Kind
from dmpo_dist.training.runtime import CHECKPOINT
from dmpo_dist.training.state_files import read_index

FREE = ("cluster", "evaluation", "ranking", "serving", "submit", "tracking", "tune", "output_dir", "data")
"""Sections and keys that a resumed run may change: none changes a number. The content of the data is checked."""
SHOTS = ("data.shots", "data.shots_seed", "data.shots_skip")
"""Keys of the data section that are no property of the prepared data."""
FREE_OF_STAGE = ("log_every", "keep_checkpoints", "checkpoint_every", "token_budget")
LENGTH = ("steps", "epochs")
"""Keys of a stage that may grow."""
OPTIMIZATION = (
    "optimizer", "scheduler", "gradient_clipping", "bf16", "fp16", "amp", "torch_autocast", "data_types",
    "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "sparse_gradients",
    "zero_optimization.zero_quantized_weights", "zero_optimization.zero_quantized_nontrainable_weights",
    "zero_optimization.zero_quantized_gradients", "compression_training", "data_efficiency", "curriculum_learning",
    "progressive_layer_drop", "eigenvalue",
)  # fmt: skip
"""What of a DeepSpeed configuration decides the weights; the rest decides where they are."""


def open_run_folder(
    config: RunConfig,
    command: str,
    resume: bool,
    data_fingerprint: str | None = None,
    overwrite: bool | None = None,
    free: Sequence[str] = (),
) -> None:
    """Make ``output_dir`` and write ``config.yaml`` and ``environment.json`` (with the fingerprint) there.

    Args:
        command: see ``Environment``.
        overwrite: remove an earlier run there; None where the command has no such option.
        free: beginnings of keys that may be others when it is resumed.

    Raises:
        UserError: it exists and ``resume`` is not set, it is to be resumed and does not exist or holds another
            configuration or the run of another command, or it cannot be written.
    """
    output = config.output_dir
    if resume:
        require_run_of(command, output)
        old = _saved(output)
        _require_unchanged(old, config, output, free=lambda key: key.startswith(("output_dir", *free)))
        if free and old != config:
            write_whole(output / "config.yaml", dump_config(config))
        (output / FAILED_FILE).unlink(missing_ok=True)
        return
    if output.exists() and not _is_free_folder(output):
        if not overwrite and not failed_early(output):
            remove = "remove it" if overwrite is None else "remove it by --overwrite"
            raise UserError(
                f"output_dir {output} exists already; choose another (output_dir=...), go on with it by --resume, or "
                f"{remove}"
            )
        clear_run_folder(output, [config.data.path, Path(config.model.path)])
    try:
        output.mkdir(parents=True, exist_ok=True)
        write_whole(output / "config.yaml", dump_config(config))
        _new_environment(config, command, data_fingerprint).write(output)
    except OSError as error:
        raise UserError(f"output_dir {output} cannot be written: {error.strerror}; choose another output_dir") from None


def require_run_of(command: str, output: Path) -> None:
    """Raise UserError where ``output``, in which ``command`` is to go on, holds the run of another command."""
    other = _command_of(output)
    if other not in (None, command):
        raise UserError(f"--resume: {output} is a run of dmpo {other}; go on by dmpo {other} --resume")


def _command_of(output: Path) -> str | None:
    """The command that began the run in ``output``; of versions that did not note it, by the first file it left."""
    with suppress(UserError):  # a damaged file is told, or made again, where it is needed
        environment = Environment.read_if_there(output)
        if environment is not None and environment.command is not None:
            return environment.command
    starts = (record for record in _records(output) if isinstance(record, StartRecord) and record.stage)
    trained = next((COMMANDS[str(record.stage)] for record in starts), None)
    marks = {"evaluate": EvaluationOrder.FILE, "tune": Tuning.FILE}
    return trained or next((name for name, file in marks.items() if (output / file).exists()), None)


def require_no_data_path(config: RunConfig, command: str) -> None:
    """Raise UserError where ``data.path`` is given to a command that prepares its own data."""
    if config.data.path is not None:
        raise UserError(
            f"data.path={config.data.path} has no effect: dmpo {command} prepares its data itself, into "
            f"{config.output_dir}/data; leave it out"
        )


def reopen_run_folder(job: Job, data_fingerprint: str, steps_of: Callable[[RunConfig], int]) -> Environment:
    """Check that ``job`` may go on in its folder, and take note of the settings that it changes.

    Args:
        data_fingerprint: of the data as it is now.
        steps_of: a configuration -> its number of optimizer steps.

    Returns:
        What the run began with.

    Raises:
        UserError: there is no run, or one of the other stage, a setting that decides the result is another, or the data
            or the starting model are.
    """
    config, output = job.config, job.output
    require_run_of(job.section, output)
    old = _saved(output)

    def free(key: str) -> bool:
        if key == "deepspeed":  # a path, whose content counts
            return True
        if key in {f"{job.section}.{name}" for name in LENGTH}:
            return steps_of(config) >= steps_of(old)
        return is_free(key, job.kind)

    _require_unchanged(old, config, output, free, _changed_optimization(old, job))
    environment = _environment(job, data_fingerprint)
    if environment.data_fingerprint not in (None, data_fingerprint):
        began = str(environment.data_fingerprint)
        raise UserError(
            f"--resume: {config.data.path} does not hold the data that {output} began with (fingerprint "
            f"{data_fingerprint[:16]}, was {began[:16]}); give that data, or start a new run"
        )
    if old != config:
        write_whole(output / "config.yaml", dump_config(config))
    (output / FAILED_FILE).unlink(missing_ok=True)
    return environment


def require_same_start(began_with: dict[str, str], now: dict[str, str], job: Job) -> None:
    """Raise UserError where the starting model of a resumed run is not the one that it began with."""
    changed = sorted(name for name in began_with | now if began_with.get(name) != now.get(name))
    if began_with and changed:
        raise UserError(
            f"--resume: {changed[0]} of the starting model {job.start} is not what {job.output} began with; bring that "
            "file back, or start a new run"
        )


def last_checkpoint(output: Path) -> int:
    """The step of the latest checkpoint that the log in ``output`` tells of; 0 without one."""
    return max((record.step for record in _records(output) if isinstance(record, CheckpointRecord)), default=0)


def is_finished(output: Path, steps: int) -> bool:
    """Whether the log in ``output`` ends with the end of a run of ``steps`` steps, whose model is there undamaged."""
    records = _records(output)
    starts = [record for record in records if isinstance(record, StartRecord)]
    if not starts or not isinstance(records[-1], EndRecord) or starts[-1].steps != steps:
        return False
    model = output / "model"
    try:
        return not damage_of(model, ModelStamp.read(model))
    except UserError:
        return False


def changed_keys(old: RunConfig, new: RunConfig) -> list[str]:
    """Dotted keys whose values differ."""
    before, now = (dotted(c.model_dump(mode="json")) for c in (old, new))
    return [key for key in {**before, **now} if before.get(key) != now.get(key)]


def is_free(key: str, stage: Kind) -> bool:
    """Whether a resumed run of ``stage`` may have another value of ``key``, as it changes no number."""
    section, other = ("sft", ("train", "objective", "reference")) if stage == "sft" else ("train", ("sft",))
    names = (*FREE, *other, *(f"{section}.{name}" for name in FREE_OF_STAGE))
    if key in SHOTS:
        return False
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _saved(output: Path) -> RunConfig:
    """The configuration of the run in ``output``; a key that its version did not have has its default."""
    return load_config([config_file(output)])


def _records(output: Path) -> Sequence[LogRecord]:
    file = output / METRICS_FILE
    return read_log(file).records if file.exists() else []


def _require_unchanged(
    old: RunConfig, config: RunConfig, output: Path, free: Callable[[str], bool], also: Sequence[str] = ()
) -> None:
    """Raise UserError where keys differ that are not free, or anything ``also`` does."""
    changed = [key for key in changed_keys(old, config) if not free(key)] + [*also]
    if changed:
        raise UserError(
            f"--resume: the configuration differs from {output / 'config.yaml'} in {', '.join(changed)}; resume with "
            "the same settings, or start a new run with another output_dir"
        )


def _changed_optimization(old: RunConfig, job: Job) -> list[str]:
    """How DeepSpeed would train otherwise than before, as what to name in a message; nothing where it would not.

    The log says by what the run was trained. A JSON file may have been edited since, at the same path.
    """

    def resolved(config: RunConfig) -> dict[str, Any]:
        return resolve_config(config.deepspeed, job.stage, config.model.dtype, world_size=1, parameters=0)

    starts = [record.deepspeed for record in _records(job.output) if isinstance(record, StartRecord)]
    try:
        before = next(filter(None, reversed(starts)), None) or resolved(old)
    except UserError:  # killed before the log began, and the file is gone
        return ["deepspeed"]
    changed = optimization_differences(before, resolved(job.config))
    return [f"deepspeed ({', '.join(changed)})"] if changed else []


def optimization_differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Dotted keys of ``OPTIMIZATION`` in which two resolved DeepSpeed configurations differ.

    Values that keys of ours decide (``SET_BY``) are left out, as those are compared themselves.
    """
    old, new = dotted(before), dotted(now)

    def counts(key: str) -> bool:
        ours = key in old and key in new and any(key == name or key.endswith(f".{name}") for name in SET_BY)
        return not ours and any(key == name or key.startswith(f"{name}.") for name in OPTIMIZATION)

    def value(of: dict[str, Any], key: str) -> Any:
        return None if of.get(key) is False else of.get(key)  # switched off is as good as left out

    return [key for key in {**old, **new} if counts(key) and value(old, key) != value(new, key)]


def _new_environment(config: RunConfig, command: str, data_fingerprint: str | None) -> Environment:
    known: dict[str, Any] = {"command": command, "seed": config.seed, "run_id": uuid4().hex}
    if data_fingerprint is not None:
        known["data_fingerprint"] = data_fingerprint
    return describe_environment().model_copy(update=known)


def _environment(job: Job, data_fingerprint: str) -> Environment:
    """``environment.json`` of the run; where it is damaged, made again from what its checkpoints say.

    Raises:
        UserError: it is damaged, and there is not one run whose checkpoints say what it was.
    """
    try:
        return Environment.read(job.output)
    except UserError as error:
        damaged = error
    runs = _runs_of_checkpoints(job)
    if len(runs) > 1 or (not runs and last_checkpoint(job.output)):
        raise damaged
    environment = _new_environment(job.config, job.section, data_fingerprint)
    for run_id, inputs in runs.items():
        began = {"data_fingerprint": inputs.get("data"), "start_digests": inputs.get("model", {})}
        environment = environment.model_copy(update={"run_id": run_id, **began})
    environment.write(job.output)
    return environment


def _runs_of_checkpoints(job: Job) -> dict[str, dict[str, Any]]:
    """Run id -> what it began with, of the checkpoints that can be read; in storage that runs may share, of those that
    name no run of another name."""
    shared = job.config.cluster.storage_path
    storage = Path(shared or job.output)
    named = ((CHECKPOINT.fullmatch(folder.name), folder) for folder in sorted(storage.glob("checkpoints*/*step-*")))
    names = ("", job.output.name)
    ours = [folder for match, folder in named if match and (not shared or _run_folder(match["run"]) in names)]
    found = [read_index(folder) for folder in ours]
    return {index["run_id"]: index["inputs"] for index in found if not isinstance(index, str)}


def _run_folder(run: str | None) -> str:
    """The name of the folder of ``run``, as ``Job.run`` is made; "" where a checkpoint names no run."""
    return (run or "").rpartition("-")[0]


def _is_free_folder(path: Path) -> bool:
    """A folder without a run: empty, or with nothing but a lock and what ``dmpo submit`` wrote."""
    return path.is_dir() and all(entry.name == LOCK_FILE or is_submission(entry) for entry in path.iterdir())
