"""The environment of the classical baselines: made once with venv and pip, and used through its interpreter's path.

RecTools needs numpy < 2 on most Pythons, so it cannot be installed beside this package. A folder made by ``python -m
venv`` needs neither a cluster nor Ray, can be made on a login node for compute nodes without a network, and can be
inspected. A Ray runtime environment would need a cluster for an evaluation, and would inherit the packages that
RecTools clashes with.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from dmpo_dist.cache import cache_folder
from dmpo_dist.errors import UserError

REQUIREMENTS = ("rectools[torch]==0.19.0", "torch==2.13.0", "pyarrow==21.0.0")
PROBE = (
    "import importlib.util, sys\n"
    "needed = ('rectools', 'torch', 'pytorch_lightning', 'pyarrow')\n"
    "lacks = [m for m in needed if importlib.util.find_spec(m) is None]\n"
    "sys.exit('it lacks ' + ', '.join(lacks) if lacks else 0)"
)
SHOWN_LINES = 6
FOREIGN = (
    "PYTHON", "SLURM_", "LSB_", "TORCHELASTIC_", "PL_", "RANK", "LOCAL_", "GROUP_", "ROLE_", "NODE_RANK", "WORLD_SIZE",
    "MASTER_",
)  # fmt: skip
"""Prefixes of environment variables that describe this package's interpreter, or the job that this process is in."""


def default_environment() -> Path:
    """A folder in the user's cache; its name depends on the required versions."""
    key = hashlib.sha256(repr((REQUIREMENTS, sys.version_info[:2])).encode()).hexdigest()[:12]
    return cache_folder() / f"baselines-{key}"


def run_environment() -> dict[str, str]:
    """This process's variables without ``FOREIGN``: Lightning would wait for the ranks of the job they describe."""
    return {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}


def baseline_python(folder: Path | None, echo: Callable[[str], None]) -> Path:
    """The interpreter of an environment with RecTools, which is made if ``folder`` does not exist.

    Args:
        folder: the environment, with ``bin/python`` and RecTools; None takes ``default_environment``.

    Raises:
        UserError: it cannot be made, or it exists without RecTools.
    """
    folder = (folder or default_environment()).absolute()
    python = folder / "bin" / "python"
    if folder.exists():
        probe = [python, "-I", "-c", PROBE]
        tried = subprocess.run(probe, capture_output=True, text=True) if python.exists() else None
        if tried is None or tried.returncode:
            why = _end(tried.stderr) if tried else "it has no bin/python"
            raise UserError(
                f"evaluation.baseline_environment={folder}: is no environment with RecTools ({why}); name one that "
                "has it, or a folder that does not exist yet, where it is made"
            )
        return python
    echo(f"making an environment for {REQUIREMENTS[0]} in {folder} (once; some minutes, about 1.5 GB without CUDA)")
    _make(folder)
    return python


def _make(folder: Path) -> None:
    """Make the environment beside ``folder`` and rename it when it is complete; its interpreter works after a move."""
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _run([sys.executable, "-I", "-m", "venv", str(partial)], folder)
        pip = [str(partial / "bin" / "python"), "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _run([*pip, *REQUIREMENTS], folder)
        if not folder.exists():  # else another process was faster
            partial.rename(folder)
    except OSError as error:
        raise _cannot(folder, str(error)) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise _cannot(folder, _end(done.stderr or done.stdout))


def _cannot(folder: Path, why: str) -> UserError:
    return UserError(
        f"the environment of the baselines cannot be made in {folder}: {why}\n"
        f"Make it where there is a network, `python -m venv FOLDER && FOLDER/bin/python -m pip install "
        f"{' '.join(repr(r) for r in REQUIREMENTS)}`, and set evaluation.baseline_environment=FOLDER; or leave sasrec, "
        "bert4rec and ease out of evaluation.baselines"
    )


def _end(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-SHOWN_LINES:])
