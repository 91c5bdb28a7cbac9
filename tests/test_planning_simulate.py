"""The cost model against closed forms, a random process and its own inverse."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from dmpo_dist.planning.flops import Shape
from dmpo_dist.planning.gpus import find_gpu
from dmpo_dist.planning.memory import Zero
from dmpo_dist.planning.model import Row, Sizes
from dmpo_dist.planning.network import Link, Network, step_collectives
from dmpo_dist.planning.simulate import (
    Machine,
    Workload,
    best_interval,
    calibrate,
    daly_interval,
    goodput,
    simulate,
    step_seconds,
    young_interval,
)
from dmpo_dist.planning.speed import OptimizerStep

NETWORK = Network(node=Link(2e-6, 300e9), fabric=Link(1e-5, 40e9), gpus_per_node=8)
WORK = Workload(
    flops=1e15, groups=16, micro_batches=4, parameters=8e9, trained=8e9, parameter_bytes=2, layers=32, zero=2
)
MACHINE = Machine(4e14, 0.005, NETWORK, 0.5, 0.02, 50_000, 60, 300)


def test_collectives_have_their_closed_forms():
    size, node, fabric = 1e9, NETWORK.node, NETWORK.fabric
    assert NETWORK.all_reduce(size, 1) == NETWORK.all_gather(size, 1) == 0
    assert NETWORK.all_reduce(size, 8) == pytest.approx(2 * 7 * (node.latency + size / 8 / node.bandwidth))
    # 64 GPUs: each sends 7 eighths of its eighth between nodes, then 7 eighths of all within the node
    between = 7 * (fabric.latency + size / 64 / fabric.bandwidth)
    assert NETWORK.all_gather(size, 64) == pytest.approx(between + 7 * (node.latency + size / 8 / node.bandwidth))
    one_level = replace(NETWORK, node=fabric, gpus_per_node=1)
    # a small tensor goes by the tree, 2 log2(n) latencies; a large one by the ring, 2 (n - 1) / n of its size
    assert one_level.all_reduce(8, 1024) == pytest.approx(20 * fabric.latency, rel=1e-3)
    assert one_level.all_reduce(1e13, 64) == pytest.approx(2 * 63 / 64 * 1e13 / fabric.bandwidth, rel=1e-3)


@pytest.mark.parametrize("zero", range(4))
def test_the_planner_and_the_simulation_wait_for_the_same_collectives(zero):
    """Of one model on two nodes of eight H100, in bf16 with LoRA, without recomputation."""
    shape = Shape(1024, 4, 8, 8, 128, 2048, 32000, 16)
    sizes = Sizes(100_000_000, 1_000_000, 60_000_000, 32_768_000, 2_097_152, 16_384)
    split = Zero(zero, False, False, 500_000_000, 1, 1_000_000_000)
    row = Row(prompt=64, response=12, negatives=7, tokens=1024, shared=True)
    step = OptimizerStep(shape, sizes, split, row, 4, 16, False, True, False, False, "bfloat16")
    gpu = find_gpu("h100-80g", 8)
    collectives = {"gradient", "all-gather", "weights"}
    planned = sum(d.seconds for d in step.durations(gpu, 2, 8) if d.name.split()[0] in collectives)
    work = Workload(0, 16, 4, sizes.total, sizes.trainable, 2, 4, zero)
    assert work.communication(gpu.network(8), 16) == pytest.approx(planned, rel=1e-12)


def test_reductions_are_those_of_deepspeed():
    """Stages 0 and 1 reduce once a step, stage 2 in every backward pass; stage 3 gathers the weights in every pass."""
    times = {z: {c.name: c.times for c in step_collectives(NETWORK, 16, z, 1e9, 8e9, 4, 3, 34)} for z in range(4)}
    assert times == {
        0: {"gradient all-reduce": 1},
        1: {"gradient all-reduce": 1, "all-gather of updated weights": 1},
        2: {"gradient all-reduce": 4, "all-gather of updated weights": 1},
        3: {"gradient reduce-scatter": 4, "weights gathered": 12},
    }


def test_goodput_is_what_a_random_process_of_failures_leaves():
    interval, checkpoint, restart, mean = 900.0, 60.0, 300.0, 3600.0
    rng = np.random.default_rng(0)
    clock, wanted = 0.0, 20_000
    for _ in range(wanted):  # one checkpointed interval after the other
        while (failure := rng.exponential(mean)) < interval + checkpoint:
            clock += failure
            while (again := rng.exponential(mean)) < restart:  # a failure while restarting
                clock += again
            clock += restart
        clock += interval + checkpoint
    assert goodput(interval, checkpoint, restart, mean) == pytest.approx(wanted * interval / clock, rel=0.01)


@pytest.mark.parametrize("mean", [3e3, 3e4, 3e6])
def test_the_best_interval_is_youngs_and_dalys_where_those_hold(mean):
    best = best_interval(60, 300, mean)
    assert best == pytest.approx(daly_interval(60, mean), rel=0.01)
    assert best == pytest.approx(young_interval(60, mean), rel=0.15)
    kept = goodput(best, 60, 300, mean)
    assert all(goodput(best * factor, 60, 300, mean) < kept for factor in (0.8, 0.95, 1.05, 1.25))


def test_more_gpus_cost_efficiency_and_goodput_and_still_pay():
    for zero in range(4):
        rows = simulate(replace(WORK, zero=zero), MACHINE, [2**p for p in range(13)])
        assert rows[0]["efficiency"] == 1
        assert rows[0]["communication_share"] == 0
        for fewer, more in pairwise(rows):
            assert more["efficiency"] < fewer["efficiency"]
            assert more["goodput"] < fewer["goodput"]
            assert more["groups_per_second"] > fewer["groups_per_second"]
            assert more["checkpoint_interval"] < fewer["checkpoint_interval"]
    ideal = replace(MACHINE, overlap=1.0, jitter=0.0, network=Network(*2 * [Link(0.0, math.inf)], gpus_per_node=8))
    assert step_seconds(WORK, ideal, 4096)[0] == WORK.flops / 4e14 + 4 * 0.005
    assert goodput(1e4, 60, 300, 1.0) == 0.0  # nothing is ever finished, and nothing overflows


def test_calibration_finds_the_constants_and_predicts_what_it_has_not_seen():
    truth = Network(*2 * [Link(5e-4, 2e8)], gpus_per_node=1, trees=False)
    machine = replace(MACHINE, flops_per_second=2e10, overhead=0.02, network=truth, overlap=0.0, jitter=0.0)
    works, gpus = [], []
    for zero in range(4):
        for n, share in ((1, 1.0), (2, 0.5), (2, 1.0), (4, 0.4)):
            works.append(Workload(4e9 * share, 12 * share, 1 + (share == 1), 4e5, 4e5, 4, 3, zero))
            gpus.append(n)
    seconds = [step_seconds(work, machine, n)[0] for work, n in zip(works, gpus, strict=True)]
    fit = calibrate(works, gpus, seconds)
    assert 1 / fit.coefficients["flops"] == pytest.approx(2e10, rel=1e-6)
    assert fit.coefficients["micro_batches"] == pytest.approx(0.02, rel=1e-6)
    assert fit.coefficients["messages"] == pytest.approx(5e-4, rel=1e-4)
    assert fit.held_out == pytest.approx(seconds, rel=1e-6)
    doubled = [2 * s if i == 5 else s for i, s in enumerate(seconds)]  # a wrong cell does not vouch for itself
    assert calibrate(works, gpus, doubled).held_out[5] == pytest.approx(seconds[5], rel=1e-6)
