"""Objectives against a plain loop over groups, and the identities that tie their forms together."""

import math
import random
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmpo_dist.objectives.groups import Groups, boundary_negatives
from dmpo_dist.objectives.likelihood import Likelihood
from dmpo_dist.objectives.registry import OBJECTIVES

NAMES = list(OBJECTIVES)
FORMS = NAMES[:3]
NO_MARGIN = "rank_reward"  # a policy gradient: neither a function of reward margins nor of log-probs alone
WITH_REFERENCE = [name for name in NAMES if name not in ("dmpo_released", "simpo")]
BY_MARGIN = [name for name in WITH_REFERENCE if name != NO_MARGIN]
WITH_BOUNDARY = [name for name in NAMES if "negative_selection" not in OBJECTIVES[name].REFUSED]
SOFTMAX = ("sdpo", "recpo", "mult_dpo", "plackett_luce")  # of one positive, the last two are sdpo
F64 = torch.float64

# A response is (policy log-prob, reference log-prob, length); a group is a list of them, its positive first.
# Quarters make ties common; margins stay below 20, from where on torch's softplus(z) is z (off by 2e-9).
_log_prob = st.integers(-20, 0).map(lambda n: n / 4)
_response = st.tuples(_log_prob, _log_prob, st.integers(1, 5))
batches = st.lists(st.lists(_response, min_size=2, max_size=5), min_size=1, max_size=4)


def make(name, **options):
    """The objective with those of ``options`` that it takes."""
    made = OBJECTIVES[name]
    refused = {*made.REFUSED, *({"reference_free", "length_normalize"} if name == "simpo" else {})}
    options = {option: value for option, value in options.items() if option not in refused}
    if options.get("negative_selection", "all") == "all":
        options.pop("dynamic_beta", None)
    return made(**options)


objectives = st.builds(
    make,
    name=st.sampled_from(NAMES),
    beta=st.sampled_from([0.1, 1.0, 1.5]),
    sft_weight=st.sampled_from([0.0, 0.3]),
    label_smoothing=st.sampled_from([0.0, 0.2]),
    reference_free=st.booleans(),
    length_normalize=st.booleans(),
    negative_selection=st.sampled_from(["all", "boundary"]),
    dynamic_beta=st.sampled_from([0.0, 0.5]),
    dynamic_beta_margin=st.sampled_from([0.0, 6.0]),
)


def oracle(objective, batch):
    """All that the objective returns, from the formulas alone."""
    groups = [_group(objective, *group) for group in batch]
    return {key: sum(group[key] for group in groups) for key in groups[0]}


