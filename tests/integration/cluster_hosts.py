"""Hosts made of network namespaces on this machine: a switch, and hosts with an address, a host name and Ray nodes.

Everything is started and ended by its process id. Needs root and iproute2; ``why_no_hosts`` says what is missing.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

ROOT = Path(__file__).parents[2]
OF_RAY = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "GLOO_SOCKET_IFNAME")
SUBNET = "10.77.0"
SWITCH = 254


def why_no_hosts() -> str | None:
    """Why no namespaces can be made here; None where they can."""
    lacking = [name for name in ("ip", "nsenter", "unshare") if shutil.which(name) is None]
    if lacking:
        return f"{', '.join(lacking)} not on PATH (Debian: iproute2, util-linux)"
    name = f"dmpo-{os.getpid()}-try"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if done.returncode:
        return f"network namespaces cannot be made: {done.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


def environment(**more: str) -> dict[str, str]:
    """This process's, with the checkout's ``dmpo`` first and nothing of another Ray cluster."""
    env = {name: value for name, value in os.environ.items() if name not in OF_RAY}
    path = [str(ROOT), *filter(None, [env.get("PYTHONPATH")])]
    ours = {"PYTHONPATH": os.pathsep.join(path), "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}
    return env | ours | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"} | more


class Network:
    """A bridge in a namespace of its own, where clients of the cluster can run, and the hosts plugged into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._hosts: list[Host] = []
        self._prefix = f"dmpo{os.getpid() % 10_000}"
        self.switch = f"{self._prefix}-sw"

    def __enter__(self) -> Self:
        _ip("netns", "add", self.switch)
        _inside(self.switch, "link", "set", "lo", "up")
        _inside(self.switch, "link", "add", "br0", "type", "bridge")
        _inside(self.switch, "addr", "add", f"{SUBNET}.{SWITCH}/24", "dev", "br0")
        _inside(self.switch, "link", "set", "br0", "up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for host in self._hosts:
            host.kill()
            shutil.rmtree(Path("/tmp") / host.namespace, ignore_errors=True)
            subprocess.run(["ip", "netns", "del", host.namespace], check=False)
        kill_all(pids_of(self.switch))
        subprocess.run(["ip", "netns", "del", self.switch], check=False)

    def host(self, name: str, default_route: bool = True) -> "Host":
        """A new host, with the next free address."""
        number = len(self._hosts) + 1
        host = Host(self, name, f"{SUBNET}.{number}", f"{self._prefix}-h{number}")
        port = f"port{number}"
        _ip("netns", "add", host.namespace)
        _inside(self.switch, "link", "add", port, "type", "veth", "peer", "name", "wire0", "netns", host.namespace)
        _inside(self.switch, "link", "set", port, "master", "br0", "up")
        _inside(host.namespace, "link", "set", "lo", "up")
        _inside(host.namespace, "addr", "add", f"{host.address}/24", "dev", "wire0")
        _inside(host.namespace, "link", "set", "wire0", "up")
        if default_route:  # by the default route Ray finds a host's address
            _inside(host.namespace, "route", "add", "default", "via", f"{SUBNET}.{SWITCH}")
        self._hosts.append(host)
        return host


class Host:
    """One host: commands run there see its network and its name, and this machine's files."""

    def __init__(self, network: Network, name: str, address: str, namespace: str) -> None:
        self.name, self.address, self.namespace = name, address, namespace
        self._folder = network.folder

    def command(self, *arguments: object, hide: Sequence[Path] = ()) -> list[str]:
        """``arguments`` to run on this host; ``hide``: folders that look empty there."""
        before = "".join(f"mount -t tmpfs hidden {folder}; " for folder in hide)
        inner = f'hostname {self.name}; {before}exec "$@"'
        spaces = ["--uts", *(["--mount"] if hide else [])]
        net = f"--net=/run/netns/{self.namespace}"
        return ["nsenter", net, "unshare", *spaces, "bash", "-c", inner, "host", *map(str, arguments)]

    def start(
        self, *arguments: object, log: str, env: Mapping[str, str] | None = None, hide: Sequence[Path] = ()
    ) -> subprocess.Popen[str]:
        """Start a command in the background, its output in the file ``log`` of the network's folder."""
        with (self._folder / log).open("w") as file:
            return subprocess.Popen(
                self.command(*arguments, hide=hide), env=dict(env or environment()), stdout=file, text=True,
                stderr=subprocess.STDOUT, start_new_session=True, cwd=self._folder,
            )  # fmt: skip

    def run(
        self, *arguments: object, env: Mapping[str, str] | None = None, hide: Sequence[Path] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; what it leaves in the background stays."""
        return subprocess.run(
            self.command(*arguments, hide=hide), env=dict(env or environment()), capture_output=True, text=True,
            timeout=400, cwd=self._folder,
        )  # fmt: skip

    def ray(self, *options: str, env: Mapping[str, str], head: "Host | None" = None, hide: Sequence[Path] = ()) -> None:
        """A Ray node here: the head, or one that joins ``head``; returns when it runs.

        Raises:
            AssertionError: it ended instead; with its output.
        """
        temporary = Path("/tmp") / (head or self).namespace  # Ray's sockets want a short path
        if head is None:
            where = ["--head", "--port=6379", "--dashboard-host=0.0.0.0", f"--temp-dir={temporary}"]
        else:  # Ray keeps working directories there: as on a host of its own, it must not be the head's folder
            where, hide = [f"--address={head.address}:6379"], [*hide, temporary]
        common = [f"--node-ip-address={self.address}", "--num-gpus=0", "--object-store-memory=100000000"]
        command = [*python("ray.scripts.scripts", "start"), *where, *common, *options]
        # Without --block: on a busy machine Ray's client server, which nobody needs here, may give up and end the rest.
        done = self.run(*command, env=env, hide=hide)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

    def kill(self) -> int:
        """SIGKILL every process of this host; returns how many there were."""
        return kill_all(pids_of(self.namespace))


def python(module: str, *arguments: object) -> list[str]:
    """``python -m module`` of the environment that runs the tests."""
    return [sys.executable, "-m", module, *map(str, arguments)]


def token_environment() -> dict[str, str]:
    """An environment in which Ray asks for a new token."""
    return environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(16))


def wait_for(text: str, log: Path, process: subprocess.Popen[str], seconds: float = 240) -> None:
    """Until ``log`` holds ``text``."""
    deadline = time.monotonic() + seconds
    while text not in (shown := log.read_text(errors="replace")):
        assert process.poll() is None, f"it ended before it said {text!r}:\n{shown[-4000:]}"
        assert time.monotonic() < deadline, f"it did not say {text!r} in {seconds} s:\n{shown[-4000:]}"
        time.sleep(0.2)


def pids_of(namespace: str) -> list[int]:
    """Processes in a network namespace."""
    done = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True)
    return [int(pid) for pid in done.stdout.split()]


def kill_all(pids: Sequence[int]) -> int:
    """SIGKILL processes that a test started, and wait until they are gone."""
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    for process in processes:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=20)
    return len(processes)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _inside(namespace: str, *arguments: str) -> None:
    subprocess.run(["ip", "-n", namespace, *arguments], check=True)
