"""Which weights become a run's result: the best on the validation requests so far, or the last."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dmpo_dist.artifacts.files import replace_folder
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.training.checkpoint import save_model
from dmpo_dist.training.groups import Batches
from dmpo_dist.training.job import Job
from dmpo_dist.training.runtime import Runtime
from dmpo_dist.training.validation import rank_with_all


@dataclass
class Selection:
    """Ranks the validation requests and keeps the selected weights; every rank calls it.

    Attributes:
        best: ``value`` of ``select_metric`` and ``step`` of the best weights so far; empty before the first validation.
    """

    job: Job
    runtime: Runtime
    engine: Any
    tokenizer: Any
    batches: Batches
    validation: Sequence[TokenGroup]
    device: torch.device
    best: dict[str, float] = field(default_factory=dict)

    def validate(self, done: int) -> None:
        """Rank after ``done`` steps; weights that are the best so far go to ``output/best``."""
        metrics = rank_with_all(
            self.engine, self.validation, self.runtime.rank, self.runtime.world_size, self.batches.token_budget,
            self.batches.shared, self.device,
        )  # fmt: skip
        if not metrics:
            return
        if done and self._improved(done, metrics) and self.job.stage.select == "best":
            self._save(self.job.output / "best", {"step": done, **metrics})
        self.runtime.log({"kind": "validation", "step": done, **metrics})

    def finish(self, last: int) -> None:
        """The selected weights become ``output/model``; ``last`` is the number of the last step."""
        best, model = self.job.output / "best", self.job.output / "model"
        if self.job.stage.select == "best" and self.best:
            if self.runtime.rank == 0 and best.exists():
                replace_folder(best, model)
            dist.barrier()
            step = int(self.best["step"])
        else:
            step = last
            self._save(model, {"step": step})
        self.runtime.log({"kind": "end", "selected_step": step, "model": str(model)})

    def _improved(self, done: int, metrics: dict[str, float]) -> bool:
        value = metrics[self.job.stage.select_metric]
        if self.best and value <= self.best["value"]:
            return False
        self.best = {"value": value, "step": done}
        return True

    def _save(self, folder: Path, stamp: dict[str, Any]) -> None:
        save_model(self.engine, self.tokenizer, folder, self.job, stamp)