def _group(objective, positive, *negatives):
    reference_free = objective.reference_free or objective.name == "dmpo_released"

    def reward(response):
        policy, reference, length = response
        ratio = policy if reference_free else policy - reference
        return objective.beta * (ratio / length if objective.length_normalize else ratio)

    def smoothed(z):
        e = objective.label_smoothing
        return (1 - e) * math.log1p(math.exp(z)) + e * math.log1p(math.exp(-z))

    def beta_factor(negative):
        if not objective.dynamic_beta:
            return 1.0
        easy = [other for other in negatives if other not in kept] or kept
        first, second = positive[0] - negative[0], negative[0] - fmean(other[0] for other in easy)
        excess, size = first - second - objective.dynamic_beta_margin, abs(first) + abs(second)
        change = math.tanh(excess / size) if size else float(excess > 0) - float(excess < 0)
        return 1 + objective.dynamic_beta * change

    def form(margins):
        if objective.name == "dmpo":
            return smoothed(fmean(margins))
        if objective.name == "ipo":
            return fmean((margin / objective.beta + 1 / (2 * objective.beta)) ** 2 for margin in margins)
        if objective.name == "simpo":
            return fmean(smoothed(margin + objective.gamma) for margin in margins)
        if objective.name == "recpo":  # ``flatten`` takes the lengths for scores
            ratios = [objective.margin_weight * positive[2] / negative[2] for negative in kept]
            margins = [margin + ratio for margin, ratio in zip(margins, ratios, strict=True)]
        if objective.name in SOFTMAX:
            return smoothed(math.log(sum(math.exp(margin) for margin in margins)))
        return fmean(smoothed(margin) for margin in margins)

    def policy_gradient(ratios):
        """arXiv 2510.12211, the lengths taken for rewards as ``flatten`` does; a score function is 1 in value."""
        responses = [positive, *negatives]
        given = [response[2] for response in responses]
        if len(set(given)) == 1:
            return 0.0
        spread = math.sqrt(fmean((reward - fmean(given)) ** 2 for reward in given))
        advantages = [(reward - fmean(given)) / spread for reward in given]
        terms = [-a + objective.kl * ratio**2 / 2 for a, ratio in zip(advantages, ratios, strict=True)]
        lengths = [response[2] if objective.length_normalize else 1 for response in responses]
        return fmean(term / length for term, length in zip(terms, lengths, strict=True))

    kept = kept_negatives(positive, negatives) if objective.negative_selection == "boundary" else negatives
    ratios = [response[0] - response[1] for response in (positive, *negatives)]
    more = {}
    if objective.name == NO_MARGIN:
        more["constant_reward"] = len({response[2] for response in (positive, *negatives)}) == 1
        more["kl"] = fmean(ratio**2 / 2 for ratio in ratios)
        preference, initial = policy_gradient(ratios), policy_gradient([0.0] * len(ratios))
    else:
        preference = form([beta_factor(negative) * (reward(negative) - reward(positive)) for negative in kept])
        initial = form([0.0] * len(kept))
    sft_weight = objective.sft_weight + (objective.name == "dmpo_released")
    return {
        "loss": preference - sft_weight * positive[0] / positive[2],
        "preference_loss": preference,
        "initial_loss": initial,
        "negatives": len(kept),
        "margin": reward(positive) - fmean(reward(negative) for negative in negatives),
        "accuracy": fmean(negative[0] < positive[0] for negative in negatives),
        "reward_accuracy": fmean(reward(negative) < reward(positive) for negative in negatives),
        "reward_positive": reward(positive),
        "reward_negative": fmean(reward(negative) for negative in negatives),
        "logp_positive": positive[0],
        "logp_negative": fmean(negative[0] for negative in negatives),
        **more,
    }


def kept_negatives(positive, negatives):
    over = [negative for negative in negatives if negative[0] >= positive[0]]
    return over or [negative for negative in negatives if negative[0] == max(n[0] for n in negatives)]


def flatten(batch, seed=0, dtype=F64):
    """The objective's arguments, responses in random order."""
    rows = [(*response, g, i == 0) for g, group in enumerate(batch) for i, response in enumerate(group)]
    random.Random(seed).shuffle(rows)
    columns = list(zip(*rows, strict=True))
    policy, reference = (torch.tensor(column, dtype=dtype, requires_grad=True) for column in columns[:2])
    lengths, group_id, is_positive = map(torch.tensor, columns[2:])
    return policy, reference, Groups(group_id, is_positive, lengths, len(batch), scores=lengths.to(dtype))


def value(objective, batch, **options):
    return objective(*flatten(batch, **options))[0].item()


def close(a, b):
    return math.isclose(a, b, rel_tol=1e-11, abs_tol=1e-11)


