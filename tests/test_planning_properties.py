"""What must hold of any model and row that is planned: less divided never takes less, more work never takes less."""

from dataclasses import replace

import pytest
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from dmpo_dist.config import ModelConfig
from dmpo_dist.planning.memory import Rank, Zero, peak_bytes, phase_bytes
from dmpo_dist.planning.model import Blueprint, Row, Sizes, blueprint
from dmpo_dist.planning.network import Link, Network
from dmpo_dist.planning.simulate import Machine, Workload, simulate, step_seconds
from dmpo_dist.planning.trace import Trace

BILLION = 10**9
BUCKET = 500_000_000


@st.composite
def full_fine_tunings(draw) -> Rank:
    """A model that is trained as a whole and is larger than the buckets that ZeRO keeps, on two GPUs or more."""
    total = draw(st.integers(3 * BILLION, 400 * BILLION))
    largest = draw(st.integers(total // 200, total // 10))
    saved = draw(st.integers(0, 50 * BILLION))
    return Rank(
        sizes=Sizes(total, total, 0, largest, 0, largest),
        zero=Zero(0, False, False, BUCKET, 1, 2 * BUCKET),
        world_size=draw(st.integers(2, 4096)),
        width=draw(st.sampled_from([2, 4])),
        nf4=False,
        double_quantization=False,
        reference_copy=draw(st.booleans()),
        cuda=draw(st.booleans()),
        trace=Trace(saved, saved + draw(st.integers(0, BILLION))),
        tokens=1000,
    )


def peak(rank: Rank, stage: int, **changes: object) -> int:
    return peak_bytes(replace(rank, zero=replace(rank.zero, stage=stage), **changes).device_terms())


@given(full_fine_tunings())
def test_a_higher_zero_stage_never_takes_more_of_a_gpu(rank):
    padding = 32  # bytes held for the parameter that rounds a shard up
    assert peak(rank, 3) <= peak(rank, 0) + padding
    assert peak(rank, 2) <= peak(rank, 0) + padding


@given(full_fine_tunings(), st.integers(1, 8), st.integers(0, 3))
def test_more_ranks_and_smaller_rows_never_take_more_of_a_gpu(rank, times, stage):
    assert peak(rank, stage, world_size=times * rank.world_size) <= peak(rank, stage)
    half = Trace(rank.trace.saved // 2, rank.trace.peak // 2)
    assert peak(rank, stage, trace=half) <= peak(rank, stage)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Blueprint:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(folder)
    return blueprint(ModelConfig(path=str(folder), max_length=256))


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 60), st.integers(2, 12), st.integers(1, 8), st.integers(1, 4))
def test_memory_grows_with_k_and_with_the_groups_of_a_row(model, prompt, response, negatives, groups):
    def bytes_of(negatives: int, groups: int) -> dict[str, int]:
        group = Row(prompt, response, negatives, 0, shared=True)
        row = replace(group, tokens=groups * group.group_tokens)
        trace = model.trace(row, "two_part", cuda=False, keep_gradients=False)
        sizes, zero = model.sizes, Zero(0, False, False, BUCKET, 1, 2 * BUCKET)
        return phase_bytes(Rank(sizes, zero, 1, 4, False, False, True, False, trace, row.tokens).device_terms())

    one = bytes_of(negatives, groups)
    for more in (bytes_of(negatives + 1, groups), bytes_of(negatives, groups + 1)):
        assert more["micro_batch"] > one["micro_batch"]
        assert (more["reduce"], more["step"]) == (one["reduce"], one["step"]), "where no row is held"


positive = st.floats(1e-3, 1e6)


@given(positive, positive, st.integers(1, 64), positive, st.integers(0, 3), st.floats(0, 1), st.floats(0, 0.5))
def test_one_gpu_computes_and_waits_for_nobody(flops, speed, micro_batches, overhead, zero, overlap, jitter):
    """In closed form: FLOPs at the GPU's speed and the overhead of every micro-batch; nothing is sent."""
    network = Network(node=Link(2e-6, 3e11), fabric=Link(1e-5, 4e10), gpus_per_node=8)
    work = Workload(flops, 16, micro_batches, 8e9, 8e9, 2, 32, zero)
    machine = Machine(speed, overhead, network, overlap, jitter, 50_000, 60, 300)
    expected = flops / speed + micro_batches * overhead
    assert step_seconds(work, machine, 1) == (expected, 0.0)
    [row] = simulate(work, machine, [1])
    assert (row["step_seconds"], row["efficiency"], row["communication_share"]) == (expected, 1.0, 0.0)
    assert row["groups_per_second"] == 16 / expected
