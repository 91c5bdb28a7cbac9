"""What the training loop asks of whoever started its processes: Ray Train, torchrun, or nobody."""

import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from dmpo_dist.artifacts.files import naming, sync_folder
from dmpo_dist.errors import UserError

CHECKPOINT = re.compile(r"(?:(?P<run>.+)-)?step-(?P<step>\d+)(?:-[0-9a-f]{6})?")
"""Name of a checkpoint: under torchrun ``step-00000010``; under Ray, whose storage runs may share, with the run before
it and a random end."""
Problem = Callable[[Path, int], str]
"""(folder of a checkpoint, its step by name) -> why it cannot be used, "" where it can; the same on every rank."""
COMPLETE_FILE = "complete"
"""Under Ray: in a checkpoint's folder once every rank's part is there, and the log up to it with the driver."""
SEEN_SECONDS = 60.0
"""How long NFS may hide a new folder: its clients remember what they did not find for as long."""

T = TypeVar("T")


class Runtime(Protocol):
    """A rank's connection to the outside."""

    rank: int
    world_size: int

    def log(self, record: dict[str, Any]) -> None:
        """Hand a record to the run's display and metric files; of what all ranks log, rank 0's counts."""
        ...

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Keep a checkpoint that every rank writes its part of; all ranks call it."""
        ...

    def restore(self, problem: Problem) -> AbstractContextManager[Path | None]:
        """The folder of the latest complete checkpoint in which ``problem`` finds nothing, None where there is none.

        Raises:
            UserError: there are checkpoints, and none of them can be used.
        """
        ...


class ProcessRuntime:
    """Ranks started by torchrun or srun (or a single process), with checkpoints in a shared folder.

    Args:
        folder: where checkpoints go.
        keep: how many complete checkpoints stay.
        sink: receives the records of rank 0.
        run: the name that Ray's checkpoints of this run have before their step, see ``CHECKPOINT``.
    """

    def __init__(self, folder: Path, keep: int, sink: Callable[[dict[str, Any]], None], run: str = "") -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._folder, self._keep, self._sink, self._run = folder, keep, sink, run
        self._refused: set[str] = set()

    def log(self, record: dict[str, Any]) -> None:
        if self.rank == 0:
            self._sink(record)

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Write to ``step-N.part`` and rename when every rank is done, so that a checkpoint is whole or absent."""
        part, whole = self._folder / f"step-{step:08d}.part", self._folder / f"step-{step:08d}"
        if self.rank == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        dist.barrier()
        with naming(part):
            write(part)
        dist.barrier()
        if self.rank == 0:
            sync_folder(part)
            shutil.rmtree(whole, ignore_errors=True)
            part.rename(whole)
            sync_folder(self._folder, below=False)
            self._refused.discard(whole.name)
            self._remove_old()
        dist.barrier()

    @contextmanager
    def restore(self, problem: Problem) -> Iterator[Path | None]:
        folders = from_rank_zero([self._folder / name for name in self._names()])
        for folder in map(await_folder, folders):
            why = problem(folder, step_of(folder.name, self._run) or 0)
            if not why:
                if self.rank == 0:
                    self._remove_old()  # a run killed while it did so has left some
                yield folder
                return
            self._refused.add(folder.name)
            self.log({"kind": "note", "text": passed_over(folder, why)})
        require_none(folders, self._folder)
        yield None

    def _remove_old(self) -> None:
        """Keep the latest checkpoints that can be used, as many as asked for."""
        good = [name for name in self._names() if name not in self._refused]
        for old in good[self._keep :]:
            shutil.rmtree(self._folder / old)

    def _names(self) -> list[str]:
        """Names of this run's checkpoints, the latest first."""
        found = [path.name for path in self._folder.glob("*") if path.is_dir() and self._is_whole(path)]
        return newest_first(found, self._run)

    def _is_whole(self, folder: Path) -> bool:
        return folder.name.startswith("step-") or (folder / COMPLETE_FILE).exists()


def run_of(name: str) -> str | None:
    """The run before the step in ``name`` of a checkpoint; None where it names none."""
    found = CHECKPOINT.fullmatch(name)
    return found["run"] if found else None


def step_of(name: str, run: str) -> int | None:
    """The step of the checkpoint ``name``; None for what is no checkpoint, or one of another run than ``run``.

    The id behind a run's name tells, as its folder may have been moved to another name since.
    """
    found = CHECKPOINT.fullmatch(name)
    if found is None:
        return None
    of, own = found["run"], run.rpartition("-")[2]
    return int(found["step"]) if of in (None, run) or (own and of.rpartition("-")[2] == own) else None


def newest_first(names: Sequence[str], run: str) -> list[str]:
    """Those of ``names`` that are checkpoints of ``run``, the latest step first."""
    steps = {name: step_of(name, run) for name in names}
    return sorted((n for n, step in steps.items() if step is not None), key=lambda n: (steps[n], n), reverse=True)


def passed_over(folder: Path | str, why: str) -> str:
    """A line that says why a checkpoint is not gone on from."""
    return f"{folder}: {why}; the checkpoint before it is used"


def require_none(found: Sequence[object], where: Path | str) -> None:
    """Raise UserError where checkpoints were ``found``, all of which were passed over."""
    if found:
        raise UserError(
            f"{where}: none of the {len(found)} checkpoints there can be used (the lines above say why); restore them "
            "from a copy, or start the run anew with another output_dir"
        )


def from_rank_zero(value: T) -> T:
    """Rank 0's ``value`` on every rank: what each finds in shared storage may differ, as NFS shows new files late."""
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def await_folder(folder: Path) -> Path:
    """``folder``, which another host has made, once this one sees it.

    Raises:
        UserError: it does not, for ``SEEN_SECONDS``.
    """
    deadline = time.monotonic() + SEEN_SECONDS
    while not folder.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"{folder}: rank 0 goes on from this checkpoint, and {socket.gethostname()} does not see it; choose an "
                "output_dir or cluster.storage_path on storage that all nodes share"
            )
        time.sleep(0.2)
    return folder
