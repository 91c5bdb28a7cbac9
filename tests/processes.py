"""Processes that tests start as torchrun would, and ports for them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

RUN_JOBS = Path(__file__).parent / "integration" / "run_jobs.py"


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def as_rank(rank: int = 0, ranks: int = 1, port: int | None = None) -> dict[str, str]:
    """The environment of a rank, with one thread; its ranks meet at ``port``."""
    port = port or free_ports(1)[0]
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return os.environ | place | meeting | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def run_ranks(folder: Path, jobs: list[dict[str, Any]], ranks: int, status: int = 0) -> None:
    """Run ``jobs`` one after the other in ``ranks`` processes, which must all end with ``status``."""
    (port,) = free_ports(1)
    file = folder / f"jobs{port}.json"
    file.write_text(json.dumps(jobs))
    logs = [folder / f"jobs{port}-rank{rank}.log" for rank in range(ranks)]  # files: a full pipe would stop a rank
    processes = [
        subprocess.Popen(
            [sys.executable, str(RUN_JOBS), str(file)],
            env=as_rank(rank, ranks, port),
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    for process, log in zip(processes, logs, strict=True):
        assert process.wait(timeout=600) == status, log.read_text()[-4000:]
