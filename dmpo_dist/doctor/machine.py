"""What this machine has and lacks for a run."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil
from rich.console import Console
from rich.text import Text

from dmpo_dist.config import RunConfig
from dmpo_dist.records.environment import describe_environment

MIN_SHARED_MEMORY_GIB = 1.0
MIN_DISK_GIB = 2.0


def examine(config: RunConfig, console: Console) -> bool:
    """Print what was found; False if something needed is missing."""
    import torch

    environment = describe_environment()
    console.print(f"dmpo_dist {environment.dmpo_dist} (commit {environment.git_commit or 'none: installed package'})")
    console.print(f"Python {environment.python} on {environment.platform}", highlight=False)
    missing = [name for name, version in environment.packages.items() if version is None and name != "bitsandbytes"]
    for name, version in environment.packages.items():
        console.print(f"  {name:14} {version or '-'}", highlight=False)
    problems = [f"{name} is not installed; run launch/setup_env.sh or pip install dmpo-dist" for name in missing]
    if environment.packages["bitsandbytes"] is None:
        console.print(
            '  (4-bit models need bitsandbytes: pip install -c constraints.txt -e ".[quant]")',
            markup=False,
            highlight=False,
        )
    console.print(f"accelerator: {_accelerator(torch)}", highlight=False)
    console.print(f"collectives: {'nccl' if torch.cuda.is_available() else 'gloo'}", highlight=False)
    _show_attention(config, "cuda" if torch.cuda.is_available() else "cpu", console)
    console.print(f"CPUs: {os.cpu_count()}, memory: {psutil.virtual_memory().total / 2**30:.1f} GiB", highlight=False)
    problems += _shared_memory(console) + _writable(config, console)
    for problem in problems:
        console.print(Text.assemble(("problem:", "red"), f" {problem}"), highlight=False)
    console.print(summary(problems), style="bold")
    return not problems


def summary(problems: Sequence[str]) -> str:
    """How many problems there are, for the last line."""
    return "no problems found" if not problems else f"{len(problems)} problem{'s' * (len(problems) > 1)} found"


def _accelerator(torch: object) -> str:
    cuda = torch.cuda  # type: ignore[attr-defined]
    if not cuda.is_available():
        return "none, CPU"
    names = [cuda.get_device_properties(i) for i in range(cuda.device_count())]
    return ", ".join(f"{p.name} ({p.total_memory / 2**30:.0f} GiB)" for p in names)


def _show_attention(config: RunConfig, device_type: str, console: Console) -> None:
    """What ``model.attention=auto`` takes on this machine by kind of model, and which backends are proven on it."""
    import torch

    from dmpo_dist.modeling.routing import PROVEN, typical_routes

    proven = ", ".join(sorted(PROVEN[device_type]))
    console.print(f"attention in {config.model.dtype} on {device_type}; proven there: {proven}", highlight=False)
    for kind, route in typical_routes(device_type, getattr(torch, config.model.dtype)):
        console.print(f"  {kind:38} {route.backend:9} {route.reason}", highlight=False, soft_wrap=True)


def _shared_memory(console: Console) -> list[str]:
    folder = Path("/dev/shm")
    if not folder.exists():
        console.print("shared memory: no /dev/shm (Ray will use the disk)")
        return []
    free = shutil.disk_usage(folder).free / 2**30
    console.print(f"shared memory: {free:.1f} GiB free in /dev/shm", highlight=False)
    if free >= MIN_SHARED_MEMORY_GIB:
        return []
    return [f"/dev/shm has {free:.2f} GiB free, Ray wants {MIN_SHARED_MEMORY_GIB:g}; in a container use --shm-size=2g"]


def _writable(config: RunConfig, console: Console) -> list[str]:
    """Whether the folders a run writes to can be written, and have room."""
    problems = []
    for what, path in {"output_dir": config.output_dir, "temporary files": Path(tempfile.gettempdir())}.items():
        folder = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
        free = shutil.disk_usage(folder).free / 2**30
        console.print(f"{what}: {path}, {free:.1f} GiB free", highlight=False)
        if not os.access(folder, os.W_OK) or not folder.is_dir():
            problems.append(f"{what}: {folder} cannot be written; choose another (output_dir=..., or TMPDIR)")
        elif free < MIN_DISK_GIB:
            problems.append(f"{what}: only {free:.2f} GiB free in {folder}")
    if config.data.path is not None:
        there = (config.data.path / "dataset.json").exists()
        console.print(f"data.path: {config.data.path}, {'prepared' if there else 'not prepared'}", highlight=False)
        problems += [] if there else [f"data.path: {config.data.path} is not prepared; run dmpo data prepare"]
    return problems
