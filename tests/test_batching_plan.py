"""The plan: what belongs to a step never depends on who computes it, and every rank does its share in step."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmpo_dist.batching.layout import Cost
from dmpo_dist.batching.plan import PAIR_WEIGHT, MicroBatch, Schedule, Step, deal
from dmpo_dist.errors import UserError

schedules = st.builds(Schedule, st.integers(1, 200), st.integers(1, 40), st.integers(0, 2**32))
costs = st.lists(st.builds(Cost, st.integers(1, 12), st.integers(1, 4000)), min_size=1, max_size=40)


@given(schedules, st.integers(0, 5))
@settings(deadline=None)
def test_an_epoch_is_every_group_once_in_steps_of_nearly_one_size(schedule, epoch):
    n = schedule.steps_per_epoch
    steps = [schedule.groups(epoch * n + i) for i in range(n)]
    assert sorted(group for step in steps for group in step) == list(range(schedule.n_groups))
    sizes = {len(step) for step in steps}
    assert max(sizes) <= schedule.global_batch_size
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) == schedule.smallest_step > 0
    # no fewer steps would hold all groups
    assert (n - 1) * schedule.global_batch_size < schedule.n_groups
    assert {schedule.epoch_of(epoch * n + i) for i in range(n)} == {epoch}


@given(schedules, st.lists(st.integers(0, 300), min_size=1, max_size=6))
@settings(deadline=None)
def test_a_step_can_be_recomputed_in_any_order(schedule, steps):
    """Resuming is arithmetic: no iterator and no global random state is behind it."""
    forwards = {step: schedule.groups(step) for step in sorted(steps)}
    np.random.seed(7)
    again = Schedule(schedule.n_groups, schedule.global_batch_size, schedule.seed)
    assert {step: again.groups(step) for step in sorted(steps, reverse=True)} == forwards


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {
        (seed, epoch): tuple(g for s in range(10) for g in Schedule(100, 10, seed).groups(epoch * 10 + s))
        for seed in range(3) for epoch in range(3)
    }  # fmt: skip
    assert len(set(orders.values())) == 9
    assert tuple(range(100)) not in orders.values()


@st.composite
def deals(draw):
    """(groups, costs, world size, budget): budgets from just enough to plenty."""
    cost = draw(costs)
    groups = draw(st.permutations(range(1000, 1000 + len(cost))))
    budget = max(c.tokens for c in cost) + draw(st.sampled_from([0, 1, 10, 500]))
    return groups, cost, draw(st.integers(1, 8)), budget


@given(deals())
@settings(max_examples=200, deadline=None)
def test_a_deal(case):
    groups, costs, world_size, budget = case
    tokens = {group: cost.tokens for group, cost in zip(groups, costs, strict=True)}
    weight = {group: cost.tokens + cost.pairs / 512 for group, cost in zip(groups, costs, strict=True)}
    step = deal(groups, costs, world_size, budget, epoch=3)
    assert step.epoch == 3
    assert step.groups == tuple(groups), "the step's content depends on how it is divided"
    assert len(step.micro_batches) == world_size
    assert len({len(rank) for rank in step.micro_batches}) == 1, "ranks would wait for each other forever"
    real = [[batch for batch in rank if not batch.filler] for rank in step.micro_batches]
    assert sorted(g for rank in real for batch in rank for g in batch.groups) == sorted(groups)
    assert any(len(rank) == len(filled) for rank, filled in zip(real, step.micro_batches, strict=True)), (
        "useless filler"
    )
    for rank, filled in zip(real, step.micro_batches, strict=True):
        room = [sum(tokens[g] for g in batch.groups) for batch in filled]
        assert max(room) <= budget
        assert all(batch.groups and set(batch.groups) <= set(groups) for batch in filled)
        fullness = sorted(sum(tokens[g] for g in batch.groups) for batch in rank)
        assert len(fullness) < 2 or fullness[0] + fullness[1] > budget, "two micro-batches would fit into one"
    loads = [sum(weight[g] for batch in rank for g in batch.groups) for rank in real]
    mean = sum(loads) / world_size
    assert step.imbalance == pytest.approx(max(loads) / mean - 1, abs=1e-9)
    # a greedy deal never puts a group on a rank above the mean of what was there
    assert max(loads) <= mean + max(weight.values()) * (1 - 1 / world_size) + 1e-9
    assert deal(groups, costs, world_size, budget, epoch=3) == step


@given(deals())
@settings(max_examples=50, deadline=None)
def test_the_deal_does_not_depend_on_the_order_of_groups(case):
    """Ties in cost are broken by the group's number."""
    groups, costs, world_size, budget = case
    step = deal(groups, costs, world_size, budget)
    turned = deal(groups[::-1], costs[::-1], world_size, budget)
    assert turned.micro_batches == step.micro_batches


def test_more_ranks_than_groups_get_the_cheapest_group_as_filler():
    step = deal([4, 9], [Cost(10, 55), Cost(3, 6)], world_size=4, token_budget=16)
    filler = (MicroBatch((9,), filler=True),)
    assert step.micro_batches == ((MicroBatch((4,)),), (MicroBatch((9,)),), filler, filler)
    heavy, light = 10 + 55 * PAIR_WEIGHT, 3 + 6 * PAIR_WEIGHT
    assert step.imbalance == pytest.approx(4 * heavy / (heavy + light) - 1)


def test_attention_pairs_count_in_the_balance():
    """Two groups of equal tokens, one with far more attention: it goes alone, the cheaper ones together."""
    step = deal([0, 1, 2], [Cost(10, 51_200), Cost(10, 0), Cost(10, 0)], world_size=2, token_budget=30)
    assert isinstance(step, Step)
    assert [sorted(g for batch in rank for g in batch.groups if not batch.filler) for rank in step.micro_batches] == [
        [0],
        [1, 2],
    ]


def test_a_group_over_the_budget_is_refused():
    assert deal([0], [Cost(100, 1)], 1, 100).micro_batches == ((MicroBatch((0,)),),)
    with pytest.raises(UserError, match=r"takes 101 tokens, more than the token budget of 100; raise token_budget"):
        deal([0, 1, 2], [Cost(7, 1), Cost(101, 1), Cost(9, 1)], 2, 100)


def test_no_groups_is_refused():
    with pytest.raises(UserError, match="no training groups"):
        Schedule(0, 8, 0)