@given(objectives, batches, st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_loss_and_statistics_match_a_loop_over_groups(objective, batch, seed):
    policy, reference, groups = flatten(batch, seed)
    loss, sums = objective(policy, reference, groups)
    expected = oracle(objective, batch)
    known = objective.initial(policy, groups)
    initial = expected.pop("initial_loss")
    assert sums.keys() == expected.keys() == set(objective.sums)
    assert {key for key in expected if not close(sums[key].item(), expected[key])} == set()
    assert close(known.sum().item(), initial) if objective.needs_reference else known is None
    assert loss.item() == sums["loss"].item()
    assert not any(total.requires_grad for total in sums.values())
    loss.backward()
    assert policy.grad.isfinite().all()
    assert reference.grad is None, "the reference is trained"


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"length_normalize": True, "sft_weight": 0.5}])
@pytest.mark.parametrize(
    ("name", "selection"),
    [*((name, "all") for name in NAMES if name != NO_MARGIN), *((name, "boundary") for name in WITH_BOUNDARY)],
)
def test_gradients_match_finite_differences(name, options, selection):
    rng = random.Random(name)
    batch = [[(rng.uniform(-4, 0), rng.uniform(-4, 0), rng.randint(1, 5)) for _ in range(k + 1)] for k in (1, 4, 3)]
    policy, *rest = flatten(batch)
    objective = make(name, beta=0.7, negative_selection=selection, **options)
    assert torch.autograd.gradcheck(lambda p: objective(p, *rest)[0], policy)


@given(st.lists(st.tuples(_response, _response).map(list), min_size=1, max_size=4), st.booleans(), st.booleans())
@settings(max_examples=30, deadline=None)
def test_one_negative_makes_all_forms_dpo(batch, normalize, boundary):
    selection = "boundary" if boundary else "all"
    losses, gradients = [], []
    for name in FORMS:
        policy, *rest = flatten(batch)
        loss, _ = make(name, length_normalize=normalize, negative_selection=selection)(policy, *rest)
        loss.backward()
        losses.append(loss.item())
        gradients.append(policy.grad)
    assert close(losses[0], losses[1])
    assert close(losses[0], losses[2])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradients[0], gradients[2], rtol=1e-11, atol=1e-12)


@given(batches, st.sampled_from(["all", "boundary"]))
@settings(max_examples=50, deadline=None)
def test_dmpo_is_a_lower_bound_of_the_others(batch, selection):
    """Jensen for dpo_pairs, mean <= max <= logsumexp for sdpo; both for every group, so for the sum."""
    dmpo, sdpo, pairs = (value(make(name, negative_selection=selection), batch) for name in FORMS)
    assert dmpo <= pairs + 1e-12
    assert dmpo <= sdpo + 1e-12


@given(objectives, batches)
@settings(max_examples=80, deadline=None)
def test_a_policy_equal_to_its_reference_starts_at_the_initial_loss(objective, batch):
    """log 2 for a group, log(1 + K) for a softmax over its K kept negatives; whatever sft_weight adds is apart."""
    batch = [[(policy, policy, length) for policy, _, length in group] for group in batch]
    policy, reference, groups = flatten(batch)
    _, sums = objective(policy, reference, groups)
    known = objective.initial(policy, groups)
    if not objective.needs_reference:
        assert known is None
        return
    assert close(sums["preference_loss"].item(), known.sum().item())
    if objective.name in ("ipo", "recpo", NO_MARGIN):
        return  # 1 / (2 beta)^2, and what the margins add: see the oracle
    if objective.name not in SOFTMAX:
        assert close(known.sum().item(), len(batch) * math.log(2))
    elif not objective.label_smoothing and objective.negative_selection == "all":
        assert close(known.sum().item(), sum(math.log(len(group)) for group in batch))


@given(batches, objectives)
@settings(max_examples=80, deadline=None)
def test_listing_every_negative_twice(batch, objective):
    """Changes nothing for means over negatives; adds log 2 inside a softmax, as if each were that much likelier."""
    twice = [[group[0], *group[1:], *group[1:]] for group in batch]
    if objective.name == NO_MARGIN:
        return  # another group has another mean reward
    if objective.name not in SOFTMAX:
        assert close(value(objective, twice), value(objective, batch))
    else:
        plain = make(objective.name, beta=objective.beta, reference_free=objective.reference_free)
        likelier = math.log(2) / plain.beta
        raised = [[group[0], *((p + likelier, r, n) for p, r, n in group[1:])] for group in batch]
        assert close(value(plain, twice), value(plain, raised))


