"""Peak memory of an implementation's step: on a CPU in a process of its own, on a GPU by torch's own count."""

import multiprocessing
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TypeVar

import torch

from dmpo_dist.batching.synthetic import random_groups
from dmpo_dist.bench.implementations import Implementation
from dmpo_dist.bench.settings import SpeedCell
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.memory import held_bytes, peak_bytes, reset_peak, return_freed_memory

MEASURED_STEPS = 2

T = TypeVar("T")


def peak_memory(make: Callable[[], Implementation], cell: SpeedCell, threads: int, name: str) -> float:
    """Peak memory of steps in MiB, above the memory of model and optimizer, measured in a process of its own.

    A first step on a tiny group allocates the optimizer's state and the libraries' buffers, which are not counted.

    Args:
        make: builds the implementation in the new process; picklable.
        cell: the lengths of the groups.
        threads: CPU threads, as in the timed run.
        name: the implementation's name in an error.

    Raises:
        UserError: the process ended without a figure, as when memory ran out.
    """
    context = multiprocessing.get_context("forkserver")  # imports once for all children
    context.set_forkserver_preload(["dmpo_dist.bench.preload"])
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(make, cell, threads, sender), daemon=True)
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        child.join()
        raise UserError(
            f"--prompt {cell.prompt} --negatives {cell.negatives} --vocab {cell.vocab}: the process that measured the "
            f"memory of {name} ended with exit code {child.exitcode} (-9: out of memory); choose smaller values"
        ) from None
    finally:
        receiver.close()
        child.join()


def peak_of_steps(implementation: Implementation, cell: SpeedCell, device: str) -> float:
    """Peak memory of steps in MiB, above the memory held between steps; ``implementation`` must have made a step.

    On a GPU this counts what torch allocated, so several implementations can share a process; on a CPU it is the
    resident set of the process.
    """
    size = implementation.groups_per_step
    groups = random_groups(size * MEASURED_STEPS, cell.prompt, cell.response, cell.negatives, cell.vocab)

    def run() -> None:
        for start in range(0, len(groups), size):
            implementation.step(groups[start : start + size])

    return peak_above(run, torch.device(device))[1]


def peak_above(run: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """The result of ``run``, and its peak memory in MiB above the memory held before."""
    reset_peak(device)
    before = held_bytes(device)
    result = run()
    return result, (peak_bytes(device) - before) / 2**20


def _measure(make: Callable[[], Implementation], cell: SpeedCell, threads: int, sender: Connection) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(threads)
    return_freed_memory()
    implementation = make()
    implementation.step(random_groups(1, 8, 4, 1, cell.vocab))
    sender.send(peak_of_steps(implementation, cell, "cpu"))
