"""The folder of an earlier run: one that failed early does not block it, and another is removed when asked."""

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from dmpo_dist.artifacts.files import write_whole
from dmpo_dist.artifacts.locks import LOCK_FILE
from dmpo_dist.artifacts.log import METRICS_FILE
from dmpo_dist.errors import UserError

FAILED_FILE = "failed.txt"
"""Says why a run ended before it had anything to go on from."""
CONFIG_FILE = "config.yaml"


@contextmanager
def failure_noted(output: Path) -> Iterator[None]:
    """Note the failure of a run that leaves no checkpoint and no model, so that it does not block its folder."""
    try:
        yield
    except BaseException as error:
        if output.is_dir() and not _has_weights(output):
            with suppress(OSError):  # what went wrong may be the disk
                write_whole(output / FAILED_FILE, f"{type(error).__name__}: {error}\n")
        raise


def config_file(output: Path) -> Path:
    """The file of ``output`` that holds the configuration of its run.

    Raises:
        UserError: there is none, so that there is nothing to go on with.
    """
    file = output / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"--resume: {output} holds no run to go on with (no {CONFIG_FILE}); start it without --resume")
    return file


def failed_early(output: Path) -> bool:
    """Whether the run in ``output`` failed and left no checkpoint and no model."""
    return (output / FAILED_FILE).is_file() and not _has_weights(output)


def clear_run_folder(output: Path, needed: Sequence[Path | None]) -> None:
    """Remove the run in ``output``, but nothing that ``dmpo submit`` wrote there.

    Raises:
        UserError: it is no run's folder, or holds something of ``needed``, which the next run reads.
    """
    advice = "it is kept; choose another output_dir"
    if not (output / CONFIG_FILE).is_file():
        raise UserError(f"output_dir {output} is not of a run (it has no {CONFIG_FILE}): {advice}")
    inside = next((path for path in needed if path and output.resolve() in path.resolve().parents), None)
    if inside is not None:
        raise UserError(f"output_dir {output} holds {inside}, which this run reads: {advice}")
    for entry in output.iterdir():
        if is_submission(entry) or entry.name == LOCK_FILE:
            continue
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def is_submission(entry: Path) -> bool:
    """Whether ``dmpo submit`` wrote ``entry`` of a run's folder, from which the job may be running."""
    return re.fullmatch(r"submit(-\d+)?", entry.name) is not None


def _has_weights(output: Path) -> bool:
    """Whether there is a model, or the log tells of a checkpoint, wherever that is kept; of a run of several stages, of
    any of them."""
    log = output / METRICS_FILE
    told = re.search(r'"kind": ?"checkpoint"', log.read_text(encoding="utf-8")) if log.is_file() else None
    if told is not None or any((output / name).exists() for name in ("model", "best")):
        return True
    return any(_has_weights(file.parent) for file in output.glob(f"*/{CONFIG_FILE}"))
