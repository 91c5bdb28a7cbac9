"""A rank under Ray Train: its log lines, and checkpoints that survive whatever ends the run."""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch.distributed as dist

from dmpo_dist.training.job import Job
from dmpo_dist.training.runtime import await_folder, from_rank_zero

RUN_NAME = "checkpoints"
"""Ray Train's name of the run, which is the folder of its checkpoints below the storage path."""
COMPLETE_FILE = "complete"
"""Written into a checkpoint's folder once every rank's part is there, and the log up to it with the driver."""
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
        self._prefix = f"{job.output.name}-{job.run_id}-step-"
        storage = context.get_storage()
        self._files, self._folder = storage.storage_filesystem, storage.experiment_fs_path

    def log(self, record: dict[str, Any]) -> None:
        if self.rank == 0:
            self._queue.put.remote(self._index, record)

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Every rank writes its part to a folder of its own; Ray joins them into one checkpoint."""
        import ray.train

        # never twice the same name: Ray deletes old checkpoints by name
        name = f"{self._prefix}{step:08d}-{uuid4().hex[:6]}"
        with tempfile.TemporaryDirectory(prefix="dmpo-checkpoint-", ignore_cleanup_errors=True) as folder:
            write(Path(folder))
            part = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"step": step}, checkpoint=part, checkpoint_dir_name=name)  # of the names, rank 0's counts
        dist.barrier()
        if self.rank == 0:
            self._wait_for_log()
            self._files.open_output_stream(f"{self._folder}/{name}/{COMPLETE_FILE}").close()

    @contextmanager
    def restore(self) -> Iterator[Path | None]:
        import ray.train

        known = ray.train.get_checkpoint()
        name = "" if known is None else Path(known.path).name
        ours = [name] if name.startswith(self._prefix) else []
        # where one is kept, Ray deletes it before the next is marked; that one has all parts, perhaps not all log lines
        latest = from_rank_zero(max(self._complete() or ours, key=self._step, default=None))
        if latest is None:
            yield None
            return
        checkpoint = ray.train.Checkpoint(f"{self._folder}/{latest}", filesystem=self._files)
        if not ours or self._step(name) < self._step(latest):
            keep = ray.train.CheckpointUploadMode.NO_UPLOAD  # for Ray to know it, and to delete it in its time
            ray.train.report({"step": self._step(latest)}, checkpoint=checkpoint, checkpoint_upload_mode=keep)
        with checkpoint.as_directory() as folder:
            yield await_folder(Path(folder))

    def _wait_for_log(self) -> None:
        """Until the driver has written all records so far: a resumed run goes on after them and would leave a gap."""
        import ray

        deadline = time.monotonic() + LOG_SECONDS
        while ray.get(self._queue.unwritten.remote()) and time.monotonic() < deadline:
            time.sleep(0.05)

    def _complete(self) -> list[str]:
        """Names of this run's checkpoints that are whole."""
        from pyarrow.fs import FileSelector, FileType

        found = self._files.get_file_info(FileSelector(self._folder, allow_not_found=True))
        names = [entry.base_name for entry in found if entry.base_name.startswith(self._prefix)]
        marks = self._files.get_file_info([f"{self._folder}/{name}/{COMPLETE_FILE}" for name in names])
        return [name for name, mark in zip(names, marks, strict=True) if mark.type == FileType.File]

    def _step(self, name: str) -> int:
        return int(name.removeprefix(self._prefix).partition("-")[0])


def remove_damaged_list(storage: str) -> None:
    """Remove Ray's list of checkpoints below ``storage`` where it cannot be read, so that Ray starts; none is needed.

    Ray (2.60) writes it in place: a driver killed in that moment leaves an empty or cut file on a disk. Stores of
    objects, as ``s3://...``, replace it whole.
    """
    file = Path(storage, RUN_NAME, "checkpoint_manager_snapshot.json")
    if not file.is_file():
        return
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        file.unlink()
