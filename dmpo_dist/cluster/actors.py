"""Tasks worked off by a pool of Ray actors, each of which keeps what is dear to make."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from dmpo_dist.cluster.resources import WITHOUT_GPUS
from dmpo_dist.cluster.train import gpus_per_worker_of, require_resources
from dmpo_dist.config import ClusterConfig
from dmpo_dist.errors import UserError

MakeWorker = Callable[..., Callable[[Any], Any]]


def map_over_actors(
    cluster: ClusterConfig, make_worker: MakeWorker, arguments: tuple[Any, ...], tasks: Sequence[Any]
) -> Iterator[Any]:
    """``make_worker(*arguments)(task)`` for each of ``tasks``, in the order they finish; call within ``ray_session``.

    Each of ``cluster.workers`` actors makes its worker once, with its first task, so that a user's mistake comes back
    as an error of that task. A lost actor is started again up to ``cluster.max_failures`` times and repeats its task.

    Args:
        make_worker: a function or class at a module's top, which the actors import.
        arguments: put into Ray's object store once.
        tasks: at least one.

    Raises:
        UserError: raised by a worker, or the cluster lacks the resources, or a worker kept dying.
    """
    import ray
    from ray.util import ActorPool

    gpus = gpus_per_worker_of(cluster)
    require_resources(cluster, gpus)
    actor = ray.remote(
        num_cpus=cluster.cpus_per_worker, num_gpus=gpus, max_restarts=cluster.max_failures, max_task_retries=-1
    )(PooledWorker)
    shared = ray.put((make_worker, arguments))
    threads = max(1, int(cluster.cpus_per_worker))
    pool = ActorPool([actor.remote(threads, gpus > 0) for _ in range(min(cluster.workers, len(tasks)))])
    try:
        yield from pool.map_unordered(lambda worker, task: worker.run.remote(shared, task), tasks)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    except ray.exceptions.RayActorError:
        raise UserError(
            f"a worker died more than cluster.max_failures={cluster.max_failures} times, perhaps for lack of memory; "
            "run the same command again to go on with the parts that are missing"
        ) from None


class PooledWorker:
    """An actor's process: makes its worker with the first task and keeps it."""

    def __init__(self, threads: int, gpus: bool) -> None:
        if not gpus:
            os.environ |= WITHOUT_GPUS  # before anything in this process has looked for them
        torch.set_num_threads(threads)
        self._worker: Callable[[Any], Any] | None = None

    def run(self, shared: tuple[MakeWorker, tuple[Any, ...]], task: Any) -> Any:
        if self._worker is None:
            make_worker, arguments = shared
            self._worker = make_worker(*arguments)
        return self._worker(task)