@given(batches, st.randoms(use_true_random=False), st.sampled_from(NAMES), st.sampled_from(["all", "boundary"]))
@settings(max_examples=50, deadline=None)
def test_order_of_responses_changes_nothing(batch, rng, name, selection):
    losses, gradients = [], []
    for seed in (0, rng.randrange(1000)):
        policy, reference, groups = flatten(batch, seed)
        loss, _ = make(name, beta=0.5, negative_selection=selection)(policy, reference, groups)
        (gradient,) = torch.autograd.grad(loss, policy)
        losses.append(loss.item())
        # the same response may come twice in a group, with one gradient each
        gradients.append(
            sorted(zip(groups.group_id.tolist(), policy.tolist(), reference.tolist(), gradient.tolist(), strict=True))
        )
    assert close(*losses)
    torch.testing.assert_close(torch.tensor(gradients[1]), torch.tensor(gradients[0]), rtol=1e-11, atol=1e-13)


@given(batches, st.lists(st.floats(-20, 20), min_size=4, max_size=4), st.sampled_from(BY_MARGIN), st.booleans())
@settings(max_examples=50, deadline=None)
def test_a_constant_on_a_groups_reference_cancels(batch, shifts, name, boundary):
    objective = make(name, negative_selection="boundary" if boundary else "all")
    shifted = [[(p, r + shift, n) for p, r, n in group] for group, shift in zip(batch, shifts, strict=False)]
    assert close(value(objective, shifted), value(objective, batch))


@given(batches)
@settings(max_examples=30, deadline=None)
def test_dmpo_released_is_reference_free_pairs_plus_likelihood(batch):
    policy, _, groups = flatten(batch)
    released, _ = make("dmpo_released", beta=0.3, sft_weight=0.25)(policy, None, groups)
    pairs, _ = make("dpo_pairs", beta=0.3, reference_free=True)(policy, None, groups)
    nll, sums = Likelihood()(policy, None, groups)
    assert close(nll.item(), sum(-group[0][0] / group[0][2] for group in batch))
    assert close(sums["logp_positive"].item(), sum(group[0][0] for group in batch))
    assert close(released.item(), pairs.item() + 1.25 * nll.item())


def test_a_scored_history_joins_the_positive_in_the_likelihood_and_nowhere_else():
    """Mean over the tokens of both; positive -3 in 2 tokens with a history of -9 in 4, positive -8 in 4 with none."""
    policy, reference, groups = flatten([[(-3.0, -2.0, 2), (-5.0, -4.0, 3)], [(-8.0, -1.0, 4), (-2.0, -2.0, 1)]])
    groups = replace(groups, history_lengths=torch.tensor([4, 0]))
    history = torch.tensor([-9.0, 0.0], dtype=torch.float64)
    nll, _ = Likelihood(scores_history=True)(policy, None, groups, history)
    assert close(nll.item(), (3 + 9) / 6 + 8 / 4)
    plain, _ = make("dmpo")(policy, reference, groups, history)
    loss, sums = make("dmpo", sft_weight=0.5)(policy, reference, groups, history)
    assert close(loss.item(), plain.item() + 0.5 * nll.item())
    assert close(sums["preference_loss"].item(), plain.item())


BOUNDARIES = [
    ("some over", [-3.0, -2.0, -4.0, -2.5], [False, True, False, True]),
    ("a tie with the positive counts as over", [-3.0, -3.0, -4.0], [False, True, False]),
    ("none over: the hardest", [-1.0, -4.0, -2.0, -3.0], [False, False, True, False]),
    ("none over: all of the hardest", [-1.0, -2.0, -5.0, -2.0], [False, True, False, True]),
    ("all over", [-9.0, -2.0, -3.0], [False, True, True]),
]


