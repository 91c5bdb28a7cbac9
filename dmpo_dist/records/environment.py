"""The environment of a run: versions, commit, machine."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import dmpo_dist
from dmpo_dist.artifacts.environment import Environment

PACKAGES = ("torch", "transformers", "peft", "deepspeed", "ray", "datasets", "accelerate", "bitsandbytes", "numpy")


def describe_environment() -> Environment:
    """Versions, git commit (with "-dirty" where files differ), Python and machine; None for packages not installed."""
    return Environment(
        dmpo_dist=dmpo_dist.__version__,
        git_commit=git_commit(),
        python=platform.python_version(),
        platform=platform.platform(),
        cpus=os.cpu_count(),
        packages={name: _version(name) for name in PACKAGES},
    )


def git_commit() -> str | None:
    """Commit of the checkout the package runs from, None for an installed wheel."""
    folder = Path(dmpo_dist.__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = git("rev-parse", "HEAD")
    return f"{commit}-dirty" if commit and git("status", "--porcelain", "--untracked-files=no", ".") else commit


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
