"""A training step on N GPUs, and what failures leave of it: throughput, efficiency, goodput, checkpoint interval.

A step is the computing of the slowest GPU and the part of the collectives that does not hide behind it. ``calibrate``
fits the constants of this model to measured steps; without that they are assumptions.
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
        flops: of reference, policy and backward (``planning.flops.step_flops``).
        groups: preference groups of one rank.
        micro_batches: how many.
        parameters, trained: of the model, and how many get gradients.
        parameter_bytes: of one parameter as stored, and of its gradient as it travels.
        layers: decoder layers; ZeRO-3 gathers each by itself.
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
        """Seconds in collectives if nothing hides them."""
        gradients, weights = self.trained * self.parameter_bytes, self.parameters * self.parameter_bytes
        parts = step_collectives(
            network, gpus, self.zero, gradients, weights, self.micro_batches, PASSES, self.layers + 2
        )
        return sum(part.times * part.seconds for part in parts)


@dataclass(frozen=True)
class Machine:
    """What is assumed of a GPU and its cluster.

    Attributes:
        flops_per_second: what a GPU achieves, not its peak.
        overhead: seconds a micro-batch costs beside its FLOPs.
        network: see there.
        overlap: share of the collectives that hides behind computing.
        jitter: standard deviation of a GPU's computing time over its mean; the step waits for the slowest.
        failure_hours: mean hours between failures of one GPU (with its share of the node).
        checkpoint_seconds, restart_seconds: to write a checkpoint; from a failure until training goes on.
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
    """Seconds of a step on ``gpus`` GPUs, and of these the exposed collectives."""
    computing = work.flops / machine.flops_per_second + machine.overhead * work.micro_batches
    # the largest of that many standard normal variables, approximately (Blom, 1958)
    latest = float(norm.ppf((gpus - 0.375) / (gpus + 0.25))) if gpus > 1 else 0.0
    slowest = computing * (1 + machine.jitter * latest)
    collectives = work.communication(machine.network, gpus)
    exposed = max(collectives * (1 - machine.overlap), collectives - computing)  # cannot hide behind more than there is
    return slowest + exposed, exposed


def simulate(work: Workload, machine: Machine, counts: Sequence[int]) -> list[dict[str, Any]]:
    """Weak scaling: for each number of GPUs ``step_seconds``, ``groups_per_second``, ``efficiency`` (a GPU's throughput
    over that of one alone), ``communication_share``, ``checkpoint_interval`` (the best, seconds), ``goodput`` (share of
    the time that is training and not lost) and ``useful_groups_per_second`` (throughput times goodput)."""
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
    """Share of the time that goes into work that no failure undoes, with a checkpoint every ``interval`` seconds.

    Failures are a Poisson process, also during checkpoints and restarts: the expected time for an interval is
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
        held_out: the same, each by a fit without that step.
    """

    coefficients: dict[str, float]
    fitted: list[float]
    held_out: list[float]


def calibrate(works: Sequence[Workload], gpus: Sequence[int], seconds: Sequence[float]) -> Calibration:
    """Fit the model to measured steps by non-negative least squares of the relative errors.

    Args:
        works, gpus, seconds: of each measured step, on a flat network of rings; nothing was hidden (``overlap`` 0).
    """
    features = np.array([_features(work, n) for work, n in zip(works, gpus, strict=True)])  # (steps, features)
    measured = np.asarray(seconds, dtype=float)

    def fit(keep: np.ndarray) -> np.ndarray:
        # rows: (steps, features), divided by the measured time, so that the target is 1 and errors are relative;
        # columns are brought to one scale, as FLOPs are 1e10 times as many as messages
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
    """What each constant is multiplied by; messages and bytes are read off ``communication`` itself."""
    messages = work.communication(_flat(Link(1.0, math.inf)), gpus)
    size = work.communication(_flat(Link(0.0, 1.0)), gpus)
    return [work.flops, work.micro_batches, work.gathers, messages, size]


def _flat(link: Link) -> Network:
    return Network(link, link, gpus_per_node=1, trees=False)
