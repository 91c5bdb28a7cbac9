"""SFT on a new order of each user's titles in every epoch."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmpo_dist.data.reorder import ReorderedGroups, require_histories
from dmpo_dist.data.schema import PreferenceGroup
from dmpo_dist.errors import UserError


def groups_of(likes, longest):
    """Every like but a user's first as a positive, after at most ``longest`` before it."""
    return [
        PreferenceGroup(user, t, tuple(titles[max(0, t - longest) : t]), titles[t], ("never",))
        for user, titles in likes.items()
        for t in range(1, len(titles))
    ]


@given(counts=st.lists(st.integers(2, 9), min_size=1, max_size=4), longest=st.integers(1, 5), seed=st.integers(0, 99))
def test_an_epoch_is_what_the_log_gives_with_each_users_titles_permuted(counts, longest, seed):
    likes = {f"user{u}": [f"{u}:{i}" for i in range(count)] for u, count in enumerate(counts)}
    groups = groups_of(likes, longest)
    reordered = ReorderedGroups(groups, (seed,))
    for epoch in (0, 1):
        seen = [reordered(index, epoch) for index in range(len(groups))]
        order = {user: [*next(g for g in seen if g.user == user).history] for user in likes}
        for group in seen:
            order[group.user].append(group.positive)
        assert {user: Counter(titles) for user, titles in order.items()} == {u: Counter(t) for u, t in likes.items()}
        longest_seen = max(len(group.history) for group in groups)
        expected = groups_of(order, longest_seen)
        assert [(g.history, g.positive) for g in seen] == [(g.history, g.positive) for g in expected]
        assert not any(group.negatives for group in seen)


def test_orders_differ_by_epoch_and_seed_and_are_otherwise_the_same():
    groups = groups_of({"a": [str(i) for i in range(40)], "b": [str(i) for i in range(40)]}, 5)
    drawn = {
        (epoch, seed): [ReorderedGroups(groups, (seed,))(index, epoch).positive for index in range(len(groups))]
        for epoch in (0, 1)
        for seed in (0, 1)
    }
    assert len({tuple(positives) for positives in drawn.values()}) == 4
    assert drawn[0, 0][:39] != drawn[0, 0][39:]
    again = ReorderedGroups(groups, (0,))
    assert [again(index, 0).positive for index in reversed(range(len(groups)))] == drawn[0, 0][::-1]


def test_groups_that_were_drawn_from_a_users_likes_keep_their_number():
    groups = [
        PreferenceGroup("a", 1, ("p", "q"), "r", ()),
        PreferenceGroup("a", 5, ("t", "u"), "v", ()),
    ]
    seen = [ReorderedGroups(groups, (3,))(index, 0) for index in (0, 1)]
    assert {len(group.history) for group in seen} == {2}
    assert len({group.positive for group in seen}) == 2
    assert {*seen[0].history, *seen[1].history, seen[1].positive} <= {"p", "q", "r", "t", "u", "v"}


def test_titles_of_histories_alone_are_named_for_a_check():
    groups = groups_of({"a": ["p", "q", "r"], "b": ["q", "s"]}, 1)
    named = ReorderedGroups(groups, (0,)).not_yet_asked_for
    assert [(group.user, group.positive, group.history) for group in named] == [("a", "p", ()), ("b", "q", ())]


def test_finished_prompts_are_refused():
    require_histories([None, None])
    with pytest.raises(UserError, match=r"sft\.history_order=given"):
        require_histories([None, "Choose: "])
