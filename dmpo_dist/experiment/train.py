"""Training the models of an experiment: on one set of Ray workers, or in this process under torchrun."""

import os
import shutil
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from dmpo_dist.artifacts.environment import Environment
from dmpo_dist.commands.run_folder import changed_keys, is_free, last_checkpoint
from dmpo_dist.commands.train import absolute_storage, run_stage, run_stages, say
from dmpo_dist.config import RunConfig, load_config
from dmpo_dist.errors import UserError
from dmpo_dist.experiment.parts import DEEPSPEED_CONTENT, Part
from dmpo_dist.experiment.stamps import begin, begun, changed_settings, stamp_failed, trained
from dmpo_dist.records.read import CONFIG_FILE
from dmpo_dist.secrets import redact
from dmpo_dist.training.runtime import step_of

CHECKPOINTS = "checkpoints"
"""The folder of a run's checkpoints in its own, where one process trains."""


def in_this_process() -> bool:
    """Whether torchrun started this process, so that models are trained in it and without Ray.

    Raises:
        UserError: torchrun started several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
        raise UserError(
            "dmpo experiment under torchrun trains in one process; use --nproc-per-node 1, or start it without "
            "torchrun and set cluster.workers for that many Ray workers"
        )
    return "RANK" in os.environ


def placed(config: RunConfig, output: Path, alone: bool) -> RunConfig:
    """``config`` with the cluster settings of a stage: one worker if ``alone``, else a common store of checkpoints.

    That store is the same for ``run_stages``, which trains several stages, and for ``run_stage``, which resumes one.
    """
    changes = (
        {"workers": 1, "fewest_workers": None, "storage_path": None}
        if alone
        else {"storage_path": absolute_storage(config.cluster.storage_path) or str(output)}
    )
    return config.model_copy(update={"cluster": config.cluster.model_copy(update=changes)})


def train_parts(parts: Sequence[Part], alone: bool, heading: Callable[[Part], str], console: Console) -> None:
    """Train ``parts`` in order, those that were interrupted from their latest checkpoint.

    A part that fails, or whose start failed, is marked as failed and the others go on.

    Args:
        parts: the parts to train; starts come before the parts that need them, or are trained already.
        alone: whether to train in this process; else on Ray workers, which start once for all new parts.
        heading: makes the line that announces a part.
    """
    begun_before = [part for part in parts if _resumable(part, console)]
    new = [part for part in parts if part not in begun_before]
    if alone:
        for part in parts:
            _train_one(part, part in begun_before, heading, console)
        return
    for part in begun_before:
        _train_one(part, True, heading, console)
    _train_together(new, heading, console)


def _train_one(part: Part, resume: bool, heading: Callable[[Part], str], console: Console) -> None:
    if _without_start(part):
        return
    say(console, heading(part) + (", from its latest checkpoint" if resume else ""))
    begin(part)
    try:
        run_stage(part.kind, part.config, console, resume)
    except (UserError, RuntimeError) as error:  # concerns this part alone: it diverged, or memory ran out
        record_failure(part, error, console)


def _train_together(parts: list[Part], heading: Callable[[Part], str], console: Console) -> None:
    """Train on one set of workers; after a failure the others start again without the part that failed."""
    while parts := [part for part in parts if not _without_start(part, among=parts)]:
        for part in parts:
            begin(part)
        try:
            run_stages([(heading(part), part.kind, part.config) for part in parts], console)
            return
        except UserError as error:
            parts = [part for part in parts if not trained(part)]
            if parts and begun(parts[0]):
                record_failure(parts[0], error, console)
                parts = parts[1:]
            else:  # the first part was refused before training began: one at a time each part gets its own error
                for part in parts:
                    _clear(part)
                    _train_one(part, False, heading, console)
                return
        for part in parts:
            _clear(part)  # ``run_stages`` made its folder, but its training never began


def record_failure(part: Part, error: Exception, console: Console) -> None:
    """Mark ``part`` as failed and print the reason in a line."""
    text = redact(" ".join(str(error).split())) or type(error).__name__
    expected = isinstance(error, UserError)
    stamp_failed(part, text, "" if expected else "".join(traceback.format_exception(error)))
    console.print(f"{part.title} failed: {text}", style="bold red", markup=False, highlight=False, soft_wrap=True)


def _without_start(part: Part, among: Sequence[Part] = ()) -> bool:
    """Whether the part's SFT start neither exists nor is among the parts; the part is then marked as failed."""
    if part.from_before_training:
        return False
    folder = Path(part.config.model.path)
    if folder.is_dir() or any(other.model == folder for other in among):
        return False
    stamp_failed(part, f"its SFT start {part.start} failed")
    return True


def _resumable(part: Part, console: Console) -> bool:
    """Whether an interrupted run can be resumed; if not, as when its checkpoints moved, its folder is removed."""
    if begun(part) and not _refused(part):
        step = _lost_checkpoint(part)
        if not step:
            return True
        text = f"note: {part.title} starts anew: its log tells of a checkpoint of step {step}, and none of it is left"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    _clear(part)
    return False


def _lost_checkpoint(part: Part) -> int:
    """The step of the latest checkpoint that the log tells of, where no checkpoint of the run is left; else 0."""
    step, storage = last_checkpoint(part.run), part.config.cluster.storage_path or str(part.run)
    if not step or "://" in storage:  # what an object store holds, the workers see when they resume
        return 0
    try:
        known = Environment.read(part.run)
    except UserError:  # damaged: what run it was may be read from its checkpoints when it is resumed
        return 0
    run = f"{part.run.name}-{known.run_id}"
    names = [path.name for path in (part.run / CHECKPOINTS).glob("step-*")]  # of one process
    for above in ("*", "*/*"):  # of Ray, in the folder of its own run
        names += [path.name for path in Path(storage).glob(f"{above}/{run}-step-*")]
    return 0 if any(step_of(name, run) is not None for name in names) else step


def _clear(part: Part) -> None:
    shutil.rmtree(part.run, ignore_errors=True)


def _refused(part: Part) -> bool:
    """Whether settings differ that a resumed run must have again; a run takes its template from its start."""
    try:
        saved = load_config([part.run / CONFIG_FILE])
    except UserError:  # cut off while it was written, or of another version of the schema
        return True
    changed = changed_keys(saved, part.config)
    refused = [key for key in changed if not is_free(key, part.kind) and not key.startswith("template.")]
    edited = any(key.startswith(f"{DEEPSPEED_CONTENT}.") for key in changed_settings(part))
    return bool(refused) or edited or "cluster.storage_path" in changed
