"""Commands killed at seeded moments, and started again: the result is that of an undisturbed run, to the last bit.

Half of the moments are changes that the command makes to its output, such as a rename, and half are times.
"""

import contextlib
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import tally
from forks import Running
from shop import COMMANDS, WITH_RAY, Command, Shop

pytestmark = pytest.mark.faults

RAY_PROCESSES = {"raylet": ("raylet/raylet --",), "actor": ("ray::PooledWorker", "TrainWorker")}
"""What to kill -> what the command line of such a process holds."""


def kill_group(pids: Sequence[int]) -> None:
    """SIGKILL ``pids`` and all that they have started."""
    for pid in pids:
        try:
            driver = psutil.Process(pid)
            family = [*driver.children(recursive=True), driver]
        except psutil.NoSuchProcess:
            continue
        for member in family:
            _kill(member)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


def judged(shop: Shop, command: Command, name: str, out: str, expected: object, statuses: Sequence[int]) -> str:
    """What is wrong with the command, started again unless it went on by itself; counted under ``name``."""
    try:
        wrong = shop.finish(command, out) if any(statuses) else ""
        if not wrong and command.result(shop.folder / out) != expected:
            wrong = "another result"
    except (OSError, AssertionError, KeyError) as error:
        wrong = repr(error)
    tally.count(f"killed: {name}", not wrong)
    return wrong and f"{name} {out}: {wrong}"


def left_overs(folder: Path) -> list[str]:
    return [path.name for path in folder.glob(".*.part")]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_ends_as_if_nothing_had_happened(shop, name):
    command, tag = COMMANDS[name], name.replace(" ", "-").replace(",", "")
    began = time.monotonic()
    assert not any(shop.run(command, f"{tag}-whole")), shop.log(f"{tag}-whole").read_text()[-3000:]
    seconds, changes = time.monotonic() - began, shop.changes(f"{tag}-whole")
    expected = command.result(shop.folder / f"{tag}-whole")
    rng, found = random.Random(name), []
    for n, kill_at in enumerate(sorted(rng.sample(range(1, changes + 1), command.changes))):
        out = f"{tag}-change-{n}"
        running = shop.start(command, out, kill_at=kill_at)
        if command.ranks > 1:
            while _runs(running.pids[0]):
                time.sleep(0.05)
            kill_group(running.pids)
        statuses = running.wait()
        assert -signal.SIGKILL in statuses
        found.append(judged(shop, command, name, out, expected, statuses))
    for n in range(command.times):
        out = f"{tag}-time-{n}"
        running = shop.start(command, out)
        time.sleep(seconds * rng.uniform(0.1, 1.0))
        kill_group(running.pids)
        found.append(judged(shop, command, name, out, expected, running.wait()))
    assert [one for one in found if one] == []
    assert left_overs(shop.folder) == []


@pytest.mark.parametrize(("name", "kinds"), [
    ("rank", ["driver", "actor", "raylet"]),
    ("train with Ray", ["driver", "actor", "raylet"]),
    ("quickstart", ["driver"]),
])  # fmt: skip
def test_a_command_of_several_processes_loses_one_or_all(shop, name, kinds):
    command, tag = WITH_RAY[name], name.replace(" ", "-")
    whole = shop.start(command, f"{tag}-whole")
    began = wait_for_actor(whole)
    assert not any(whole.wait()), shop.log(f"{tag}-whole").read_text()[-3000:]
    seconds = time.monotonic() - began
    expected = command.result(shop.folder / f"{tag}-whole")
    rng, found = random.Random(name), []
    for n, kind in enumerate(kinds):
        out = f"{tag}-{kind}-{n}"
        running = shop.start(command, out)
        wait_for_actor(running)
        time.sleep(seconds * rng.uniform(0.1, 0.9))
        if kind == "driver":
            kill_group(running.pids)
        else:
            of_kind(running, kind)[-1].kill()
        found.append(judged(shop, command, f"{name} ({kind})", out, expected, running.wait()))
    assert [one for one in found if one] == []
    assert left_overs(shop.folder) == []


def wait_for_actor(running: Running) -> float:
    """Until a Ray worker is there; returns when."""
    deadline = time.monotonic() + 300
    while not of_kind(running, "actor"):
        assert _runs(running.pids[0])
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return time.monotonic()


def of_kind(running: Running, kind: str) -> list[psutil.Process]:
    """The processes of a kind that an order has started."""
    found = []
    for process in psutil.Process(running.pids[0]).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if any(words in line for words in RAY_PROCESSES[kind]):
                found.append(process)
    return found
