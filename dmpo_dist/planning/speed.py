"""Seconds of an optimizer step: matrix products at an assumed MFU, memory traffic, and collectives without overlap."""

from dataclasses import dataclass, replace

from dmpo_dist.planning.flops import Shape, forward_flops, shared_work, unshared_work
from dmpo_dist.planning.gpus import Gpu
from dmpo_dist.planning.memory import WIDTHS, Zero
from dmpo_dist.planning.model import Row, Sizes
from dmpo_dist.planning.network import step_collectives

OPTIMIZER_TRAFFIC = 28
"""Bytes that AdamW moves per parameter: reads weight, gradient and two moments, writes weight and moments, in fp32."""
PCIE = 25e9
"""Assumed bytes/s between a GPU and host memory."""
HOST_TRAFFIC = 2e10
"""Assumed bytes/s of host memory that one rank's AdamW gets."""


@dataclass(frozen=True)
class Duration:
    """A part of a step's time, and the numbers it is computed from."""

    name: str
    numbers: str
    seconds: float


@dataclass(frozen=True)
class OptimizerStep:
    """Everything that the time of a rank's optimizer step depends on.

    Attributes:
        row: a micro-batch; the rank runs ``micro_batches`` of them, with ``groups`` groups in all.
        full: whether all weights are trained.
        reference: whether the frozen reference runs in the step.
        recompute: whether layers run again in the backward pass.
        beams: width of the search for negatives that each group goes through; 0 where there is none.
    """

    shape: Shape
    sizes: Sizes
    zero: Zero
    row: Row
    micro_batches: int
    groups: float
    full: bool
    reference: bool
    recompute: bool
    nf4: bool
    dtype: str
    beams: int = 0

    @property
    def passes(self) -> int:
        """How often a micro-batch needs the weights: forward and backward, and reference and recomputation if any."""
        return 2 + self.reference + self.recompute

    def flops(self) -> dict[str, float]:
        """FLOPs of a group by pass; the backward pass computes the head's logits again."""
        lengths = (self.row.prompt, self.row.response, self.row.negatives)
        work = shared_work(*lengths) if self.row.shared else unshared_work(*lengths)
        f = forward_flops(self.shape, replace(work, head_rows=work.head_rows + self.row.scored))
        plain = f.linear + f.attention + f.head
        adapters = 0 if self.full else f.adapters
        times = 2 if self.full else 1  # frozen weights need the gradient of their input alone
        return {
            "search": self._search_flops(),
            "reference": plain if self.reference else 0,
            "forward": plain + adapters,
            "backward": times * (f.linear + f.head) + 2 * (adapters + f.attention) + f.head,
            "recomputation": f.linear + f.attention + adapters if self.recompute else 0,
        }

    def _search_flops(self) -> int:
        """FLOPs of a group's beam search: its prompt, and as many responses as there are beams, each token once."""
        if not self.beams:
            return 0
        f = forward_flops(self.shape, shared_work(self.row.prompt, self.row.response, self.beams - 1))
        return f.linear + f.attention + f.head + (0 if self.full else f.adapters)

    def durations(self, gpu: Gpu, nodes: int, per_node: int) -> list[Duration]:
        """The parts of a step's time on ``nodes`` nodes of ``per_node`` devices; they run one after the other."""
        peak, world, width = gpu.peak(self.dtype), nodes * per_node, WIDTHS[self.dtype]
        mfu = gpu.mfu_at(self.shape.hidden)
        rate = f"({peak / 1e12:g} TFLOP/s x MFU {mfu:.2g})"
        out = [
            Duration(
                name,
                f"{flops / 1e9:.4g} GFLOP x {self.groups:g} groups / {rate}",
                flops * self.groups / (peak * mfu),
            )
            for name, flops in self.flops().items()
            if flops
        ]
        if self.nf4:
            moved = self.sizes.linear * (0.53 + 2 * width) * self.passes * self.micro_batches
            numbers = f"{moved / 1e9:.1f} GB / {gpu.bandwidth / 1e9:.0f} GB/s"
            out.append(Duration("dequantization", numbers, moved / gpu.bandwidth))
        shard = self.sizes.trainable / (1 if self.zero.stage == 0 else world)
        moved = OPTIMIZER_TRAFFIC * shard
        if self.zero.offload_optimizer:
            seconds = moved / HOST_TRAFFIC + 2 * width * shard / PCIE
            numbers = f"{moved / 1e9:.3g} GB / {HOST_TRAFFIC / 1e9:.0f} GB/s of host memory + PCIe"
            out.append(Duration("optimizer, offloaded", numbers, seconds))
        else:
            numbers = f"{moved / 1e9:.3g} GB / {gpu.bandwidth / 1e9:.0f} GB/s"
            out.append(Duration("optimizer", numbers, moved / gpu.bandwidth))
        if world > 1 or self.zero.offload_param:
            out += self._collectives(gpu, nodes, per_node, width)
        return out

    def _collectives(self, gpu: Gpu, nodes: int, per_node: int, width: int) -> list[Duration]:
        gradients, weights, modules = width * self.sizes.trainable, width * self.sizes.total, self.shape.layers + 2
        counts = (self.micro_batches, self.passes, modules)
        world, out = nodes * per_node, []
        for part in step_collectives(gpu.network(per_node), world, self.zero.stage, gradients, weights, *counts):
            seconds, times = part.seconds * part.times, f"{part.times:g} x "
            if part.name == "weights gathered" and self.zero.offload_param:
                seconds += part.times * weights / world / PCIE
            if part.name == "all-gather of updated weights":  # always one
                times = ""
            out.append(Duration(part.name, f"{times}{part.size / 1e9:.3g} GB over {nodes} x {per_node}", seconds))
        return out
