"""Seconds of an optimizer step: matrix products at an assumed MFU, memory traffic, and collectives that nothing hides.

The network has two levels. An all-reduce of G bytes over n nodes of g GPUs sends 2 G (g - 1) / g over the links of a
node and 2 G / g (n - 1) / n over each GPU's share of the network; gathering or scattering alone sends half of it.
"""

from dataclasses import dataclass

from dmpo_dist.planning.flops import Shape, forward_flops, shared_work, unshared_work
from dmpo_dist.planning.gpus import Gpu
from dmpo_dist.planning.memory import WIDTHS, Zero
from dmpo_dist.planning.model import Row, Sizes

OPTIMIZER_TRAFFIC = 28
"""Bytes that AdamW moves for each parameter: reads weight, gradient and two moments, writes weight and moments, in fp32."""
PCIE = 25e9
"""Assumed bytes/s between a GPU and host memory."""
HOST_TRAFFIC = 2e10
"""Assumed bytes/s of host memory that one rank's AdamW gets."""


@dataclass(frozen=True)
class Part:
    """A share of a step's seconds and how it comes about."""

    name: str
    numbers: str
    seconds: float


@dataclass(frozen=True)
class Network:
    """``nodes`` of ``per_node`` devices."""

    gpu: Gpu
    nodes: int
    per_node: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.per_node

    def gather_seconds(self, size: float) -> float:
        """All-gather to, or reduce-scatter of, ``size`` bytes on every rank."""
        g, n = self.per_node, self.nodes
        return size * (g - 1) / g / self.gpu.intra + size / g * (n - 1) / n / self.gpu.inter

    def all_reduce_seconds(self, size: float) -> float:
        """All-reduce of ``size`` bytes."""
        return 2 * self.gather_seconds(size)


@dataclass(frozen=True)
class Step:
    """What an optimizer step of a rank is made of.

    Attributes:
        row: a micro-batch; ``micro_batches`` of them, ``groups`` groups on this rank.
        full: whether all weights are trained.
        reference: whether the frozen reference runs in the step.
        recompute: whether layers run again in the backward pass.
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

    @property
    def width(self) -> int:
        """b, bytes of a weight."""
        return WIDTHS[self.dtype]

    def flops(self) -> dict[str, float]:
        """FLOPs of a group by pass; the backward pass computes the head's logits again."""
        lengths = (self.row.prompt, self.row.response, self.row.negatives)
        f = forward_flops(self.shape, shared_work(*lengths) if self.row.shared else unshared_work(*lengths))
        plain = f.linear + f.attention + f.head
        adapters = 0 if self.full else f.adapters
        times = 2 if self.full else 1  # frozen weights need the gradient of their input alone
        return {
            "reference": plain if self.reference else 0,
            "forward": plain + adapters,
            "backward": times * (f.linear + f.head) + 2 * (adapters + f.attention) + f.head,
            "recomputation": f.linear + f.attention + adapters if self.recompute else 0,
        }

    def parts(self, network: Network) -> list[Part]:
        """The seconds of a step, one after the other."""
        gpu, s = network.gpu, self.sizes
        peak = gpu.peak(self.dtype)
        out = []
        for name, flops in self.flops().items():
            seconds = flops * self.groups / (peak * gpu.mfu)
            if flops:
                numbers = (
                    f"{flops / 1e9:.4g} GFLOP x {self.groups:g} groups / ({peak / 1e12:g} TFLOP/s x MFU {gpu.mfu})"
                )
                out.append(Part(name, numbers, seconds))
        if self.nf4:
            passes = 2 + self.reference + self.recompute
            moved = s.linear * (0.53 + 2 * self.width) * passes * self.micro_batches
            out.append(
                Part("dequantization", f"{moved / 1e9:.1f} GB / {gpu.bandwidth / 1e9:.0f} GB/s", moved / gpu.bandwidth)
            )
        shard = s.trainable / (1 if self.zero.stage == 0 else network.world_size)
        moved = OPTIMIZER_TRAFFIC * shard
        if self.zero.offload_optimizer:
            seconds = moved / HOST_TRAFFIC + 2 * self.width * shard / PCIE
            numbers = f"{moved / 1e9:.3g} GB / {HOST_TRAFFIC / 1e9:.0f} GB/s of host memory + PCIe"
            out.append(Part("optimizer, offloaded", numbers, seconds))
        else:
            out.append(
                Part("optimizer", f"{moved / 1e9:.3g} GB / {gpu.bandwidth / 1e9:.0f} GB/s", moved / gpu.bandwidth)
            )
        return out + self._collectives(network)

    def _collectives(self, network: Network) -> list[Part]:
        if network.world_size == 1 and not self.zero.offload_param:
            return []
        gradients, weights = self.width * self.sizes.trainable, self.width * self.sizes.total
        parts = []
        reductions = 1 if self.zero.stage == 0 else self.micro_batches  # ZeRO 1 to 3 reduce in every backward pass
        where = f"over {network.nodes} x {network.per_node}"
        if self.zero.stage < 3:
            seconds = network.all_reduce_seconds(gradients) * reductions
            parts.append(Part("gradient all-reduce", f"{reductions} x {gradients / 1e9:.3g} GB {where}", seconds))
            if self.zero.stage:
                parts.append(
                    Part(
                        "all-gather of updated weights",
                        f"{gradients / 1e9:.3g} GB {where}",
                        network.gather_seconds(gradients),
                    )
                )
            return parts
        seconds = network.gather_seconds(gradients) * reductions
        parts.append(Part("gradient reduce-scatter", f"{reductions} x {gradients / 1e9:.3g} GB {where}", seconds))
        gathers = (2 + self.reference + self.recompute) * self.micro_batches
        seconds = network.gather_seconds(weights) * gathers
        if self.zero.offload_param:
            seconds += gathers * weights / network.world_size / PCIE
        parts.append(Part("weights gathered", f"{gathers} x {weights / 1e9:.3g} GB {where}", seconds))
        return parts
