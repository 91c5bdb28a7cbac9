"""A model of training on N GPUs that can fail: throughput, efficiency, goodput, checkpoint interval.

The time of a step is the computing time of the slowest GPU plus the part of the collectives that does not overlap with
computing. ``calibrate`` fits the constants of this model to measured steps; otherwise they are assumptions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar, nnls
from scipy.stats import norm

from dmpo_dist.planning.network import Link, Network, step_collectives

PASSES = 3  # reference, forward, backward
FEATURES = ("flops", "micro_batches", "gathers", "messages", "bytes")


@dataclass(frozen=True)
class Workload:
    """One rank's part of an optimizer step.

    Attributes:
        flops: FLOPs of reference, policy and backward (``planning.flops.step_flops``).
        groups: preference groups of one rank.
        micro_batches: micro-batches of one rank.
        parameters, trained: numbers of all parameters of the model, and of those with gradients.
        parameter_bytes: bytes of a parameter as stored, and of its gradient as sent.
        layers: decoder layers; ZeRO-3 gathers them one by one.
        zero: ZeRO stage.
    """

    flops: float
    groups: float
    micro_batches: float
    parameters: float
    trained: float
    parameter_bytes: float
    layers: int
    zero: int

    @property
    def gathers(self) -> float:
        """Modules gathered in a step under ZeRO-3."""
        return PASSES * self.micro_batches * (self.layers + 2) if self.zero == 3 else 0.0

    def communication(self, network: Network, gpus: int) -> float:
        """Seconds in collectives, without any overlap."""
        gradients, weights = self.trained * self.parameter_bytes, self.parameters * self.parameter_bytes
        parts = step_collectives(
            network, gpus, self.zero, gradients, weights, self.micro_batches, PASSES, self.layers + 2
        )
        return sum(part.times * part.seconds for part in parts)


@dataclass(frozen=True)
class Machine:
    """The assumed properties of a GPU and its cluster.

    Attributes:
        flops_per_second: FLOP/s that a GPU achieves, not its peak.
        overhead: seconds that a micro-batch takes in addition to its FLOPs.
        network: the links.
        overlap: share of the collectives that overlaps with computing.
        jitter: standard deviation / mean of a GPU's computing time; the step waits for the slowest GPU.
        failure_hours: mean hours between failures of one GPU (with its share of the node).
        checkpoint_seconds: seconds to write a checkpoint.
        restart_seconds: seconds from a failure until training continues.
    """

    flops_per_second: float
    overhead: float
    network: Network
    overlap: float
    jitter: float
    failure_hours: float
    checkpoint_seconds: float
    restart_seconds: float


def step_seconds(work: Workload, machine: Machine, gpus: int) -> tuple[float, float]:
    """Seconds of a step on ``gpus`` GPUs, and those of them in collectives that do not overlap with computing."""
    computing = work.flops / machine.flops_per_second + machine.overhead * work.micro_batches
    # The approximate expectation of the largest of ``gpus`` standard normal variables (Blom, 1958).
    latest = float(norm.ppf((gpus - 0.375) / (gpus + 0.25))) if gpus > 1 else 0.0
    slowest = computing * (1 + machine.jitter * latest)
    collectives = work.communication(machine.network, gpus)
    # Collectives cannot overlap with more than all of the computing.
    exposed = max(collectives * (1 - machine.overlap), collectives - computing)
    return slowest + exposed, exposed


def simulate(work: Workload, machine: Machine, counts: Sequence[int]) -> list[dict[str, Any]]:
    """Weak scaling: a row for each number of GPUs in ``counts``.

    Keys: ``gpus``, ``step_seconds``, ``groups_per_second``, ``efficiency`` (a GPU's throughput / that of a single GPU),
    ``communication_share``, ``checkpoint_interval`` (the best one, in seconds), ``goodput`` (share of the time that is
    spent on training and not lost) and ``useful_groups_per_second`` (throughput times goodput).
    """
    alone, _ = step_seconds(work, machine, 1)
    rows = []
    for gpus in counts:
        seconds, exposed = step_seconds(work, machine, gpus)
        between_failures = machine.failure_hours * 3600 / gpus
        interval = best_interval(machine.checkpoint_seconds, machine.restart_seconds, between_failures)
        kept = goodput(interval, machine.checkpoint_seconds, machine.restart_seconds, between_failures)
        rows.append(
            {
                "gpus": gpus,
                "step_seconds": seconds,
                "groups_per_second": work.groups * gpus / seconds,
                "efficiency": alone / seconds,
                "communication_share": exposed / seconds,
                "checkpoint_interval": interval,
                "goodput": kept,
                "useful_groups_per_second": work.groups * gpus / seconds * kept,
            }
        )
    return rows


def goodput(interval: float, checkpoint: float, restart: float, between_failures: float) -> float:
    """Share of the time spent on work that no failure undoes, with a checkpoint every ``interval`` seconds.

    Failures are a Poisson process, also during checkpoints and restarts. The expected time for an interval is
    M exp(R / M) (exp((interval + C) / M) - 1) (Daly, doi 10.1016/j.future.2004.11.016, equation 13).
    """
    mean = between_failures
    if (interval + checkpoint + restart) / mean > 500:  # exp would overflow: nothing is ever finished
        return 0.0
    return interval / (mean * math.exp(restart / mean) * math.expm1((interval + checkpoint) / mean))


def best_interval(checkpoint: float, restart: float, between_failures: float) -> float:
    """Seconds of work between checkpoints that maximise ``goodput``, found by a search; ``daly_interval`` is close."""
    found = minimize_scalar(
        lambda log: -goodput(math.exp(log), checkpoint, restart, between_failures),
        bounds=(math.log(between_failures) - 20, math.log(between_failures) + 2),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return math.exp(float(found.x))


def young_interval(checkpoint: float, between_failures: float) -> float:
    """Young's first-order optimum, sqrt(2 C M) (doi 10.1145/361147.361115)."""
    return math.sqrt(2 * checkpoint * between_failures)


def daly_interval(checkpoint: float, between_failures: float) -> float:
    """Daly's higher-order optimum (same paper as ``goodput``, equation 37)."""
    if checkpoint >= 2 * between_failures:
        return between_failures
    ratio = checkpoint / (2 * between_failures)
    return young_interval(checkpoint, between_failures) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - checkpoint


@dataclass(frozen=True)
class Calibration:
    """Constants fitted to measured steps.

    Attributes:
        coefficients: seconds per FLOP, micro-batch, gathered module, message and byte.
        fitted: seconds of each step by the fit.
        held_out: seconds of each step by a fit to all other steps.
    """

    coefficients: dict[str, float]
    fitted: list[float]
    held_out: list[float]


def calibrate(works: Sequence[Workload], gpus: Sequence[int], seconds: Sequence[float]) -> Calibration:
    """Fit the model to measured steps by non-negative least squares of the relative errors.

    Args:
        works, gpus, seconds: the work, number of GPUs and time of each measured step. Steps ran on a flat network with
            rings, without overlap.
    """
    features = np.array([_features(work, n) for work, n in zip(works, gpus, strict=True)])  # (steps, features)
    measured = np.asarray(seconds, dtype=float)

    def fit(keep: np.ndarray) -> np.ndarray:
        # (steps, features) divided by the measured times: the target is then 1 for every step and errors are relative.
        # Columns are scaled to at most 1, as there are 1e10 times as many FLOPs as messages.
        rows = features[keep] / measured[keep, None]
        scale = np.where(rows.any(axis=0), np.abs(rows).max(axis=0), 1.0)
        return nnls(rows / scale, np.ones(len(rows)))[0] / scale

    everything = np.ones(len(measured), dtype=bool)
    coefficients = fit(everything)
    held_out = [float(features[i] @ fit(np.arange(len(measured)) != i)) for i in range(len(measured))]
    return Calibration(
        dict(zip(FEATURES, map(float, coefficients), strict=True)), (features @ coefficients).tolist(), held_out
    )


def _features(work: Workload, gpus: int) -> list[float]:
    """The factor of each constant.

    ``communication`` is linear in latency and in 1 / bandwidth, so with one of them 1 and the other 0 it counts
    messages or bytes.
    """
    messages = work.communication(_flat(Link(1.0, math.inf)), gpus)
    size = work.communication(_flat(Link(0.0, 1.0)), gpus)
    return [work.flops, work.micro_batches, work.gathers, messages, size]


def _flat(link: Link) -> Network:
    return Network(link, link, gpus_per_node=1, trees=False)
