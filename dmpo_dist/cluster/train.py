"""Ray: starting or joining a cluster, and a stage's ranks as a Ray Train TorchTrainer."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dmpo_dist.cluster.address import explain_refusal, require_answer
from dmpo_dist.cluster.privacy import only_owner, protect_token
from dmpo_dist.cluster.record_queue import forwarded, start_record_queue
from dmpo_dist.cluster.resources import WITHOUT_GPUS, ClusterWatch, shortage
from dmpo_dist.cluster.runtime import RayRuntime, remove_damaged_list, run_name
from dmpo_dist.config import ClusterConfig
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.memory import ONE_ARENA
from dmpo_dist.training.job import Job
from dmpo_dist.training.runtime import Runtime

ON_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Set to 0 before Ray is imported, it makes a node's address 127.0.0.1, and all its servers listen there alone."""
Body = Callable[[Job, Runtime], None]


@contextmanager
def ray_session(cluster: ClusterConfig) -> Iterator[None]:
    """A Ray cluster for the stages within: the one already joined, the one at the address, or a local one.

    Raises:
        UserError: the address cannot be reached, or torchrun started this process: its Ray workers would inherit that
            RANK and wait for each other in vain.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError("this command starts its workers by Ray (cluster.workers of them): start it without torchrun")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    # Ray prints pages for a lost node; they say nothing that we have not logged.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "Raylet is terminated")
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    if not address:
        os.environ.setdefault(ON_LOOPBACK, "0")
    import ray

    if ray.is_initialized():
        yield
        return
    keep_package_first(address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
            require_answer(address)
            ray.init(address=address, **options)
        else:
            needed = int(cluster.workers * cluster.cpus_per_worker + 0.999)
            protect_token()
            session = ray.init(address="local", num_cpus=max(needed, os.cpu_count() or 1), **options)
            protect_token()  # the first local Ray of a user has just written it
            only_owner(Path(session.address_info["session_dir"]))
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(explain_refusal(str(address), error)) from None
    except UserError:
        raise
    except Exception as error:  # Ray raises a bare Exception where its processes do not come up in time
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(
            f"Ray did not start here ({first}); is the machine busy or short of memory? Try again, or start Ray "
            "yourself (ray start --head) and set cluster.address=auto"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def keep_package_first(address: str | None) -> None:
    """Let a local Ray's workers find this package where the working directory holds a clone as a folder of its name.

    They look for modules in the working directory first, for the sake of ``objective.import_path``. Python takes such a
    folder for the package, unless it finds the real one on the same path, as it does not where ``pip install -e`` made
    a finder.

    Raises:
        UserError: so would workers on the cluster at ``address``, which have an environment of their own.
    """
    name = __name__.partition(".")[0]
    if not Path(name).is_dir() or Path(name, "__init__.py").exists():
        return
    if address:
        raise UserError(
            f"the working directory {Path.cwd()} holds a folder {name}, which workers on {address} would take for the "
            "package; start the command in another folder"
        )
    root = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))


def train_with_ray(jobs: Sequence[Job], sink: Callable[[int, dict[str, Any]], None], body: Body | None = None) -> None:
    """Train ``jobs`` one after another on the same ``cluster.workers`` Ray workers; call within ``ray_session``.

    A worker that dies is replaced up to ``cluster.max_failures`` times, and training goes on from the latest
    checkpoint of the job it was at; with ``cluster.fewest_workers`` also with fewer workers, and with more again later.
    ``sink`` receives a job's index and rank 0's records of it, in order.

    Args:
        jobs: at least one; a later one may start from the model of an earlier one. The first one's configuration says
            how many workers there are. Unless ``cluster.storage_path`` says otherwise, checkpoints go to the folder
            that holds all outputs, there in the folder ``run_name``.
        sink: called from a thread.
        body: what each rank does with a job instead of ``training.worker.run``.

    Raises:
        UserError: raised by a worker, or the cluster lacks the resources, or workers kept failing.
    """
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from dmpo_dist.cluster.network import NodeNetworkConfig
    from dmpo_dist.training.worker import run

    cluster = jobs[0].config.cluster
    storage = str(cluster.storage_path or os.path.commonpath([job.output for job in jobs]))
    gpus = gpus_per_worker_of(cluster)
    require_resources(cluster, gpus)
    name = run_name(jobs)
    remove_damaged_list(Path(storage, name))
    queue = start_record_queue()
    number = cluster.workers if cluster.fewest_workers is None else (cluster.fewest_workers, cluster.workers)
    resources = {"CPU": cluster.cpus_per_worker} | ({"GPU": gpus} if gpus else {})
    trainer = TorchTrainer(
        _run_jobs,
        train_loop_config={"jobs": tuple(jobs), "queue": queue, "body": body or run},
        scaling_config=ScalingConfig(num_workers=number, use_gpu=bool(gpus), resources_per_worker=resources),
        torch_config=NodeNetworkConfig(backend="nccl" if gpus else "gloo"),
        run_config=RunConfig(
            name=name,
            storage_path=storage,
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=jobs[0].stage.keep_checkpoints),
            worker_runtime_env=None if gpus else {"env_vars": ONE_ARENA | WITHOUT_GPUS},
        ),
    )
    failure: BaseException | None = None
    with forwarded(queue, sink, ClusterWatch(cluster, gpus)) as problems:
        try:
            with _ctrl_c():
                trainer.fit()
        except ray.train.TrainingFailedError as error:
            failure = error
    if problems:
        raise UserError(problems[0])
    if failure is not None:
        raise UserError(_explain(failure, cluster)) from failure


@contextmanager
def _ctrl_c() -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt within, as elsewhere; Ray's own handler exits, and would stay afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)


def _run_jobs(payload: dict[str, Any]) -> None:
    """A rank's process. A user's mistake is told once; the workers Ray then restarts see that and leave."""
    import ray
    import torch

    jobs, queue, body = payload["jobs"], payload["queue"], payload["body"]
    if ray.get(queue.failed.remote()):
        return
    for index, job in enumerate(jobs):
        if job is not jobs[-1] and (job.output / "model").exists():
            continue  # done before a worker failed at a later job
        torch.set_num_threads(max(1, int(job.config.cluster.cpus_per_worker)))
        try:
            _require_shared(job.output)
            body(job, RayRuntime(index, job, queue))
        except (UserError, OSError) as error:
            ray.get(queue.put.remote(index, {"kind": "error", "text": _user_text(error)}))
            raise


def _require_shared(output: Path) -> None:
    if not output.exists():
        raise UserError(
            f"output_dir {output}: the driver has made it, and this node does not see it; choose an output_dir on "
            "storage that all nodes share (dmpo doctor --cluster checks each)"
        )


def _user_text(error: Exception) -> str:
    """The message, with the host where there are several: what one of them lacks, the others may have."""
    import ray.train

    context = ray.train.get_context()
    host = "" if context.get_local_world_size() == context.get_world_size() else f"on {socket.gethostname()}: "
    if isinstance(error, OSError) and not isinstance(error, UserError):
        return f"{host}a worker could not read or write a file: {error}; is the disk full or the folder not writable?"
    return f"{host}{error}"


def gpus_per_worker_of(cluster: ClusterConfig) -> float:
    """GPUs a worker gets: as configured, else one where the joined Ray cluster has any."""
    import ray

    if cluster.gpus_per_worker is not None:
        return cluster.gpus_per_worker
    return 1.0 if ray.cluster_resources().get("GPU") else 0.0


def require_resources(cluster: ClusterConfig, gpus: float) -> None:
    """Raise UserError where the joined Ray cluster is too small for ``cluster.workers`` with ``gpus`` each."""
    import ray

    lacking = shortage(cluster, gpus, ray.cluster_resources())
    if lacking is not None:
        raise UserError(f"{lacking}; lower one of them")


def _explain(error: BaseException, cluster: ClusterConfig) -> str:
    """The user's mistake at the root where there is one, else the innermost cause in a line, with what to do next."""
    failures = getattr(error, "worker_failures", None) or {}
    cause = next(iter(failures.values()), None) or getattr(error, "controller_failure", None) or error
    mistake = getattr(cause, "cause", None) or cause  # Ray keeps what a task raised in .cause
    if isinstance(mistake, UserError):
        return str(mistake)
    lines = [line for line in str(cause).strip().splitlines() if line.strip()] or [repr(cause)]
    return (
        f"training stopped after worker failures (cluster.max_failures={cluster.max_failures}): {lines[-1].strip()}; "
        "continue from the latest checkpoint with --resume"
    )
