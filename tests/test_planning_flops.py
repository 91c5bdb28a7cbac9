"""The FLOP model against counting by hand and by torch."""

import pytest
import torch
from conftest import tiny_model
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from dmpo_dist.batching.layout import group_cost, lay_out
from dmpo_dist.batching.synthetic import random_groups
from dmpo_dist.planning.flops import (
    Shape,
    Work,
    forward_flops,
    pairs_work,
    shape_of,
    shared_work,
    step_flops,
    unshared_work,
)
from dmpo_dist.planning.gpus import known_peak

SHAPE = Shape(hidden=4, layers=2, heads=2, kv_heads=1, head_dim=3, intermediate=5, vocab=11, lora_rank=1)


def test_by_hand():
    """A layer: q 4x6, k and v 4x3, o 6x4, gate and up 4x5, down 5x4 = 132 weights; adapters: 10 + 14 + 10 + 27."""
    flops = forward_flops(SHAPE, Work(tokens=7, pairs=28, head_rows=3))
    assert flops.linear == 2 * 2 * 132 * 7
    assert flops.adapters == 2 * 2 * (10 + 14 + 10 + 27) * 7
    assert flops.attention == 2 * (2 * 28 * 3) * 2 * 2  # layers x (two products of 3) x heads
    assert flops.head == 2 * 4 * 11 * 3
    reference = flops.linear + flops.attention + flops.head
    policy = reference + flops.adapters
    backward = flops.linear + 2 * flops.adapters + 2 * flops.attention + flops.head
    assert step_flops(SHAPE, Work(7, 28, 3)) == reference + policy + backward


def test_work_by_hand():
    """P = 3, R = 2, K = 2: bodies of one token; a body sees the prompt and itself."""
    assert shared_work(3, 2, 2) == Work(tokens=3 + 3, pairs=6 + 3 * 4, head_rows=4)
    assert unshared_work(3, 2, 2) == Work(tokens=12, pairs=30, head_rows=6)
    assert pairs_work(3, 2, 2) == Work(tokens=20, pairs=4 * 15, head_rows=8)
    assert pairs_work(3, 2, 2, head_everywhere=True) == Work(tokens=20, pairs=4 * 15, head_rows=16)


@pytest.mark.parametrize("lengths", [(5, 2, 1), (64, 12, 3), (256, 12, 15)])
def test_work_is_what_the_layouts_hold(lengths):
    prompt, response, negatives = lengths
    group = random_groups(1, prompt, response, negatives, 4096)[0]
    for shared, work in ((True, shared_work(*lengths)), (False, unshared_work(*lengths))):
        cost, layout = group_cost(group, shared), lay_out([group], shared)
        assert (work.tokens, work.pairs) == (cost.tokens, cost.pairs)
        assert work.tokens == layout.physical_tokens
        assert work.head_rows == len(layout.targets.predict_index)


def test_torch_counts_the_same():
    """Eager attention computes all T x T pairs; the first layer's q, k and v compute no gradient of their input."""
    model = tiny_model("llama", attn_implementation="eager")
    model.set_attn_implementation("eager")
    peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0))
    shape = shape_of(model.config, lora_rank=4)
    rows, length = 3, 10
    ids = torch.randint(3, 97, (rows, length))
    with FlopCounterMode(display=False) as counter:
        with torch.no_grad(), peft.disable_adapter():
            peft(ids)
        peft(ids).logits.sum().backward()
    work = Work(tokens=rows * length, pairs=rows * length**2, head_rows=rows * length)
    rotary = 3 * rows * 4 * length * 2  # the angles of 4 frequencies, a product transformers makes once a forward
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    not_needed = 2 * shape.hidden * (queries + 2 * keys) + 3 * 2 * shape.hidden * shape.lora_rank
    missing = step_flops(shape, work) - counter.get_total_flops() - rows * length * not_needed
    assert 0 <= -missing <= rotary


def test_peaks_and_refusals():
    assert known_peak("NVIDIA H200") == 989e12
    assert known_peak("NVIDIA H100 PCIe") == 756e12
    assert known_peak("Some CPU") is None
    with pytest.raises(ValueError, match="mixture of experts"):
        shape_of(tiny_model("gpt_oss").config, 16)
