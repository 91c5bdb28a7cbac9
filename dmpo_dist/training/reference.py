"""Reference log-probs computed once before training instead of in every step.

The reference is frozen, so one pass over the training groups gives every value a run will ask for. All ranks share the
pass; a value belongs to (group, stored candidate), so negatives that change from epoch to epoch find theirs.

``training.reference_cache`` keeps them on disk.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dmpo_dist.batching.layout import Layout
from dmpo_dist.data.schema import above_last
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.scoring import deal_for_scoring, score_micro_batches
from dmpo_dist.training.groups import candidate_columns, with_negatives
from dmpo_dist.training.reference_cache import CacheFolder, token_digest
from dmpo_dist.training.runtime import from_rank_zero

Reference = Callable[[Layout, Sequence[int], int], Tensor]
"""(layout, its groups, epoch) -> (R,) reference log-probs of its responses on the layout's device."""

BLOCK = 4096
"""Groups per block: what an interruption loses at most."""


@dataclass(frozen=True)
class ReferenceCache:
    """Reference log-probs of all training groups.

    Attributes:
        values: (n_groups, 1 + M) float32 on the CPU, the positive first, NaN where a group has fewer candidates.
        stored: for each group how many negatives the data holds, and how many responses stand above them.
        negatives: K of a step.
    """

    values: Tensor
    stored: Sequence[tuple[int, int]]
    negatives: int

    def __call__(self, layout: Layout, groups: Sequence[int], epoch: int) -> Tensor:
        """(R,) log-probs of the responses of ``groups`` with the negatives of ``epoch``, in the order of the layout."""
        stored = (self.stored[group] for group in groups)
        columns = [candidate_columns(n, self.negatives, epoch * self.negatives, above) for n, above in stored]
        rows = [g for g, of_group in zip(groups, columns, strict=True) for _ in of_group]
        values = self.values[rows, [column for of_group in columns for column in of_group]]
        return values.to(layout.input_ids.device, non_blocking=True)


@dataclass(frozen=True)
class ReferencePass:
    """What a pass needs: the reference itself, and how the ranks share the work.

    Attributes:
        log_probs: ``Layout -> (R,)`` reference log-probs; under ZeRO-3 a collective.
        negatives: K of a step.
        epochs: epochs of the run, which decides how many stored negatives are needed.
        token_budget, shared, device: how a forward is laid out.
        rank, world_size: this process among those that share the pass.
        say: prints a line on rank 0.
    """

    log_probs: Callable[[Layout], Tensor]
    negatives: int
    epochs: int
    token_budget: int
    shared: bool
    device: torch.device
    rank: int
    world_size: int
    say: Callable[[str], None]

    def run(
        self, groups: Sequence[TokenGroup], folder: Path | None = None, key: dict[str, Any] | None = None
    ) -> ReferenceCache:
        """The cache of ``groups``; every rank calls it and gets all values.

        Args:
            groups: all training groups with every stored negative.
            folder: where caches on disk live; None keeps this one in memory.
            key: all the values depend on but the token ids, JSON; names the cache in ``folder``.

        Raises:
            UserError: on every rank, if a complete cache is damaged or a log-prob is not finite.
        """
        above = [above_last(group.levels) for group in groups]
        stored = [(len(group.branches) - number, number) for group, number in zip(groups, above, strict=True)]
        needed = [replace(with_negatives(group, self.negatives * self.epochs, 0), prefix_scored=()) for group in groups]
        width = max(len(group.branches) for group in needed)
        named = {**(key or {}), "candidates": width, "groups": len(groups), "tokens": token_digest(needed)}
        cache = None if folder is None else CacheFolder(folder, named)
        blocks = [needed[start : start + BLOCK] for start in range(0, len(needed), BLOCK)]
        values = torch.cat(
            [self._block(number, block, width, cache, len(blocks)) for number, block in enumerate(blocks)]
        )
        if cache is not None and self.rank == 0:
            cache.finish(len(blocks))
        return ReferenceCache(values, stored, self.negatives)

    def _block(
        self, number: int, groups: Sequence[TokenGroup], width: int, cache: CacheFolder | None, count: int
    ) -> Tensor:
        """(len(groups), width) values, read by rank 0 where they are on disk, else computed by all."""
        if cache is not None:
            values = self._read(cache, number, (len(groups), width))
            if values is not None:
                return values
        values = self._compute(groups, width, first=number * BLOCK)
        if cache is not None and self.rank == 0:
            cache.write(number, values)
        self.say(f"reference log-probs: block {number + 1} of {count}")
        return values

    def _compute(self, groups: Sequence[TokenGroup], width: int, first: int) -> Tensor:
        """All ranks score their share of ``groups``, the run's from ``first`` on, then add up, each value being zero on
        all ranks but one."""
        values = torch.zeros(len(groups), width, dtype=torch.float64)
        own = deal_for_scoring(groups, self.world_size, self.token_budget, self.shared)[self.rank]
        for index, scores in score_micro_batches(self.log_probs, groups, own, self.shared, self.device):
            values[index, : len(scores)] = torch.from_numpy(np.asarray(scores, dtype=np.float64))
        values = values.to(self.device)
        dist.all_reduce(values)
        values = values.cpu().float()
        absent = torch.arange(width) >= torch.tensor([len(group.branches) for group in groups])[:, None]
        broken = (~torch.isfinite(values) & ~absent).any(1).nonzero()
        if len(broken):
            raise UserError(
                f"the reference gives training group {first + int(broken[0])} a log-probability that is not "
                "finite; the starting model is broken, or overflows in this dtype: try model.dtype=float32"
            )
        return values.masked_fill(absent, torch.nan)

    def _read(self, cache: CacheFolder, number: int, shape: tuple[int, int]) -> Tensor | None:
        """What rank 0 finds on disk, on every rank, and the same error on every rank."""
        found: Tensor | UserError | None = None
        if self.rank == 0:
            try:
                found = cache.read(number, shape)
            except UserError as error:
                found = error
        found = from_rank_zero(found)
        if isinstance(found, UserError):
            raise found
        return found
