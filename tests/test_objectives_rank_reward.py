"""The policy gradient of rank rewards against REINFORCE written out, and against its neighbours."""

import math
import random

import pytest
import torch

from dmpo_dist.objectives.dpo_pairs import DpoPairs
from dmpo_dist.objectives.groups import Groups
from dmpo_dist.objectives.rank_reward import RankReward, rank_rewards

F64 = torch.float64
KL = 0.3


def groups_of(sizes, scores=None, lengths=None):
    """Groups whose positive comes first."""
    starts = {sum(sizes[:g]) for g in range(len(sizes))}
    n = sum(sizes)
    return Groups(
        torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)),
        torch.tensor([i in starts for i in range(n)]),
        torch.ones(n, dtype=torch.int64) if lengths is None else torch.tensor(lengths),
        len(sizes),
        scores=None if scores is None else torch.tensor(scores, dtype=F64),
    )


def random_logits(n, seed):
    rng = random.Random(seed)
    return torch.tensor([rng.uniform(-5, 0) for _ in range(n)], dtype=F64, requires_grad=True)


@pytest.mark.parametrize("normalize", [False, True])
def test_the_gradient_is_that_of_advantages_times_log_probs(normalize):
    """-mean(A log p) + kl mean(r^2 / 2), advantages as constants, by autograd on a group at a time."""
    sizes, lengths = [4, 2, 5], [3, 1, 2, 4, 2, 2, 1, 1, 3, 2, 5]
    scores = [1.0, -0.5, -1.0, -0.2, 1.0, -1.0, 1.0, -1.0, -0.63, -0.5, -0.43]
    policy, reference = random_logits(11, 0), random_logits(11, 1).detach()
    loss, sums = RankReward(kl=KL, length_normalize=normalize)(policy, reference, groups_of(sizes, scores, lengths))
    (seen,) = torch.autograd.grad(loss, policy)

    expected, start = torch.zeros((), dtype=F64), 0
    for size in sizes:
        part = slice(start, start + size)
        rewards = torch.tensor(scores[part], dtype=F64)
        advantages = (rewards - rewards.mean()) / rewards.std(correction=0)
        terms = -advantages * policy[part] + KL * (policy[part] - reference[part]) ** 2 / 2
        expected = expected + (terms / torch.tensor(lengths[part] if normalize else [1] * size)).mean()
        start += size
    torch.testing.assert_close(seen, torch.autograd.grad(expected, policy)[0], rtol=1e-12, atol=1e-14)
    assert sums["constant_reward"].item() == 0


def test_a_group_of_equal_rewards_is_counted_and_has_no_gradient():
    """Not even that of the penalty: it is as if the group were not there."""
    policy, reference = random_logits(7, 2), random_logits(7, 3).detach()
    scores = [0.0, 0.0, 0.0, 1.0, -1.0, -0.63, -0.5]
    loss, sums = RankReward(kl=KL)(policy, reference, groups_of([3, 4], scores))
    (gradient,) = torch.autograd.grad(loss, policy)
    assert sums["constant_reward"].item() == 1
    assert (gradient[:3] == 0).all()
    alone, _ = RankReward(kl=KL)(policy[3:], reference[3:], groups_of([4], scores[3:]))
    assert loss.item() == pytest.approx(alone.item(), abs=1e-15)
    torch.testing.assert_close(gradient, torch.autograd.grad(alone, policy)[0])


def test_one_negative_starts_as_dpo():
    """Advantages are 1 and -1 whatever the rewards, and DPO's sigmoid is 1/2 where the policy is its reference."""
    policy = random_logits(6, 4)
    reference, groups = policy.detach().clone(), groups_of([2, 2, 2])
    gradients = [
        torch.autograd.grad(loss(policy, reference, groups)[0], policy)[0] for loss in (RankReward(), DpoPairs(beta=1))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)
    assert gradients[0].tolist() == pytest.approx([-0.5, 0.5] * 3)


def test_without_searched_titles_ranks_are_those_of_the_policy():
    """Rank 1 has -1 / log2(2), rank 2 -1 / log2(3), and so on; equal ones share a rank, and the positive takes one."""
    policy = torch.tensor([-2.0, -1.0, -3.0, -3.0, -9.0, -1.0, -2.0, -0.5], dtype=F64)
    seen = rank_rewards(policy, groups_of([5, 3])).tolist()
    third, fifth = 1 / math.log2(4), 1 / math.log2(6)
    assert seen == pytest.approx([1, -1, -third, -third, -fifth, 1, -third, -1])


def test_without_a_penalty_no_reference_is_needed():
    policy, groups = random_logits(3, 5), groups_of([3])
    free, penalised = RankReward(kl=0), RankReward(kl=KL)
    assert not free.needs_reference
    assert free.initial(policy, groups) is None
    gradients = [
        torch.autograd.grad(loss(policy, reference, groups)[0], policy)[0]
        for loss, reference in ((free, None), (penalised, policy.detach()))
    ]
    torch.testing.assert_close(*gradients)
    assert penalised.initial(policy, groups).abs().max() < 1e-15