@pytest.mark.parametrize(("policy", "kept"), [case[1:] for case in BOUNDARIES], ids=[case[0] for case in BOUNDARIES])
@pytest.mark.parametrize("name", WITH_BOUNDARY)
def test_boundary_selection_is_as_if_the_others_were_not_there(name, policy, kept):
    """Same loss and same gradient: nothing flows through the choice. A second group must not be touched by it."""
    first, second = len(policy), 2
    policy = torch.tensor([*policy, -1.0, -7.0], dtype=F64, requires_grad=True)
    reference = torch.linspace(-3, 0, len(policy), dtype=F64)
    group_id = torch.tensor([0] * first + [1] * second)
    is_positive = torch.tensor([i in (0, first) for i in range(first + second)])
    groups = Groups(group_id, is_positive, torch.full((len(policy),), 2), 2)
    chosen = torch.tensor([*kept, False, True])
    assert boundary_negatives(policy, groups).tolist() == chosen.tolist()
    boundary, sums = make(name, negative_selection="boundary")(policy, reference, groups)
    there = chosen | is_positive
    fewer = Groups(group_id[there], is_positive[there], groups.lengths[there], 2)
    alone, _ = make(name)(policy[there], reference[there], fewer)
    assert close(boundary.item(), alone.item())
    assert sums["negatives"].item() == chosen.sum()
    gradients = [torch.autograd.grad(loss, policy)[0] for loss in (boundary, alone)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)
    assert (gradients[0][:first][~chosen[:first] & ~is_positive[:first]] == 0).all()


