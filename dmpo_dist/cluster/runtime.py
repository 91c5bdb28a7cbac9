"""A rank under Ray Train: its log lines, and checkpoints that survive whatever ends the run."""

import json
import os
import posixpath
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch.distributed as dist
from pyarrow.fs import FileSelector, FileType, LocalFileSystem

from dmpo_dist.artifacts.files import naming, sync_folder, write_whole
from dmpo_dist.artifacts.locks import only_one
from dmpo_dist.errors import UserError
from dmpo_dist.training.job import Job
from dmpo_dist.training.runtime import (
    COMPLETE_FILE,
    Problem,
    await_folder,
    from_rank_zero,
    newest_first,
    passed_over,
    require_none,
    run_of,
    step_of,
)

RUN_NAME = "checkpoints"
"""Ray Train's name of a run that has its storage to itself, which is the folder of its checkpoints there."""
PART_PREFIX = "dmpo-checkpoint-"
DEAD_SECONDS = 60.0
"""A rank's folder that is younger may not have been locked yet."""
REPORTED_SECONDS = 30.0
"""The longest wait for Ray to have taken note of reports."""
LOG_SECONDS = 10.0
"""The longest wait for the driver to write the log up to a checkpoint."""


class RayRuntime:
    """A rank under Ray Train, at one of its jobs; see ``training.runtime.Runtime``.

    Ray joins the ranks' parts of a checkpoint and deletes old ones. Which one to go on from is read from the folders
    themselves: Ray's own list lacks those it had not taken note of when the driver died, and those in folders of
    another Ray run, see ``run_name``.

    Args:
        index: the job's number among the jobs of these workers.
        job: what is trained; its run id tells its checkpoints from another run's in the same storage.
        queue: the ``RecordQueue`` that takes log records.
    """

    def __init__(self, index: int, job: Job, queue: Any) -> None:
        import ray.train

        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self._index, self._queue = index, queue
        self._run, self._keep = job.run, job.stage.keep_checkpoints
        storage = context.get_storage()
        self._files, self._folder = storage.storage_filesystem, storage.experiment_fs_path
        self._saved = 0

    def log(self, record: dict[str, Any]) -> None:
        if self.rank == 0:
            self._queue.put.remote(self._index, record)

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Every rank writes its part to a folder of its own; Ray joins them into one checkpoint."""
        import ray.train

        # never twice the same name: Ray deletes old checkpoints by name
        name = f"{self._run}-step-{step:08d}-{uuid4().hex[:6]}"
        with own_part() as folder:
            with naming(folder):
                write(folder)
            part = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"step": step}, checkpoint=part, checkpoint_dir_name=name)  # of the names, rank 0's counts
        dist.barrier()
        if self.rank == 0:
            self._wait_for_log()
            self._mark(name)
            self._saved += 1
            if self._saved == self._keep:  # enough new ones, and Ray deletes none that lie elsewhere
                self._delete(path for path in self._all() if posixpath.dirname(path) != self._folder)

    @contextmanager
    def restore(self, problem: Problem) -> Iterator[Path | None]:
        import ray.train

        remove_dead_parts()
        known = ray.train.get_checkpoint()
        ours = "" if known is None else known.path
        ours = ours if self._step(ours) is not None else ""
        # where one is kept, Ray deletes it before the next is marked; that one has all parts, perhaps not all log lines
        paths = from_rank_zero(self._complete() or [ours] * bool(ours))
        for path in paths:
            step = self._step(path) or 0
            checkpoint = ray.train.Checkpoint(path, filesystem=self._files)
            with checkpoint.as_directory() as folder:
                why = problem(await_folder(Path(folder)), step)
                if not why:
                    if self.rank == 0:
                        self._remove_others(paths)
                    if posixpath.dirname(path) == self._folder and (self._step(ours) or 0) < step:
                        keep = ray.train.CheckpointUploadMode.NO_UPLOAD  # for Ray to know it, and to delete it in time
                        ray.train.report({"step": step}, checkpoint=checkpoint, checkpoint_upload_mode=keep)
                    yield Path(folder)
                    return
            self.log({"kind": "note", "text": passed_over(path, why)})
        require_none(paths, self._folder)
        yield None

    def _wait_for_log(self) -> None:
        """Until the driver has written all records so far: a resumed run goes on after them and would leave a gap."""
        import ray

        deadline = time.monotonic() + LOG_SECONDS
        while ray.get(self._queue.unwritten.remote()) and time.monotonic() < deadline:
            time.sleep(0.05)

    def _step(self, path: str) -> int | None:
        return step_of(posixpath.basename(path), self._run)

    def _complete(self) -> list[str]:
        """Folders of this run's checkpoints that are whole, the latest first."""
        paths = self._all()
        marks = self._files.get_file_info([f"{path}/{COMPLETE_FILE}" for path in paths])
        return [
            path
            for path, mark in zip(paths, marks, strict=True)
            if mark.is_file or _of_torchrun(path)  # renamed when it was whole
        ]

    def _all(self) -> list[str]:
        """Folders of this run's checkpoints, the latest first: of this Ray run, and of others in the same storage.

        Another Ray run holds some where stages were trained together and this one goes on alone, and where a version
        that had one folder for all runs of a storage has begun it.
        """
        storage = posixpath.dirname(self._folder)
        folders = [path for path in self._below(storage) if is_run_name(posixpath.basename(path))]
        found = {}
        for folder in folders:
            own = folder == self._folder
            found |= {posixpath.basename(path): path for path in self._below(folder) if own or not _of_torchrun(path)}
        return [found[name] for name in newest_first([*found], self._run)]

    def _below(self, folder: str) -> list[str]:
        entries = self._files.get_file_info(FileSelector(folder, allow_not_found=True))
        return [entry.path for entry in entries if entry.type == FileType.Directory]

    def _remove_others(self, whole: Sequence[str]) -> None:
        """Remove this run's checkpoints that Ray does not know of: those cut off, and whole ones beyond ``keep``.

        Ray deletes what it knows in its time, and ends the run where that is gone already.
        """
        import ray.train

        committed = ray.train.CheckpointConsistencyMode.COMMITTED
        reported = ray.train.get_all_reported_checkpoints(committed, timeout_s=REPORTED_SECONDS)
        known = {found.checkpoint.path for found in reported}
        self._delete(path for path in self._all() if path not in known and path not in whole[: self._keep])

    def _delete(self, paths: Iterable[str]) -> None:
        """Remove checkpoints, but none in shared storage under another name of this run: is its folder a copy, then
        they are the original's too."""
        for path in paths:
            if posixpath.dirname(path) == self._folder or run_of(posixpath.basename(path)) in (None, self._run):
                self._files.delete_dir(path)

    def _mark(self, name: str) -> None:
        """Say that the checkpoint is whole, once its files are on the disk where that is one of this machine."""
        folder = Path(self._folder, name)
        if isinstance(self._files, LocalFileSystem):
            sync_folder(folder)
            write_whole(folder / COMPLETE_FILE, "")
        else:
            self._files.open_output_stream(f"{self._folder}/{name}/{COMPLETE_FILE}").close()


