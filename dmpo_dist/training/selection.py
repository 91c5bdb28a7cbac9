"""Which weights become a run's result: the best on validation, where those of the start count too, or the last."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dmpo_dist.artifacts.files import recover_folder, replace_folder
from dmpo_dist.artifacts.stamp import ModelStamp
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.model_files import damage_of
from dmpo_dist.training.checkpoint import save_model
from dmpo_dist.training.groups import Batches
from dmpo_dist.training.job import Job
from dmpo_dist.training.runtime import Runtime, from_rank_zero
from dmpo_dist.training.validation import rank_with_all


@dataclass
class Selection:
    """Ranks the validation requests and keeps the selected weights; every rank calls it.

    With ``select=best`` the start counts: its weights are in ``output/best`` until a later step beats them.

    Attributes:
        best: ``start``, the value of ``select_metric`` before the first step; ``value`` and ``step``, the best of the
            later steps so far. Each is absent before it is known.
    """

    job: Job
    runtime: Runtime
    engine: Any
    tokenizer: Any
    batches: Batches
    validation: Sequence[TokenGroup]
    device: torch.device
    best: dict[str, float] = field(default_factory=dict)

    def lost(self, step: int, best: dict[str, float]) -> str:
        """Why the weights that were the best at a checkpoint of ``step`` are gone; "" where they are not.

        Weights of a later step may have replaced them: training comes to that step again, and they to be the best.
        """
        if self.job.stage.select != "best" or not best:
            return ""
        wanted = 0 if self._start_wins(best) else int(best["step"])
        stamp, why = from_rank_zero(self._kept() if self.runtime.rank == 0 else (None, ""))
        kept = -1 if stamp is None else stamp.step or 0
        if kept > step or (kept == wanted and not why):
            return ""
        return f"the weights of step {wanted}, the best up to it, are not in {self.job.output}{why}"

    def resume(self, step: int, best: dict[str, float]) -> None:
        """Go on from ``best`` of a checkpoint of ``step``.

        Weights saved after that checkpoint have replaced those that it knew, so what lies in the folder counts.
        """
        self.best = best
        found = from_rank_zero(self._saved())
        if found is not None and found["step"]:
            self.best = {**best, **found}

    def validate(self, done: int) -> None:
        """Rank after ``done`` steps; weights that are the best so far go to ``output/best``."""
        metrics = rank_with_all(
            self.engine, self.validation, self.runtime.rank, self.runtime.world_size, self.batches.token_budget,
            self.batches.shared, self.device,
        )  # fmt: skip
        if not metrics:
            return
        if self._improved(done, metrics[self.job.stage.select_metric]) and self.job.stage.select == "best":
            self._save(self.job.output / "best", {"step": done, **metrics})
        self.runtime.log({"kind": "validation", "step": done, **metrics})

    def finish(self, last: int) -> None:
        """The selected weights become ``output/model``; ``last`` is the number of the last step."""
        best, model = self.job.output / "best", self.job.output / "model"
        if self.job.stage.select == "best" and self.best:
            if self.runtime.rank == 0 and best.exists():
                replace_folder(best, model)
            dist.barrier()
            step = 0 if self._start_wins(self.best) else int(self.best["step"])
        else:
            step = last
            self._save(model, {"step": step})
        end = {"kind": "end", "selected_step": step, "model": str(model)}
        if len(self.best) == 3:  # it was validated before and after
            later = {"best_later": self.best["value"], "best_later_step": int(self.best["step"])}
            end |= {"select_metric": self.job.stage.select_metric, "start": self.best["start"], **later}
        self.runtime.log(end)

    def _improved(self, done: int, value: float) -> bool:
        """Take note of ``value``; returns whether it is above that of the start and of all steps so far."""
        if not done:
            self.best = {"start": value}
            return True
        if "value" in self.best and value <= self.best["value"]:
            return False
        self.best |= {"value": value, "step": done}
        return not self._start_wins(self.best)

    @staticmethod
    def _start_wins(best: dict[str, float]) -> bool:
        return "start" in best and best.get("value", best["start"]) <= best["start"]

    def _kept(self) -> tuple[ModelStamp | None, str]:
        """The stamp of the weights that are kept so far, and what is wrong with them, "" where nothing is."""
        recover_folder(self.job.output / "best")
        folder = next((f for f in (self.job.output / "best", self.job.output / "model") if f.is_dir()), None)
        if folder is None:
            return None, ""
        try:
            stamp = ModelStamp.read(folder)
        except UserError as error:
            return None, f": {error}"
        why = damage_of(folder, stamp)
        return stamp, f": in {folder.name}, {why}" if why else ""

    def _saved(self) -> dict[str, float] | None:
        """Step and value of the weights that are kept so far, as written beside them."""
        stamp, why = self._kept() if self.runtime.rank == 0 else (None, "")
        if why:
            return None
        value = None if stamp is None else stamp.validation().get(self.job.stage.select_metric)
        return None if stamp is None or value is None else {"value": value, "step": stamp.step or 0}

    def _save(self, folder: Path, stamp: dict[str, Any]) -> None:
        save_model(self.engine, self.tokenizer, folder, self.job, stamp)
