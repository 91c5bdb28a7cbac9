"""Memory of this process or its accelerator: held now, and at most since a reset."""

import ctypes
import gc
import sys
from pathlib import Path

import psutil
import torch

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # of glibc's malloc.h
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}
"""Environment of a process whose tensors are made by another thread than its first, as in a worker of Ray Train. That
thread would get an arena of pieces of 64 MiB, which hold no large tensor and are given back whenever they are empty."""
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def held_bytes(device: torch.device) -> int:
    """Allocated by torch on a GPU, resident in this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def reset_peak(device: torch.device) -> None:
    """Forget the peak so far, and on the CPU give freed pages back, which would hide what is allocated next.

    Outside Linux a CPU peak cannot be forgotten and only grows.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR_REFS.exists():
        trim()
        CLEAR_REFS.write_text("5")  # sets VmHWM to VmRSS, proc(5)


def peak_bytes(device: torch.device) -> int:
    """The most of ``held_bytes`` since ``reset_peak``."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes


def keep_freed_memory() -> None:
    """From here on the process keeps what tensors on the CPU free, for those that follow; Linux only.

    Else the kernel clears the pages of every long row's tensors anew: 5 % of a step on rows of 4,000 tokens, 10 % of
    scoring. Of threads other than the first only with ``ONE_ARENA``.
    """
    # glibc before 2.35 takes half of a thread's arena at most; where it refuses both, its moving threshold must stay
    if any(_mallopt(M_MMAP_THRESHOLD, threshold) for threshold in (2**30, 2**25)):
        _mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """From here on tensors on the CPU get pages of their own and give them back when freed; Linux only.

    So a peak is what lives, not fragmentation.
    """
    _mallopt(M_MMAP_THRESHOLD, 2**16)


def _mallopt(parameter: int, value: int) -> bool:
    """Whether glibc took the setting; False without glibc."""
    return STATUS.exists() and ctypes.CDLL(None).mallopt(parameter, value) == 1


def give_back() -> None:
    """Free what this process has left of models, on the host and on a GPU.

    A DeepSpeed engine refers to itself, so it would live beside the next one until Python happens to collect it.
    """
    trim()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def trim() -> None:
    """Give freed pages back; Linux only."""
    gc.collect()
    if STATUS.exists():
        ctypes.CDLL(None).malloc_trim(0)
