"""What ``dmpo doctor --cluster`` runs on each node: a report, its clock, and moving data to the other nodes."""

import hashlib
import os
import platform
import shutil
import socket
import statistics
import subprocess
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import dmpo_dist
from dmpo_dist.records.environment import describe_environment
from dmpo_dist.training.network import bind_gloo

GIB = 2**30
COMPARED = ("torch", "ray", "deepspeed", "transformers")
ALL_REDUCE_REPEATS = 5
GROUP_SECONDS = 60


@dataclass(frozen=True)
class RunPaths:
    """What a run would use on every node.

    Args:
        output: output_dir, absolute.
        marker: a file the driver has just written there; a node that does not see it does not share the folder.
        data: data.path, absolute; None where it is not set.
    """

    output: Path
    marker: Path | None
    data: Path | None


@dataclass(frozen=True)
class NodeReport:
    """What was found on one node; sizes in GiB."""

    versions: dict[str, str | None]
    cpus: int
    gpus: int
    memory: float
    shared_memory: float | None
    """Free in /dev/shm; None where there is none."""
    disk: float
    """Free at output_dir, or where it would be made."""
    writable: bool
    sees_marker: bool
    data: str | None
    """Digest of the prepared data's description; "" where it cannot be read, None where no data.path is set."""


def own_versions() -> dict[str, str | None]:
    """Versions that must agree over a run's nodes."""
    packages = describe_environment().packages
    return {"python": platform.python_version(), "dmpo_dist": dmpo_dist.__version__} | {
        n: packages[n] for n in COMPARED
    }


def look_around(paths: RunPaths) -> NodeReport:
    """The report of the node this runs on."""
    import psutil

    shm = Path("/dev/shm")
    existing = next(p for p in (paths.output, *paths.output.parents) if p.exists())
    return NodeReport(
        versions=own_versions(),
        cpus=os.cpu_count() or 1,
        gpus=_count_gpus(),
        memory=psutil.virtual_memory().total / GIB,
        shared_memory=shutil.disk_usage(shm).free / GIB if shm.exists() else None,
        disk=shutil.disk_usage(existing).free / GIB,
        writable=existing.is_dir() and os.access(existing, os.W_OK),
        sees_marker=paths.marker is None or paths.marker.exists(),
        data=None if paths.data is None else _digest(paths.data / "dataset.json"),
    )


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def _count_gpus() -> int:
    """GPUs of the machine, whatever Ray lets this process see."""
    if shutil.which("nvidia-smi") is None:
        return 0
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())


class NodeProbe:
    """An actor on one node."""

    def look_around(self, paths: RunPaths) -> NodeReport:
        return look_around(paths)

    def time(self) -> float:
        """This node's clock, in seconds since 1970."""
        return time.time()

    def hold(self, size: int) -> list[Any]:
        """Put ``size`` bytes into this node's object store; the reference is wrapped, so that it travels alone."""
        import ray

        return [ray.put(os.urandom(size))]

    def fetch(self, held: list[Any]) -> float:
        """Seconds to get what another node holds."""
        import ray

        began = time.perf_counter()
        ray.get(held[0])
        return time.perf_counter() - began

    def meeting_point(self) -> tuple[str, int]:
        """This node's address in Ray, and a free port."""
        import ray.util

        address = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((address, 0))
            return address, probe.getsockname()[1]

    def all_reduce(self, rank: int, world_size: int, meeting: tuple[str, int], size: int) -> float:
        """Median seconds of an all-reduce of ``size`` bytes by gloo, as ranks on CPUs do it."""
        import ray.util
        import torch
        from torch import distributed

        bind_gloo(ray.util.get_node_ip_address())
        distributed.init_process_group(
            "gloo",
            init_method=f"tcp://{meeting[0]}:{meeting[1]}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=GROUP_SECONDS),
        )
        try:
            values, seconds = torch.zeros(size // 4), []
            for _ in range(ALL_REDUCE_REPEATS + 1):
                began = time.perf_counter()
                distributed.all_reduce(values)
                seconds.append(time.perf_counter() - began)
            return statistics.median(seconds[1:])  # the first one opens the connections
        finally:
            distributed.destroy_process_group()
