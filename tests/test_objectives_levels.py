"""Several positives and ordered lists: losses against plain loops, and against Plackett-Luce summed over all orders."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmpo_dist.objectives.functional import preference_loss
from dmpo_dist.objectives.groups import Groups
from dmpo_dist.objectives.registry import OBJECTIVES

F64 = torch.float64
BETA = 0.7

# A list is its levels, best first, and a level the log-ratios of its responses.
_level = st.lists(st.integers(-12, 12).map(lambda n: n / 4), min_size=1, max_size=3)
lists = st.lists(st.lists(_level, min_size=2, max_size=4), min_size=1, max_size=3)


def flatten(batch, seed=0):
    """Policy log-probs of lists whose reference is 0 everywhere, and their groups; responses in random order."""
    rows = [
        (ratio, group, number, number == 0 and index == 0)
        for group, levels in enumerate(batch)
        for number, level in enumerate(levels)
        for index, ratio in enumerate(level)
    ]
    random.Random(seed).shuffle(rows)
    ratio, group_id, level, first = map(torch.tensor, zip(*rows, strict=True))
    scores = 5.0 - level
    policy = ratio.to(F64).requires_grad_()
    groups = Groups(
        group_id, first, torch.ones_like(level), len(batch), level=level, scores=scores, n_levels=int(level.max()) + 1
    )
    return policy, torch.zeros_like(policy), groups


def value(name, batch, seed=0, **options):
    return OBJECTIVES[name](beta=BETA, **options)(*flatten(batch, seed))[0].item()


def weights(level):
    return [math.exp(BETA * ratio) for ratio in level]


def mult_dpo(levels):
    """Every response of a level drawn out of it and all below."""
    total = 0.0
    for number, level in enumerate(levels[:-1]):
        left = sum(sum(weights(below)) for below in levels[number:])
        total -= sum(math.log(weight / left) for weight in weights(level))
    return total


def plackett_luce(levels):
    total = 0.0
    for number, level in enumerate(levels[:-1]):
        below = sum(sum(weights(lower)) for lower in levels[number + 1 :])
        total -= sum(math.log(weight / (weight + below)) for weight in weights(level))
    return total


def summed_over_orders(levels):
    """-log of the Plackett-Luce probability that every level comes before the next, in any order within each."""
    probability = 0.0
    for order in itertools.product(*(itertools.permutations(weights(level)) for level in levels)):
        flat = [weight for level in order for weight in level]
        probability += math.prod(flat[i] / sum(flat[i:]) for i in range(len(flat)))
    return -math.log(probability)


def recpo(levels):
    """The first response of the best level against all lower ones, with margins by the scores 5, 4, ... of levels."""
    ahead = [
        BETA * ratio + 2 * 5 / (5 - number) for number, level in enumerate(levels) if number for ratio in level
    ]  # weights e^(r + margin)
    return math.log1p(sum(math.exp(margin - BETA * levels[0][0]) for margin in ahead))


@given(lists, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_losses_match_a_loop_over_lists_in_any_order(batch, seed):
    for name, oracle in (("mult_dpo", mult_dpo), ("plackett_luce", plackett_luce), ("recpo", recpo)):
        assert value(name, batch, seed) == pytest.approx(sum(map(oracle, batch)), rel=1e-11, abs=1e-11), name


@given(lists)
@settings(max_examples=60, deadline=None)
def test_both_losses_bound_plackett_luce_summed_over_orders(batch):
    """Mult-DPO from above within (k - 1) log(1 + A / B) a level, once its constant log k! is taken off (corollaries 1
    and 2 of arXiv 2606.10078), ours from above too; both are exact where every level but the last has one response."""
    for levels in batch:
        exact = summed_over_orders(levels)
        surrogate = mult_dpo(levels) - sum(math.log(math.factorial(len(level))) for level in levels[:-1])
        gap = sum(
            (len(level) - 1) * math.log1p(sum(weights(level)) / sum(sum(weights(lower)) for lower in levels[n + 1 :]))
            for n, level in enumerate(levels[:-1])
        )
        assert -1e-9 <= surrogate - exact <= gap + 1e-9
        assert value("plackett_luce", [levels]) >= exact - 1e-9
        singles = [[level[0]] for level in levels[:-1]] + [levels[-1]]
        assert value("plackett_luce", [singles]) == pytest.approx(summed_over_orders(singles), abs=1e-9)
        assert value("mult_dpo", [singles]) == pytest.approx(summed_over_orders(singles), abs=1e-9)


def test_one_positive_is_s_dpo_and_one_negative_is_dpo():
    one = [[[0.5], [-1.0, 0.25, 0.75]], [[-0.25], [1.5]]]
    for name in ("mult_dpo", "plackett_luce"):
        gradients = []
        for objective in (OBJECTIVES[name](beta=BETA), OBJECTIVES["sdpo"](beta=BETA)):
            policy, reference, groups = flatten(one)
            gradients.append(torch.autograd.grad(objective(policy, reference, groups)[0], policy)[0])
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)
    pair = [[[0.5], [-1.0]]]
    smoothed = [value(name, pair, label_smoothing=0.1) for name in ("plackett_luce", "dpo_pairs")]
    assert smoothed[0] == pytest.approx(smoothed[1])


@pytest.mark.parametrize("name", ["mult_dpo", "plackett_luce", "recpo"])
def test_gradients_of_ragged_lists(name):
    """Groups of two, three and four levels together: nothing that is not there has a gradient, and none is infinite."""
    batch = [[[0.5, 1.0], [0.25]], [[1.0], [0.0, 2.0], [-1.0, -0.5]], [[2.0], [1.0], [0.5], [3.0]]]
    policy, reference, groups = flatten(batch)
    objective = OBJECTIVES[name](beta=BETA, sft_weight=0.3)
    assert torch.autograd.gradcheck(lambda p: objective(p, reference, groups)[0], policy)
    big = (1e4 * policy.detach()).float().requires_grad_()
    loss, sums = objective(big, reference.float(), groups)
    loss.backward()
    assert loss.isfinite()
    assert big.grad.isfinite().all()
    assert sums["negatives"].item() == 1 + 4 + 3, "the negatives are all responses below the best level"
    known = objective.initial(policy, groups)
    start, _ = objective(torch.zeros_like(policy), reference, groups)
    assert known.sum().item() == pytest.approx(start.item())


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if not OBJECTIVES[name].takes_levels])
def test_a_loss_of_one_positive_takes_no_lists(name):
    objective = OBJECTIVES[name]()
    for batch in ([[[0.5, 1.0], [0.25]]], [[[0.5], [1.0], [0.25]]]):
        with pytest.raises(ValueError, match="takes one positive and its negatives; for levels take MultDpo"):
            objective(*flatten(batch))
    plain = [[[0.5], [1.0, 0.25]]]
    policy, reference, groups = flatten(plain)
    without = Groups(groups.group_id, groups.is_positive, groups.lengths, groups.count)
    levelled, plainly = (objective(policy, reference, given)[0] for given in (groups, without))
    assert levelled.item() == pytest.approx(plainly.item(), rel=0, abs=1e-15 if name == "rank_reward" else 0)


def test_levels_on_plain_tensors():
    policy = [torch.tensor([1.0, 2.0, 0.5], dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)]
    reference = [torch.zeros_like(group) for group in policy]
    levels = [torch.tensor([1, 0, 0]), torch.tensor([1, 0])]
    found = preference_loss(policy, reference, OBJECTIVES["mult_dpo"](beta=BETA), levels=levels)
    assert found.item() == pytest.approx((mult_dpo([[2.0, 0.5], [1.0]]) + mult_dpo([[1.0], [0.0]])) / 2)
    scored = OBJECTIVES["recpo"](beta=BETA)
    with pytest.raises(ValueError, match="Recpo needs scores"):
        preference_loss(policy, reference, scored, levels=levels)
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"scores of group 0 are .*; Recpo needs scores above 0"):
            preference_loss(policy, reference, scored, levels=levels, scores=[level * bad for level in levels])
    scores = [5.0 - level for level in levels]
    found = preference_loss(policy, reference, scored, levels=levels, scores=scores)
    assert found.item() == pytest.approx((recpo([[2.0, 0.5], [1.0]]) + recpo([[1.0], [0.0]])) / 2)
    tops = [torch.tensor([True, False, False]), torch.tensor([1.0, 0.0])]  # levels of other types
    again = preference_loss(policy, reference, OBJECTIVES["mult_dpo"](beta=BETA), levels=tops)
    assert again == preference_loss(policy, reference, OBJECTIVES["mult_dpo"](beta=BETA), levels=levels)
    half = [torch.tensor([0.0, 0.5, 1.0]), levels[1]]
    with pytest.raises(ValueError, match=r"levels of group 0 are \[0.0, 0.5, 1.0\]; give whole numbers"):
        preference_loss(policy, reference, OBJECTIVES["plackett_luce"](), levels=half)
    for wrong, words in (([[0, 0, 0], [0, 1]], "group 0 go from 0 to 0"), ([[0, 1, 1], [1, 2]], "group 1 go from 1")):
        with pytest.raises(ValueError, match=words):
            preference_loss(policy, reference, scored, levels=[torch.tensor(level) for level in wrong])


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_group_without_negatives_is_found_on_any_device(name, device):
    """Away from the CPU the objectives do not look at values, and S-DPO of no negatives is 0."""
    log_probs = [torch.tensor([-1.0, -2.0], device=device), torch.tensor([-1.0], device=device)]
    with pytest.raises(ValueError, match="group 1 has no negatives"):
        preference_loss(log_probs, log_probs, OBJECTIVES[name](), log_probs)
