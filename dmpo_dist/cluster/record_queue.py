"""Records on their way from the workers to the driver: an actor that queues them, and a thread that passes them on."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dmpo_dist.cluster.resources import ClusterWatch

POLL_SECONDS = 0.3


class RecordQueue:
    """An actor between the workers and the driver; each record comes with the index of its job."""

    def __init__(self) -> None:
        self._records: list[tuple[int, dict[str, Any]]] = []
        self._taken = 0
        self._failed = False

    def put(self, job: int, record: dict[str, Any]) -> None:
        self._records.append((job, record))
        self._failed = self._failed or record["kind"] == "error"

    def take(self) -> list[tuple[int, dict[str, Any]]]:
        """All that is queued."""
        records, self._records = self._records, []
        self._taken += len(records)
        return records

    def written(self, count: int) -> None:
        """Of the records taken, so many more are in the run's files."""
        self._taken -= count

    def unwritten(self) -> int:
        """Records that are in no file yet."""
        return len(self._records) + self._taken

    def failed(self) -> bool:
        """Whether a worker has told of an error."""
        return self._failed


def start_record_queue() -> Any:
    """A ``RecordQueue`` on the driver's node: on another it would die with that node, and the run with it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    on_driver = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=on_driver)(RecordQueue).remote()


@contextmanager
def forwarded(queue: Any, sink: Callable[[int, dict[str, Any]], None], watch: ClusterWatch) -> Iterator[list[str]]:
    """Pass queued records and the watch's notes to ``sink`` while inside; yields the workers' error messages."""
    import ray

    problems: list[str] = []
    done = threading.Event()
    current = 0

    def drain() -> None:
        nonlocal current
        records = ray.get(queue.take.remote())
        for job, record in records:
            current = job
            problems.append(record["text"]) if record["kind"] == "error" else sink(job, record)
        if records:
            queue.written.remote(len(records))

    def poll() -> None:
        while not done.wait(POLL_SECONDS):
            try:
                drain()
            except ray.exceptions.RayActorError:  # the driver is being ended, or its own drain below tells of it
                return
            note = watch.news(time.monotonic())
            if note is not None:
                sink(current, {"kind": "note", "text": note})

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield problems
    finally:
        done.set()
        thread.join()
        drain()
