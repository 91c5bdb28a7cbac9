"""What an accelerator has, from its maker's data sheet, and what a training step is assumed to make of it."""

import difflib
from dataclasses import dataclass

import psutil

from dmpo_dist.errors import UserError
from dmpo_dist.planning.flops import known_peak

GB, MIB = 10**9, 2**20
CPU_PEAK = 1e11
"""Assumed fp32 FLOP/s of the cores behind one CPU rank; machines differ by ten times."""


@dataclass(frozen=True)
class Gpu:
    """One device.

    Attributes:
        sheet: its name in ``planning.flops``, which holds the dense bf16 FLOP/s.
        fp32: FLOP/s in fp32, without tensor cores.
        memory: bytes, as the driver reports them.
        bandwidth: of its memory, bytes/s.
        intra: to the others in its node, bytes/s in one direction.
        inter: its share of its node's network, bytes/s in one direction.
        mfu: assumed share of the peak that matrix products of a step reach.
    """

    sheet: str
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
        """Dense FLOP/s in a type."""
        return self.fp32 if dtype == "float32" or not self.cuda else known_peak(self.sheet) or self.fp32


# Memory bandwidth and NVLink (given there for both directions together, halved here) from NVIDIA's data sheets "A100
# Tensor Core GPU", "H100 Tensor Core GPU" (SXM), "H200 Tensor Core GPU" (SXM), "HGX B200", "L40S"; GeForce RTX 4090 from
# its product page and the Ada white paper. Without NVLink: PCIe 4.0 x16, 32 GB/s. The network is the one of NVIDIA's own
# systems: DGX A100 200 Gbit/s, DGX H100, H200 and B200 400 Gbit/s for each GPU; for L40S two ports of 200 Gbit/s for
# eight GPUs and for RTX 4090 one of 25 Gbit/s for eight are assumed.
GPUS = {
    "a100-40g": Gpu("A100", 19.5e12, 40536 * MIB, 1555 * GB, 300 * GB, 25 * GB, 0.45),
    "a100-80g": Gpu("A100", 19.5e12, 81251 * MIB, 2039 * GB, 300 * GB, 25 * GB, 0.45),
    "h100-80g": Gpu("H100", 67e12, 81559 * MIB, 3350 * GB, 450 * GB, 50 * GB, 0.40),
    "h200-141g": Gpu("H200", 67e12, 143771 * MIB, 4800 * GB, 450 * GB, 50 * GB, 0.40),
    "b200-180g": Gpu("B200", 80e12, 183359 * MIB, 7700 * GB, 900 * GB, 50 * GB, 0.35),
    "l40s-48g": Gpu("L40S", 91.6e12, 46068 * MIB, 864 * GB, 32 * GB, 6.25 * GB, 0.40),
    "rtx4090-24g": Gpu("RTX 4090", 82.6e12, 24564 * MIB, 1008 * GB, 32 * GB, 0.39 * GB, 0.45),
}
CPU = "cpu"


def find_gpu(name: str, per_node: int) -> Gpu:
    """The device called ``name``; ``cpu`` is a rank's share of this machine.

    Raises:
        UserError: not in the table; names the nearest.
    """
    if name == CPU:
        return Gpu("CPU", CPU_PEAK, psutil.virtual_memory().total // per_node, 10 * GB, 2 * GB, 1.25 * GB, 0.5)
    if name in GPUS:
        return GPUS[name]
    known = [*GPUS, CPU]
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.0)[0]
    raise UserError(f"--gpu {name} is not in the table; the nearest is {near}; known are {', '.join(known)}")
