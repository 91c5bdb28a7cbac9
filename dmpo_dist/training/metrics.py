"""Sums on the device, reduced over ranks only when a line is due."""

from collections import Counter
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


class Meter:
    """Adds up dicts of scalars without synchronising, then reduces them over all ranks at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_device: dict[tuple[str, ...], Tensor] = {}
        self._counts: Counter[str] = Counter()

    def update(self, sums: Mapping[str, Tensor], counts: Mapping[str, int]) -> None:
        """Add ``sums``, scalar tensors on the device, and ``counts``, plain numbers that never leave the host."""
        names = tuple(sums)
        values = torch.stack([value.double() for value in sums.values()])
        self._on_device[names] = self._on_device[names] + values if names in self._on_device else values
        self._counts.update(counts)

    def reduce(self, names: tuple[str, ...], own: float) -> tuple[dict[str, float], list[float]]:
        """Sums of ``names`` over all ranks since the last call, and every rank's ``own``, by one all-reduce and one copy
        to the host; every rank calls it with the same names, also one that has seen nothing."""
        counts = [float(self._counts[name]) for name in names]
        ranks = [own if rank == dist.get_rank() else 0.0 for rank in range(dist.get_world_size())]
        packed = torch.tensor(counts + ranks, dtype=torch.float64, device=self._device)
        for seen, values in self._on_device.items():
            packed[[names.index(name) for name in seen if name in names]] += values[
                [i for i, name in enumerate(seen) if name in names]
            ]
        dist.all_reduce(packed)
        self._on_device, self._counts = {}, Counter()
        values = packed.tolist()
        return dict(zip(names, values[: len(names)], strict=True)), values[len(names) :]
