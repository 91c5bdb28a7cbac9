"""What may be done with the folder of an earlier run: start anew where it failed early, remove it where that is asked."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dmpo_dist.artifacts.files import write_whole
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
            write_whole(output / FAILED_FILE, f"{type(error).__name__}: {error}\n")
        raise


def failed_early(output: Path) -> bool:
    """Whether the run in ``output`` failed and left no checkpoint and no model."""
    return (output / FAILED_FILE).is_file() and not _has_weights(output)


def clear_run_folder(output: Path, needed: Sequence[Path | None]) -> None:
    """Remove the run in ``output``.

    Raises:
        UserError: it is no run's folder, or holds something of ``needed``, which the next run reads.
    """
    if not (output / CONFIG_FILE).is_file():
        raise UserError(
            f"output_dir {output} is no folder of a run (it has no {CONFIG_FILE}) and is kept; choose another"
        )
    inside = next((path for path in needed if path and output.resolve() in path.resolve().parents), None)
    if inside is not None:
        raise UserError(
            f"output_dir {output} holds {inside}, which the run reads, and is kept; choose another output_dir"
        )
    shutil.rmtree(output)


def _has_weights(output: Path) -> bool:
    """Whether there is a model, or a checkpoint to go on from."""
    checkpoints = output / "checkpoints"
    return (output / "model").exists() or (output / "best").exists() or (
        checkpoints.is_dir() and any(entry.is_dir() for entry in checkpoints.iterdir())
    )  # fmt: skip
