"""What the training loop asks of whoever started its processes: Ray Train, torchrun, or nobody."""

import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from dmpo_dist.errors import UserError

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

    def restore(self) -> AbstractContextManager[Path | None]:
        """The folder of the latest complete checkpoint, None where there is none."""
        ...


class ProcessRuntime:
    """Ranks started by torchrun or srun (or a single process), with checkpoints in a shared folder.

    Args:
        folder: where checkpoints go.
        keep: how many complete checkpoints stay.
        sink: receives the records of rank 0.
    """

    def __init__(self, folder: Path, keep: int, sink: Callable[[dict[str, Any]], None]) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._folder, self._keep, self._sink = folder, keep, sink

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
        write(part)
        dist.barrier()
        if self.rank == 0:
            shutil.rmtree(whole, ignore_errors=True)
            part.rename(whole)
            for old in self._complete()[: -self._keep]:
                shutil.rmtree(old)
        dist.barrier()

    @contextmanager
    def restore(self) -> Iterator[Path | None]:
        complete = self._complete()
        latest = from_rank_zero(complete[-1] if complete else None)
        yield None if latest is None else await_folder(latest)

    def _complete(self) -> list[Path]:
        return sorted(p for p in self._folder.glob("step-*") if p.suffix != ".part")


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
