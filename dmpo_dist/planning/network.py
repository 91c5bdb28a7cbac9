"""How long collectives take on a two-level network: fast links within a node, slower ones between nodes.

Costs are the usual alpha-beta model (Thakur et al., doi 10.1177/1094342005051521): a message of b bytes over a link takes
latency + b / bandwidth. Sizes are those of the whole tensor, not of a rank's part.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """What one GPU sees: ``latency`` in seconds a message, ``bandwidth`` in bytes per second in each direction."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Network:
    """Nodes of ``gpus_per_node`` GPUs; ``node`` joins those of one, ``fabric`` is a GPU's share of the links between.

    Without ``trees`` every collective goes around a ring, as gloo's do.
    """

    node: Link
    fabric: Link
    gpus_per_node: int
    trees: bool = True

    def all_gather(self, size: float, gpus: int) -> float:
        """Seconds until every GPU has the whole tensor of ``size`` bytes, of which each held 1/gpus.

        Between nodes each GPU gathers, over its own links, the part of the tensor that belongs to its place in the
        node; then the node exchanges these parts.
        """
        local, nodes = self._split(gpus)
        return _ring(size / local, nodes, self.fabric) + _ring(size, local, self.node)

    def reduce_scatter(self, size: float, gpus: int) -> float:
        """Seconds until every GPU has its 1/gpus of the sum: the same messages as ``all_gather``, backwards."""
        return self.all_gather(size, gpus)

    def all_reduce(self, size: float, gpus: int) -> float:
        """Seconds until every GPU has the whole sum: reduce-scatter in the node, ring or tree between nodes, whichever
        is faster, and all-gather in the node."""
        local, nodes = self._split(gpus)
        between = 2 * _ring(size / local, nodes, self.fabric)
        if self.trees:
            between = min(between, _tree(size / local, nodes, self.fabric))
        return 2 * _ring(size, local, self.node) + between

    def _split(self, gpus: int) -> tuple[int, int]:
        """GPUs of a node that take part, and nodes."""
        return min(gpus, self.gpus_per_node), math.ceil(gpus / self.gpus_per_node)


def _ring(size: float, members: int, link: Link) -> float:
    """All-gather or reduce-scatter around a ring: members - 1 messages of 1/members each."""
    return (members - 1) * (link.latency + size / members / link.bandwidth)


def _tree(size: float, members: int, link: Link) -> float:
    """All-reduce by two pipelined binary trees (Sanders et al., doi 10.1016/j.parco.2009.09.001): up and down, all
    links busy."""
    return 2 * math.ceil(math.log2(members)) * link.latency + 2 * size / link.bandwidth if members > 1 else 0.0
