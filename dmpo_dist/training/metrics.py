"""Sums on the device, reduced over ranks only when a line is due."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


class Meter:
    """Adds up dicts of scalar tensors without synchronising, then reduces them over all ranks at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}

    def update(self, sums: Mapping[str, Tensor | float]) -> None:
        """Add ``sums``; values may be tensors on the device or plain numbers."""
        for name, value in sums.items():
            if not isinstance(value, Tensor):
                value = torch.tensor(float(value), dtype=torch.float64, device=self._device)
            self._sums[name] = self._sums[name] + value.double() if name in self._sums else value.double()

    def reduce(self, names: tuple[str, ...]) -> dict[str, float]:
        """Sums of ``names`` over all ranks since the last call; every rank calls it with the same names."""
        zero = torch.zeros((), dtype=torch.float64, device=self._device)
        packed = torch.stack([self._sums.get(name, zero) for name in names])
        dist.all_reduce(packed)
        self._sums = {}
        return dict(zip(names, packed.tolist(), strict=True))