@contextmanager
def own_part() -> Iterator[Path]:
    """A temporary folder for this rank's part of a checkpoint, locked so that nobody takes it for a left-over."""
    with tempfile.TemporaryDirectory(prefix=PART_PREFIX, ignore_cleanup_errors=True) as folder, only_one(Path(folder)):
        part = Path(folder, "part")
        part.mkdir()
        yield part


def remove_dead_parts() -> None:
    """Remove the temporary folders of ranks of this user that were killed while they wrote a checkpoint."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PART_PREFIX}*"):
        with suppress(UserError, OSError):
            found = folder.stat()
            if found.st_uid == os.getuid() and time.time() - found.st_mtime > DEAD_SECONDS:
                with only_one(folder):
                    shutil.rmtree(folder, ignore_errors=True)


def run_name(jobs: Sequence[Job]) -> str:
    """Ray Train's name of the run that trains ``jobs``, which is the folder of its checkpoints in the storage.

    Ray deletes old checkpoints by a list of its own for each name. So runs that share ``cluster.storage_path`` have
    names of their own: else each would delete those of the others.
    """
    return RUN_NAME if jobs[0].config.cluster.storage_path is None else f"{RUN_NAME}-{jobs[0].run}"


def is_run_name(name: str) -> bool:
    """Whether ``run_name`` makes such names, or an earlier version did."""
    return name == RUN_NAME or name.startswith(f"{RUN_NAME}-")


def _of_torchrun(path: str) -> bool:
    return posixpath.basename(path).startswith("step-")


def remove_damaged_list(folder: Path) -> None:
    """Remove Ray's list of checkpoints in ``folder`` where Ray could not use it; Ray needs none to start.

    Ray (2.60) writes it in place: a driver killed in that moment leaves an empty or cut file on a disk. Stores of
    objects, as ``s3://...``, replace it whole. And Ray ends a run when it comes to delete a listed folder that is gone.
    """
    file = folder / "checkpoint_manager_snapshot.json"
    if not file.is_file():
        return
    try:
        listed = json.loads(file.read_text(encoding="utf-8")).get("checkpoint_results", [])
        gone = [entry for entry in listed if not (folder / entry["checkpoint_dir_name"]).is_dir()]
    except (ValueError, AttributeError, KeyError, TypeError):
        file.unlink()
        return
    if gone:
        file.unlink()
