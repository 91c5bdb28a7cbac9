"""What a run logs of its steps: sums on the device, reduced over ranks only when a line is due."""

from typing import Any

import psutil
import torch
from torch import Tensor

from dmpo_dist.batching.layout import Layout
from dmpo_dist.batching.plan import Step
from dmpo_dist.errors import UserError
from dmpo_dist.objectives.loss import Loss
from dmpo_dist.training.busy import Stopwatch
from dmpo_dist.training.job import Job
from dmpo_dist.training.metrics import Meter
from dmpo_dist.training.schedule import learning_rate

COUNTS = ("groups", "physical_tokens", "logical_tokens")


class LogLines:
    """Gathers the sums of steps and makes the next line of them."""

    def __init__(
        self, job: Job, loss: Loss, engine: Any, watch: Stopwatch, total_steps: int, device: torch.device
    ) -> None:
        self._job, self._engine, self._watch, self._total, self._device = job, engine, watch, total_steps, device
        self._sums = tuple(loss.sums)
        self._meter = Meter(device)

    def count(self, layout: Layout, sums: dict[str, Tensor]) -> None:
        """Add what a micro-batch gave.

        Raises:
            UserError: a loss of the user's own reports other sums than it says.
        """
        if sums.keys() != set(self._sums):
            raise UserError(
                f"the loss reports {', '.join(sums)}, but its sums are {', '.join(self._sums)}; make them equal"
            )
        counts = (layout.targets.n_groups, layout.physical_tokens, layout.logical_tokens)
        self._meter.update(sums, dict(zip(COUNTS, counts, strict=True)))

    def reduce(self, index: int, step: Step) -> dict[str, Any]:
        """The record of all steps since the line before, up to step ``index``; every rank calls it and gets the same but for
        speed and memory, which are its own."""
        elapsed, busy = self._watch.lap()
        sums, busy_of_ranks = self._meter.reduce((*self._sums, *COUNTS), busy)
        slowest = max(busy_of_ranks)
        norm = self._engine.get_global_grad_norm()
        return {
            "kind": "train",
            "step": index + 1,
            "total_steps": self._total,
            **{name: sums[name] / sums["groups"] for name in self._sums},
            "learning_rate": learning_rate(index, self._total, self._job.stage),
            "grad_norm": None if norm is None else float(norm),
            "groups_per_second": sums["groups"] / elapsed,
            "tokens_per_second": sums["physical_tokens"] / elapsed,
            "reuse": sums["logical_tokens"] / sums["physical_tokens"],
            "imbalance": step.imbalance,
            "slowest_rank": busy_of_ranks.index(slowest),
            "slowest_share": slowest * len(busy_of_ranks) / sum(busy_of_ranks),
            "memory_gib": memory_gib(self._device),
        }


def memory_gib(device: torch.device) -> float:
    """Peak GPU memory of this rank, or its resident memory on the CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30
