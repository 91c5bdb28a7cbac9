"""What a run logs of its steps: sums on the device, reduced over ranks only when a line is due."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from dmpo_dist.batching.layout import Layout
from dmpo_dist.batching.plan import Step
from dmpo_dist.errors import UserError
from dmpo_dist.objectives.loss import Loss
from dmpo_dist.training.busy import Stopwatch
from dmpo_dist.training.job import Job
from dmpo_dist.training.schedule import learning_rate

COUNTS = ("groups", "physical_tokens", "logical_tokens")


class Meter:
    """Adds up ``names``, scalars on the device, and counts on the host; reduces both over all ranks at once."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._names, self._device = tuple(names), device
        self._start()

    def _start(self) -> None:
        self._sums = torch.zeros(len(self._names), dtype=torch.float64, device=self._device)
        self._counts = [0] * len(COUNTS)

    def update(self, sums: Mapping[str, Tensor], counts: Sequence[int]) -> None:
        """Add scalar tensors, without synchronising, and ``COUNTS``."""
        self._sums += torch.stack([sums[name].double() for name in self._names])
        self._counts = [total + count for total, count in zip(self._counts, counts, strict=True)]

    def reduce(self, own: float) -> tuple[dict[str, float], list[float]]:
        """Sums and counts over all ranks since the last call, and every rank's ``own``; all ranks call it."""
        of_ranks = [own if rank == dist.get_rank() else 0.0 for rank in range(dist.get_world_size())]
        on_host = torch.tensor([*self._counts, *of_ranks], dtype=torch.float64, device=self._device)
        packed = torch.cat([self._sums, on_host])  # one all-reduce, one copy to the host
        dist.all_reduce(packed)
        self._start()
        names, values = (*self._names, *COUNTS), packed.tolist()
        return dict(zip(names, values, strict=False)), values[len(names) :]


class LogLines:
    """Gathers the sums of steps and makes the next line of them."""

    def __init__(
        self, job: Job, loss: Loss, engine: Any, watch: Stopwatch, total_steps: int, device: torch.device
    ) -> None:
        self._job, self._engine, self._watch, self._total, self._device = job, engine, watch, total_steps, device
        self._names = tuple(loss.sums)
        self._meter = Meter(self._names, device)

    def count(self, layout: Layout, sums: Mapping[str, Tensor]) -> None:
        """Add what a micro-batch gave.

        Raises:
            UserError: a loss of the user's own reports other sums than it says.
        """
        if sums.keys() != set(self._names):
            raise UserError(
                f"the loss reports {', '.join(sums)}, but its sums are {', '.join(self._names)}; make them equal"
            )
        self._meter.update(sums, (layout.targets.n_groups, layout.physical_tokens, layout.logical_tokens))

    def reduce(
        self, index: int, step: Step, more: Callable[[float], Mapping[str, Any]] = lambda elapsed: {}
    ) -> dict[str, Any]:
        """The record of all steps since the line before, up to step ``index``; every rank calls it and gets the same
        but for speed and memory, which are its own.

        Args:
            more: (seconds since the line before) -> what else the line says.
        """
        elapsed, busy = self._watch.lap()
        sums, busy_of_ranks = self._meter.reduce(busy)
        slowest = max(busy_of_ranks)
        norm = self._engine.get_global_grad_norm()
        return {
            "kind": "step",
            "stage": self._job.kind,
            "step": index + 1,
            "total_steps": self._total,
            **{name: sums[name] / sums["groups"] for name in self._names},
            "learning_rate": learning_rate(index, self._total, self._job.stage),
            "grad_norm": None if norm is None else float(norm),
            "groups_per_second": sums["groups"] / elapsed,
            "tokens_per_second": sums["physical_tokens"] / elapsed,
            "reuse": sums["logical_tokens"] / sums["physical_tokens"],
            "imbalance": step.imbalance,
            "slowest_rank": busy_of_ranks.index(slowest),
            "slowest_share": slowest * len(busy_of_ranks) / sum(busy_of_ranks),
            "memory_gib": memory_gib(self._device),
            **more(elapsed),
        }


def memory_gib(device: torch.device) -> float:
    """Peak GPU memory of this rank, or its resident memory on the CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30
