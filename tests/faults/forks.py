"""`dmpo` in forks of a process that has imported everything: a command starts at once and can be killed cheaply.

``Forks`` is the test's side; ``python forks.py`` is the process that forks.
"""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path

READY = "ready"
GRACE_SECONDS = 5
PRELOADED = [
    "deepspeed", "peft", "tensorboard.summary", "matplotlib.pyplot", "transformers.models.llama",
    *(f"dmpo_dist.{name}" for name in (
        "cli.main", "commands.evaluate", "commands.explain", "commands.export", "commands.quickstart", "commands.rank",
        "data.prepare", "experiment.run", "records.log", "report.gather", "report.page", "training.worker",
    )),
]  # fmt: skip
"""Not Ray, which must first be told where to listen."""
WRITES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree", "shutil.copyfile")
"""Events of Python's audit hooks, beside the opening of a file to write, that change a folder."""


@dataclass(frozen=True)
class Order:
    """A command to run.

    Attributes:
        words: after ``dmpo``.
        folder: where it runs.
        log: file that its output is added to.
        ranks: 0 for a command of its own, else so many processes with RANK set, as torchrun starts them.
        watched: folder or file whose changes are counted, with all that lies below it or begins with its name.
        kill_at: the number of the change before which SIGKILL ends rank 0; 0 for none.
    """

    words: list[str]
    folder: str
    log: str
    ranks: int = 0
    watched: str = ""
    kill_at: int = 0
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Running:
    """Processes of an order; ``wait`` gives their exit statuses, negative for a signal."""

    server: "Forks"
    pids: list[int]

    def wait(self) -> list[int]:
        return self.server.read()["statuses"]


class Forks:
    """The process that forks; one order at a time."""

    def __init__(self, log: Path) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True,
            env=environment,
        )  # fmt: skip
        assert self.read() == READY, log.read_text()

    def start(self, order: Order) -> Running:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(order)) + "\n")
        self._process.stdin.flush()
        return Running(self, self.read()["pids"])

    def read(self):
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the process that forks has ended"
        return json.loads(line)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def _serve() -> None:
    for module in PRELOADED:
        __import__(module)
    told = os.dup(1)  # what a command prints goes to its log

    def tell(content: object) -> None:
        os.write(told, (json.dumps(content) + "\n").encode())

    tell(READY)
    for line in sys.stdin:
        order = Order(**json.loads(line))
        pids = []
        port = _free_port()
        for rank in range(max(1, order.ranks)):
            pid = os.fork()
            if not pid:
                _run(order, rank, port)
            pids.append(pid)
        tell({"pids": pids})
        tell({"statuses": _ends(pids)})


def _ends(pids: list[int]) -> list[int]:
    """Exit statuses of the processes; where one fails, the others are ended after a while, as torchrun does it."""
    statuses: dict[int, int] = {}
    while len(statuses) < len(pids):
        pid, status = os.wait()
        statuses[pid] = os.waitstatus_to_exitcode(status)
        if status and len(statuses) < len(pids):
            time.sleep(GRACE_SECONDS)
            for other in set(pids) - statuses.keys():
                os.kill(other, signal.SIGKILL)
    return [statuses[pid] for pid in pids]


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _run(order: Order, rank: int, port: str) -> None:
    """In the fork: the command, to its end."""
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the process that forked it
    os.chdir(order.folder)
    log = os.open(order.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(order.environment)
    if order.ranks:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(order.ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    changes = _count_changes(order.watched, order.kill_at) if order.watched and rank == 0 else [0]
    status = 1
    try:
        from dmpo_dist.cli.main import main

        sys.argv = ["dmpo", *order.words]
        main()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    if order.watched and rank == 0:
        Path(order.log).with_suffix(".changes").write_text(str(changes[0]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _count_changes(watched: str, kill_at: int) -> list[int]:
    """Count what changes ``watched`` from now on; before change number ``kill_at`` this process ends by SIGKILL."""
    count = [0]

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            changes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            changes = event in WRITES
        if not changes or not isinstance(arguments[0], str | bytes | Path):
            return
        if _concerns(os.fsdecode(arguments[0]), watched):
            count[0] += 1
            if count[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return count


def _concerns(path: str, watched: str) -> bool:
    """Whether ``path`` is ``watched``, lies below it, or is what stands beside it until it is whole."""
    beside, name = os.path.split(watched)
    path = os.path.abspath(path)
    return path.startswith((watched, os.path.join(beside, f".{name}")))


if __name__ == "__main__":
    _serve()
