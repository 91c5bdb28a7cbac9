"""SFT at equal compute: what a step costs is what its layout holds, and the factor is a ratio of such costs."""

from dataclasses import replace

import pytest

from dmpo_dist.batching.layout import lay_out
from dmpo_dist.batching.synthetic import random_groups
from dmpo_dist.planning.compute import compute_factor, group_work
from dmpo_dist.planning.flops import Shape, shared_work, step_flops, unshared_work

SHAPE = Shape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=96, vocab=500, lora_rank=0)
NEITHER = {"history_in_preference": False, "history_in_sft": False}


@pytest.mark.parametrize("shared", [True, False])
def test_the_work_of_a_group_is_what_its_layout_holds(shared):
    group = replace(random_groups(1, 30, 6, 3, 500)[0], prefix_scored=(4, 9, 17))
    layout, work = lay_out([group], shared), group_work(group, shared)
    assert work.tokens == layout.physical_tokens
    if shared:
        assert work.head_rows == len(layout.targets.predict_index)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("lora_rank", [0, 8])
def test_the_factor_is_the_ratio_of_a_preference_step_to_an_sft_step(shared, lora_rank):
    shape, work = replace(SHAPE, lora_rank=lora_rank), shared_work if shared else unshared_work
    groups = random_groups(4, 40, 7, 5, 500)

    def factor(negatives: int, reference: bool) -> float:
        return compute_factor(shape, groups, negatives, reference=reference, shared=shared, **NEITHER)

    sft = step_flops(shape, work(40, 7, 0), reference=False)
    for negatives in (1, 5):
        assert factor(negatives, True) == pytest.approx(step_flops(shape, work(40, 7, negatives)) / sft)
    assert factor(0, False) == 1
    assert 1 < factor(1, False) < factor(1, True) < factor(5, True)


def test_titles_of_the_history_cost_head_rows_where_they_are_scored():
    plain = random_groups(1, 40, 7, 3, 500)
    scored = [replace(group, prefix_scored=tuple(range(1, 31))) for group in plain]

    def factor(groups, preference: bool, sft: bool) -> float:
        return compute_factor(
            SHAPE, groups, 3, reference=True, history_in_preference=preference, history_in_sft=sft
        )  # fmt: skip

    assert factor(scored, False, False) == factor(plain, True, True)
    assert factor(scored, False, True) < factor(scored, False, False) < factor(scored, True, False)