@pytest.mark.parametrize("selection", ["all", "boundary"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", NAMES)
def test_no_overflow_in_fp32(name, smoothing, selection):
    """|r| = 1e4 either way, alone and next to moderate negatives."""
    big = 1e4
    batch = [
        [(0.0, 0.0, 1), (-big, 0.0, 1)],
        [(-big, 0.0, 1), (0.0, 0.0, 1)],
        [(-big, 0.0, 1), (0.0, 0.0, 1), (0.0, 0.0, 1), (-5.0, 0.0, 1)],
        [(0.0, 0.0, 1), (-big, 0.0, 1), (-big, 0.0, 1), (-5.0, 0.0, 1)],
    ]
    objective = make(name, label_smoothing=smoothing, negative_selection=selection)
    arguments = flatten(batch, dtype=torch.float32)
    loss, sums = objective(*arguments)
    loss.backward()
    gradient = arguments[0].grad
    assert all(total.isfinite() for total in sums.values())
    assert gradient.isfinite().all()
    if name != "ipo":  # a square's gradient grows with it
        assert (gradient.abs() <= (3.0 if name == "simpo" else 2.0) + 1e-6).all()  # beta, and 1 of the likelihood
    precise = flatten(batch)
    expected, _ = objective(*precise)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient.double(), precise[0].grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_types_are_widened_before_any_arithmetic(name, dtype):
    batch = [[(-7.3, -6.1, 3), (-9.7, -9.9, 4), (-5.2, -4.4, 2)], [(-3.3, -3.1, 2), (-8.8, -6.5, 3)]]
    objective = make(name, beta=0.9, sft_weight=0.1, negative_selection="boundary", label_smoothing=0.1)
    policy, reference, *rest = flatten(batch, dtype=dtype)
    wide = policy.detach().float().requires_grad_()
    expected, expected_sums = objective(wide, reference.float(), *rest)
    loss, sums = objective(policy, reference, *rest)
    assert loss.dtype == torch.float32
    assert sums == expected_sums
    loss.backward()
    expected.backward()
    assert torch.equal(policy.grad, wide.grad.to(dtype))


@pytest.mark.parametrize(
    ("is_positive", "message"),
    [
        ([1, 0, 0, 0], "group 1 has 0 positives"),
        ([1, 1, 1, 0], "group 0 has 2 positives"),
        ([1, 0, 1], "group 1 has no negatives"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_malformed_groups_are_refused(name, is_positive, message):
    n = len(is_positive)
    groups = Groups(torch.tensor([0, 0, 1, 1][:n]), torch.tensor(is_positive) > 0, torch.ones(n, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match=message):
        make(name)(torch.zeros(n), torch.zeros(n), groups)


def test_a_missing_reference_is_refused_only_where_it_matters():
    policy, _, *rest = flatten([[(-1.0, 0.0, 1), (-2.0, 0.0, 1)]])
    for name in WITH_REFERENCE:
        assert make(name).needs_reference
        with pytest.raises(ValueError, match="needs reference"):
            make(name)(policy, None, *rest)
    for objective in (make("dmpo", reference_free=True), make("dmpo_released"), make("simpo")):
        assert not objective.needs_reference
        assert objective(policy, None, *rest)[0].isfinite()


@pytest.mark.parametrize("name", ["dmpo", "sdpo", "dpo_pairs"])
def test_dynamic_beta_weighs_each_boundary_negative_by_its_two_margins(name):
    """A boundary negative at 2 nats above the positive, an easy one 6 below it: m1 = -2, m2 = 8, so beta falls by
    tanh(-16 / 10) / 2. No gradient flows through that: it is the constant one at that beta."""
    batch = [[(-5.0, -4.0, 1), (-3.0, -4.5, 1), (-11.0, -5.0, 1)]]
    factor = 1 + 0.5 * math.tanh((-2 - 8 - 6) / 10)
    dynamic = make(name, beta=0.8, negative_selection="boundary", dynamic_beta=0.5)
    constant = make(name, beta=0.8 * factor, negative_selection="boundary")
    losses, gradients = [], []
    for objective in (dynamic, constant):
        policy, *rest = flatten(batch)
        losses.append(objective(policy, *rest)[0])
        gradients.append(torch.autograd.grad(losses[-1], policy)[0])
    assert close(losses[0].item(), losses[1].item())
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-13)


@given(batches)
@settings(max_examples=30, deadline=None)
def test_neighbours_of_the_margin_losses(batch):
    """SimPO without a margin is reference-free, length-normalised DPO; RecPO without one is S-DPO; and at rewards of 0
    IPO pulls 2 / beta^2 times as hard as DPO: its slope in the difference of log-ratios is -1 / beta, DPO's -beta / 2.
    """
    free = make("dpo_pairs", beta=1.5, reference_free=True, length_normalize=True)
    assert close(value(make("simpo", beta=1.5, gamma=0.0), batch), value(free, batch))
    assert close(value(make("recpo", beta=0.5, margin_weight=0.0), batch), value(make("sdpo", beta=0.5), batch))
    at_reference = [[(policy, policy, length) for policy, _, length in group] for group in batch]
    ipo, dpo = (_gradient(make(name, beta=0.25), at_reference) for name in ("ipo", "dpo_pairs"))
    torch.testing.assert_close(ipo, dpo * 2 / 0.25**2, rtol=1e-11, atol=1e-13)


def _gradient(objective, batch):
    policy, *rest = flatten(batch)
    return torch.autograd.grad(objective(policy, *rest)[0], policy)[0]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("ipo", {"label_smoothing": 0.1}, "label_smoothing does not go with name=ipo"),
        ("mult_dpo", {"negative_selection": "boundary"}, "negative_selection does not go with name=mult_dpo"),
        ("simpo", {"reference_free": False}, "reference_free"),
        ("simpo", {"dynamic_beta": 0.5, "negative_selection": "boundary"}, "dynamic_beta does not go with name=simpo"),
        ("dmpo", {"dynamic_beta": 0.5}, "set objective.negative_selection=boundary"),
    ],
)
def test_options_that_do_not_apply_are_refused(name, options, words):
    with pytest.raises(ValueError, match=words):
        OBJECTIVES[name](**options)
