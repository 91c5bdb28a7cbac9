"""The time of a step's collectives on a two-level network: fast links within a node, slower ones between nodes.

Costs follow the alpha-beta model (Thakur et al., doi 10.1177/1094342005051521): a message of b bytes over a link takes
latency + b / bandwidth. Sizes are those of the whole tensor, not of a rank's part. Both ``dmpo plan`` and ``dmpo bench
simulate`` use this module.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """A link of one GPU: ``latency`` in seconds per message, ``bandwidth`` in bytes per second in each direction."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Network:
    """Nodes of ``gpus_per_node`` GPUs.

    Attributes:
        node: the link between GPUs of a node.
        fabric: a GPU's share of the links between nodes.
        gpus_per_node: GPUs of a node.
        trees: whether an all-reduce may use trees, as NCCL's do; else every collective uses a ring, as gloo's do.
    """

    node: Link
    fabric: Link
    gpus_per_node: int
    trees: bool = True

    def all_gather(self, size: float, gpus: int) -> float:
        """Seconds until every GPU has the whole tensor of ``size`` bytes, of which each held 1/gpus.

        First each GPU gathers one part of the tensor from the GPUs with the same local rank in the other nodes; then
        the GPUs of a node exchange these parts.
        """
        local, nodes = self._split(gpus)
        return _ring(size / local, nodes, self.fabric) + _ring(size, local, self.node)

    def reduce_scatter(self, size: float, gpus: int) -> float:
        """Seconds until every GPU has its 1/gpus of the sum: the messages of ``all_gather`` in reverse order."""
        return self.all_gather(size, gpus)

    def all_reduce(self, size: float, gpus: int) -> float:
        """Seconds until every GPU has the whole sum.

        Within a node it is a reduce-scatter and an all-gather; between nodes a ring or trees, whichever is faster.
        """
        local, nodes = self._split(gpus)
        between = 2 * _ring(size / local, nodes, self.fabric)
        if self.trees:
            between = min(between, _tree(size / local, nodes, self.fabric))
        return 2 * _ring(size, local, self.node) + between

    def _split(self, gpus: int) -> tuple[int, int]:
        """GPUs per node that take part, and nodes."""
        return min(gpus, self.gpus_per_node), math.ceil(gpus / self.gpus_per_node)


@dataclass(frozen=True)
class Collective:
    """One kind of collective in an optimizer step: it runs ``times`` times, each with ``size`` bytes in ``seconds``."""

    name: str
    times: float
    size: float
    seconds: float


def step_collectives(
    network: Network,
    gpus: int,
    zero: int,
    gradients: float,
    weights: float,
    micro_batches: float,
    passes: int,
    modules: int,
) -> list[Collective]:
    """The collectives of one optimizer step as DeepSpeed 0.19 runs it with ``managed_gradient_accumulation`` off.

    Args:
        network: the links.
        gpus: number of ranks.
        zero: ZeRO stage.
        gradients: bytes of all gradients, which are sent in the dtype of the weights.
        weights: bytes of all weights.
        micro_batches: number of micro-batches of a rank in the step.
        passes: how often a micro-batch needs the weights: reference, forward, recomputation, backward.
        modules: number of layers, embedding and head, which stage 3 gathers one by one.
    """
    if zero == 0:
        return [Collective("gradient all-reduce", 1, gradients, network.all_reduce(gradients, gpus))]
    if zero < 3:
        # Stage 1 adds gradients up on the rank and reduces them in step(); stage 2 keeps only its part of them and so
        # reduces in every backward pass. Both all-reduce whole buckets (use_multi_rank_bucket_allreduce).
        reductions = micro_batches if zero == 2 else 1
        return [
            Collective("gradient all-reduce", reductions, gradients, network.all_reduce(gradients, gpus)),
            Collective("all-gather of updated weights", 1, gradients, network.all_gather(gradients, gpus)),
        ]
    gather = modules * network.all_gather(weights / modules, gpus)
    return [
        Collective("gradient reduce-scatter", micro_batches, gradients, network.reduce_scatter(gradients, gpus)),
        Collective("weights gathered", passes * micro_batches, weights, gather),
    ]


def _ring(size: float, members: int, link: Link) -> float:
    """All-gather or reduce-scatter around a ring: members - 1 messages of 1/members each."""
    return (members - 1) * (link.latency + size / members / link.bandwidth)


def _tree(size: float, members: int, link: Link) -> float:
    """All-reduce up and down two pipelined binary trees (Sanders et al., doi 10.1016/j.parco.2009.09.001)."""
    return 2 * math.ceil(math.log2(members)) * link.latency + 2 * size / link.bandwidth if members > 1 else 0.0
