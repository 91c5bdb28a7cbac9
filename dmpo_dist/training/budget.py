"""The largest token budget that fits, found by running a few rows before training.

Memory of a row grows in proportion to its tokens, so two short rows give the slope; the budget it predicts is then run
once and halved until it fits. The rows are weighted with 0, like fillers, so they leave no trace in the gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
import torch.distributed as dist

from dmpo_dist.batching.layout import group_cost, lay_out
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.memory import peak_bytes, reset_peak, trim

PROBES = (1024, 2048)
"""Tokens of the two rows that give the slope."""
LIMITS = {"cpu": 8192, "cuda": 65536}
"""Longer rows are not faster."""
SHARE = 0.8
"""Of the free memory; the rest is for fragmentation and for what the optimizer allocates in its first step."""
STEP = 256


@dataclass(frozen=True)
class Probe:
    """Runs rows of groups through forward and backward.

    Attributes:
        engine: the training engine; its module takes a layout.
        groups: groups as they are trained on, from which rows are filled, the largest first.
        shared: whether prompts are shared.
        with_reference: whether a step also runs the reference in the engine's module.
        device: where.
    """

    engine: Any
    groups: Sequence[TokenGroup]
    shared: bool
    with_reference: bool
    device: torch.device

    def largest_budget(self) -> int:
        """Tokens; the same on every rank, which all take part.

        Raises:
            UserError: not even the largest group fits.
        """
        largest = max(group_cost(group, self.shared).tokens for group in self.groups)
        budget = max(largest, self._predicted(*(max(tokens, largest) for tokens in PROBES)))
        while not self._fits(budget):
            if budget == largest:
                raise UserError(
                    f"a preference group of {largest} tokens does not fit into memory; lower the number of negatives, "
                    "model.max_length or data.max_history, set model.gradient_checkpointing=true, or use more GPUs "
                    "with deepspeed=zero3"
                )
            budget = max(largest, budget // 2 // STEP * STEP)
        return budget

    def _predicted(self, small: int, large: int) -> int:
        """The budget that memory, taken as linear between rows of ``small`` and ``large`` tokens, leaves room for."""
        if not (self._fits(small) and self._fits(large)):  # the first forward also allocates what stays
            return small
        slope = (self._peak(large) - self._peak(small)) / max(1, large - small)
        limit = LIMITS[self.device.type]
        room = self._agreed(SHARE * self._free() / slope if slope > 0 else limit)
        return min(limit, int(room) // STEP * STEP)

    def _fits(self, tokens: int) -> bool:
        """Whether a row of ``tokens`` runs on every rank."""
        try:
            self._run(tokens)
            fits = 1
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            fits = 0
        return self._agreed(fits) == 1

    def _peak(self, tokens: int) -> int:
        """Bytes held at most while a row of ``tokens`` runs, on the rank that needs most."""
        reset_peak(self.device)
        self._run(tokens)
        return int(-self._agreed(-peak_bytes(self.device)))

    def _run(self, tokens: int) -> None:
        row = lay_out(self._row(tokens), self.shared).to(self.device)
        if self.with_reference:
            with torch.no_grad():
                self.engine(row, "reference")
        self.engine.backward(self.engine(row).sum() * 0.0, scale_wrt_gas=False)

    def _row(self, tokens: int) -> list[TokenGroup]:
        """The largest groups, over and over, that fill ``tokens``."""
        by_size = sorted(self.groups, key=lambda group: -group_cost(group, self.shared).tokens)[:64]
        row, filled = [by_size[0]], group_cost(by_size[0], self.shared).tokens
        for group in (by_size * (tokens // max(1, len(by_size)) + 1))[1:]:
            filled += group_cost(group, self.shared).tokens
            if filled > tokens:
                break
            row.append(group)
        return row

    def _free(self) -> int:
        """Bytes this rank may still allocate."""
        if self.device.type == "cuda":
            unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            return torch.cuda.mem_get_info(self.device)[0] + unused
        trim()
        return psutil.virtual_memory().available // dist.get_world_size()

    def _agreed(self, value: float) -> float:
        """The smallest value over all ranks."""
        box = torch.tensor(float(value), dtype=torch.float64, device=self.device)
        dist.all_reduce(box, dist.ReduceOp.MIN)
        return box.item()
