"""The table of devices: figures of their data sheets, and the share of the peak that a training step should reach."""

import difflib
from dataclasses import dataclass

import psutil

from dmpo_dist.errors import UserError
from dmpo_dist.planning.network import Link, Network

GB, MIB = 10**9, 2**20
CPU_PEAK = 1e11
"""Assumed fp32 FLOP/s of one CPU rank; machines differ by a factor of ten."""
WIDE = 4096
"""Hidden size from which a GPU is assumed to reach its ``mfu``; narrower models reach less in proportion, as small
products leave it idle. On an H200 (0.40) uncompiled steps reached 0.37 to 0.40 at 4096 and 0.16 to 0.26 at 2048."""
NODE_LATENCY, FABRIC_LATENCY = 3e-6, 10e-6
"""Assumed seconds per message within a node and between nodes."""


@dataclass(frozen=True)
class Gpu:
    """One device.

    Attributes:
        sheet: its name on the data sheet, which is a part of the name that its driver reports.
        bf16: dense FLOP/s in bf16.
        fp32: FLOP/s in fp32, without tensor cores.
        memory: bytes, as the driver reports them.
        bandwidth: bytes/s of its memory.
        intra: bytes/s to the other devices of its node, in one direction.
        inter: bytes/s of its share of the node's network, in one direction.
        mfu: assumed share of the peak that a step of a model as wide as ``WIDE`` reaches.
    """

    sheet: str
    bf16: float
    fp32: float
    memory: int
    bandwidth: float
    intra: float
    inter: float
    mfu: float

    @property
    def cuda(self) -> bool:
        """Whether it is a GPU."""
        return self.sheet != "CPU"

    def peak(self, dtype: str) -> float:
        """Dense peak FLOP/s in ``dtype``."""
        return self.fp32 if dtype == "float32" else self.bf16

    def mfu_at(self, hidden: int) -> float:
        """The share of the peak that is assumed for a model of this hidden size."""
        return self.mfu * min(1.0, hidden / WIDE) if self.cuda else self.mfu

    def network(self, per_node: int) -> Network:
        """The network of nodes with ``per_node`` such devices."""
        return Network(Link(NODE_LATENCY, self.intra), Link(FABRIC_LATENCY, self.inter), per_node)


# Peaks, memory bandwidth and NVLink (halved: the sheets add up both directions) from NVIDIA's data sheets
# "A100 Tensor Core GPU", "H100 Tensor Core GPU" (SXM and PCIe), "H200 Tensor Core GPU" (SXM), "HGX B200", "L40S", "L4",
# "A10"; GeForce RTX 4090 from its product page and the Ada white paper. Without NVLink: PCIe x16, 32 GB/s for version
# 4.0, 64 GB/s for 5.0. The network of A100, H100, H200 and B200 is the one of NVIDIA's own systems: DGX A100 200
# Gbit/s, the others 400 Gbit/s for each GPU. The rest is assumed, for eight GPUs: two ports of 200 Gbit/s for L40S and
# H100 PCIe, one of 100 for L4 and A10, one of 25 for RTX 4090.
GPUS = {
    "a10-24g": Gpu("A10", 125e12, 31.2e12, 23028 * MIB, 600 * GB, 32 * GB, 1.5625 * GB, 0.40),
    "l4-24g": Gpu("L4", 121e12, 30.3e12, 23034 * MIB, 300 * GB, 32 * GB, 1.5625 * GB, 0.40),
    "a100-40g": Gpu("A100", 312e12, 19.5e12, 40536 * MIB, 1555 * GB, 300 * GB, 25 * GB, 0.45),
    "a100-80g": Gpu("A100", 312e12, 19.5e12, 81251 * MIB, 2039 * GB, 300 * GB, 25 * GB, 0.45),
    "h100-80g": Gpu("H100", 989e12, 67e12, 81559 * MIB, 3350 * GB, 450 * GB, 50 * GB, 0.40),
    "h100-pcie-80g": Gpu("H100 PCIe", 756e12, 51.2e12, 81559 * MIB, 2000 * GB, 64 * GB, 6.25 * GB, 0.40),
    "h200-141g": Gpu("H200", 989e12, 67e12, 143771 * MIB, 4800 * GB, 450 * GB, 50 * GB, 0.40),
    "b200-180g": Gpu("B200", 2250e12, 80e12, 183359 * MIB, 7700 * GB, 900 * GB, 50 * GB, 0.35),
    "l40s-48g": Gpu("L40S", 362e12, 91.6e12, 46068 * MIB, 864 * GB, 32 * GB, 6.25 * GB, 0.40),
    "rtx4090-24g": Gpu("RTX 4090", 165e12, 82.6e12, 24564 * MIB, 1008 * GB, 32 * GB, 0.39 * GB, 0.45),
}
CPU = "cpu"


def find_gpu(name: str, per_node: int) -> Gpu:
    """The device called ``name``; ``cpu`` is one rank's share of this machine.

    Raises:
        UserError: it is not in the table; the message suggests the nearest name.
    """
    if name == CPU:
        memory = psutil.virtual_memory().total // per_node
        return Gpu("CPU", CPU_PEAK, CPU_PEAK, memory, 10 * GB, 2 * GB, 1.25 * GB, 0.5)
    if name in GPUS:
        return GPUS[name]
    known = [*GPUS, CPU]
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.0)[0]
    raise UserError(f"--gpu {name} is not in the table; the nearest is {near}; known are {', '.join(known)}")


def known_peak(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by the name that its driver reports; None for one that is not in the table."""
    matches = [gpu for gpu in GPUS.values() if gpu.sheet in device_name]
    return max(matches, key=lambda gpu: len(gpu.sheet)).bf16 if matches else None  # "L4" is also in "L40S"
