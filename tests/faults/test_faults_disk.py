"""Commands on a disk that fills up: one message that names a path on it, and nothing lost of what was there before.

With room again they go on, and leave what an undisturbed run does. The disk is a small tmpfs, on which a file takes all
room but a share of what the command needs.
"""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import tally
from shop import COMMANDS, WITH_RAY, Command, Shop

pytestmark = pytest.mark.faults

SIZE = 64 << 20
"""Of the disk, in bytes."""
SHARES = (0.0, 0.02, 0.3, 0.6, 0.9)
"""Of what an undisturbed run leaves, that there is room for."""
SLOW = {"experiment": (0.1, 0.5), "rank": (0.0,), "train with Ray": (0.0, 0.5), "report": (0.0, 0.5)}
ALL = {name: command for name, command in (COMMANDS | WITH_RAY).items() if name != "quickstart"}


class Disk:
    """A small disk at ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._ballast = folder, folder / "ballast"

    def fill(self, room: int) -> None:
        """Leave ``room`` bytes, rounded up to pages."""
        self.free()
        state = os.statvfs(self.folder)
        with self._ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, state.f_bavail * state.f_bsize - room))

    def free(self) -> None:
        self._ballast.unlink(missing_ok=True)

    def used(self) -> int:
        state = os.statvfs(self.folder)
        return (state.f_blocks - state.f_bfree) * state.f_bsize

    def files(self) -> dict[str, bytes]:
        """What lies on the disk, but for the ballast."""
        files = [path for path in self.folder.rglob("*") if path.is_file() and path != self._ballast]
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def disk(shop) -> Iterator[Disk]:
    folder = shop.folder / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk needs the right to mount one: {mounted.stderr.strip()}")
    yield Disk(folder)
    subprocess.run(["umount", str(folder)], check=True)


def complaint(shop: Shop, out: str, statuses: list[int]) -> str:
    """What is wrong with how a command told of the full disk; "" where nothing is."""
    told = shop.log(out).read_text()
    last = [line for line in told.splitlines() if line.startswith(("error: ", "rank "))]
    # A rank that waits for another is ended; one with nothing left to do while the other writes its last file is done.
    ended = 2 in statuses and set(statuses) <= {0, 2, -signal.SIGKILL}
    if not ended or "Traceback" in told or not last:
        return f"statuses {statuses}: {told[-1500:]}"
    named = any(out in line and "space" in line.lower() for line in last)
    return "" if named else f"it names no path on the disk: {last}"


def case(shop: Shop, disk: Disk, command: Command, out: str, room: int, expected: object, half: int) -> str:
    """Run the command with so much room, then with enough; where ``half`` is set, after it was killed halfway."""
    if half:
        shop.start(command, out, kill_at=half).wait()
    before = disk.files()
    disk.fill(room)
    shop.log(out).write_text("")
    statuses = shop.run(command, out, *["--resume"] * bool(half))
    wrong = ""
    if any(statuses):
        wrong = complaint(shop, out, statuses)
        now = disk.files()
        lost = [name for name in before if name not in now and not name.startswith(f"{Path(out).name}/.")]
        if lost and not half:
            wrong = wrong or f"lost: {lost}"
        disk.free()
        wrong = wrong or shop.finish(command, out)
    disk.free()
    return wrong or ("" if command.result(shop.folder / out) == expected else "another result")


@pytest.mark.parametrize("name", ALL)
def test_a_full_disk_is_one_message_and_nothing_is_lost(shop, disk, name):
    command, tag = ALL[name], name.replace(" ", "-").replace(",", "")
    whole = f"disk/{tag}-whole"
    empty = disk.used()
    assert not any(shop.run(command, whole)), shop.log(whole).read_text()[-3000:]
    needed, expected = disk.used() - empty, command.result(shop.folder / whole)
    found = []
    shares = SLOW.get(name, SHARES)
    halves = [0] * len(shares) + [shop.changes(whole) // 2] * (len(shares) if command.resume and command.ranks else 0)
    for n, (share, half) in enumerate(zip(shares * 2, halves, strict=False)):
        wrong = case(shop, disk, command, f"disk/{tag}-{n}", int(share * needed), expected, half)
        tally.count(f"full disk: {name}", not wrong)
        found += [f"{name} {n}, room for {share:g} of it: {wrong}"] if wrong else []
    subprocess.run(f"rm -rf {disk.folder}/{tag}-*", shell=True, check=True)
    assert found == []
