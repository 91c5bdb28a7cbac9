"""A rank under Ray Train: its log lines, and checkpoints that survive whatever ends the run."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch.distributed as dist
from pyarrow.fs import FileSelector, LocalFileSystem

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
    step_of,
)

RUN_NAME = "checkpoints"
"""Ray Train's name of the run, which is the folder of its checkpoints below the storage path."""
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
    themselves: Ray's own list lacks those it had not taken note of when the driver died.

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

    @contextmanager
    def restore(self, problem: Problem) -> Iterator[Path | None]:
        import ray.train

        remove_dead_parts()
        known = ray.train.get_checkpoint()
        ours = "" if known is None else Path(known.path).name
        ours = ours if step_of(ours, self._run) is not None else ""
        # where one is kept, Ray deletes it before the next is marked; that one has all parts, perhaps not all log lines
        names = from_rank_zero(self._complete() or [ours] * bool(ours))
        for name in names:
            step = step_of(name, self._run) or 0
            checkpoint = ray.train.Checkpoint(f"{self._folder}/{name}", filesystem=self._files)
            with checkpoint.as_directory() as folder:
                why = problem(await_folder(Path(folder)), step)
                if not why:
                    if self.rank == 0:
                        self._remove_others(names)
                    if (step_of(ours, self._run) or 0) < step:
                        keep = ray.train.CheckpointUploadMode.NO_UPLOAD  # for Ray to know it, and to delete it in time
                        ray.train.report({"step": step}, checkpoint=checkpoint, checkpoint_upload_mode=keep)
                    yield Path(folder)
                    return
            self.log({"kind": "note", "text": passed_over(f"{self._folder}/{name}", why)})
        require_none(names, self._folder)
        yield None

    def _wait_for_log(self) -> None:
        """Until the driver has written all records so far: a resumed run goes on after them and would leave a gap."""
        import ray

        deadline = time.monotonic() + LOG_SECONDS
        while ray.get(self._queue.unwritten.remote()) and time.monotonic() < deadline:
            time.sleep(0.05)

    def _complete(self) -> list[str]:
        """Names of this run's checkpoints that are whole, the latest first."""
        names = newest_first(self._all(), self._run)
        marks = self._files.get_file_info([f"{self._folder}/{name}/{COMPLETE_FILE}" for name in names])
        return [
            name
            for name, mark in zip(names, marks, strict=True)
            if mark.is_file or name.startswith("step-")  # of torchrun: renamed when it was whole
        ]

    def _all(self) -> list[str]:
        found = self._files.get_file_info(FileSelector(self._folder, allow_not_found=True))
        return [entry.base_name for entry in found]

    def _remove_others(self, whole: list[str]) -> None:
        """Remove this run's checkpoints that Ray does not know of: those cut off, and whole ones beyond ``keep``.

        Ray deletes what it knows in its time, and ends the run where that is gone already.
        """
        import ray.train

        committed = ray.train.CheckpointConsistencyMode.COMMITTED
        reported = ray.train.get_all_reported_checkpoints(committed, timeout_s=REPORTED_SECONDS)
        known = {Path(found.checkpoint.path).name for found in reported}
        for name in newest_first(self._all(), self._run):
            if name not in known and name not in whole[: self._keep]:
                self._files.delete_dir(f"{self._folder}/{name}")

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


def remove_damaged_list(storage: str) -> None:
    """Remove Ray's list of checkpoints below ``storage`` where Ray could not use it; Ray needs none to start.

    Ray (2.60) writes it in place: a driver killed in that moment leaves an empty or cut file on a disk. Stores of
    objects, as ``s3://...``, replace it whole. And Ray ends a run when it comes to delete a listed folder that is gone.
    """
    file = Path(storage, RUN_NAME, "checkpoint_manager_snapshot.json")
    if not file.is_file():
        return
    try:
        listed = json.loads(file.read_text(encoding="utf-8")).get("checkpoint_results", [])
        gone = [entry for entry in listed if not (file.parent / entry["checkpoint_dir_name"]).is_dir()]
    except (ValueError, AttributeError, KeyError, TypeError):
        file.unlink()
        return
    if gone:
        file.unlink()
