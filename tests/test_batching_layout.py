"""Layouts against the rows they stand for: what each token sees, what is scored, and what it costs."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmpo_dist.batching.layout import Cost, group_cost, prefix_layout, rows_layout
from dmpo_dist.data.tokenization import TokenGroup

_token = st.integers(1, 4)  # few tokens: prompts and responses look alike, and duplicates are common


@st.composite
def token_groups(draw):
    prefix = draw(st.lists(_token, min_size=1, max_size=6))
    branches = draw(st.lists(st.lists(_token, min_size=1, max_size=4), min_size=1, max_size=5))
    scored_from = tuple(draw(st.integers(0, min(1, len(branch) - 1))) for branch in branches)
    prefix_scored = tuple(sorted(draw(st.sets(st.integers(1, 5))) & set(range(1, len(prefix)))))
    return TokenGroup(prefix, tuple(branches), scored_from, prefix_scored)


batches = st.lists(token_groups(), min_size=1, max_size=4)


def expected_targets(groups):
    """For each response and each scored history what is scored: (all tokens before it, the token), from the group."""
    responses, histories = [], []
    for group in groups:
        for branch, start in zip(group.branches, group.scored_from, strict=True):
            whole, first = group.prefix + branch, len(group.prefix) + start
            responses.append([(tuple(whole[:t]), whole[t]) for t in range(first, len(whole))])
        histories.append([(tuple(group.prefix[:t]), group.prefix[t]) for t in group.prefix_scored])
    return responses, histories if any(histories) else []


def seen_in_prefix_layout(layout):
    """For each token of the row what it sees, in position order, as the mask and the positions say."""
    ids, positions, mask = layout.input_ids[0], layout.position_ids[0], layout.mask()
    contexts = []
    for token in range(layout.physical_tokens):
        seen = sorted(
            (position, int(i)) for position, i in zip(positions[mask[token]].tolist(), ids[mask[token]], strict=True)
        )
        assert [position for position, _ in seen] == list(range(int(positions[token]) + 1))
        contexts.append(tuple(token_id for _, token_id in seen))
    return contexts


def seen_in_rows_layout(layout):
    """The same for separate causal rows; nothing is said about padding."""
    width = layout.input_ids.shape[1]
    assert torch.equal(layout.position_ids, torch.arange(width).expand_as(layout.input_ids))
    contexts = []
    for row, valid in zip(layout.input_ids.tolist(), layout.attention_mask.tolist(), strict=True):
        assert valid == sorted(valid, reverse=True), "padding on the right"
        contexts += [tuple(row[: i + 1]) if valid[i] else None for i in range(width)]
    return contexts


def described_targets(targets, contexts, branches):
    """For each of ``branches`` its scored tokens with what the hidden state that predicts them has seen."""
    place = targets.predict_index[targets.target_row].tolist()
    scored = [(contexts[i], token) for i, token in zip(place, targets.target_ids.tolist(), strict=True)]
    branch_of = targets.target_branch.tolist()
    return [
        [pair for pair, branch in zip(scored, branch_of, strict=True) if branch == wanted]
        for wanted in branches.tolist()
    ]


@given(batches)
@settings(max_examples=120, deadline=None)
def test_both_layouts_score_the_same_tokens_after_the_same_context(groups):
    expected, histories = expected_targets(groups)
    shared, rows = prefix_layout(groups), rows_layout(groups, pad_id=9)
    for layout, contexts in ((shared, seen_in_prefix_layout(shared)), (rows, seen_in_rows_layout(rows))):
        targets = layout.targets
        assert described_targets(targets, contexts, targets.response_branch) == expected
        assert described_targets(targets, contexts, targets.history_branch) == histories
        assert targets.history_lengths.tolist() == [len(scored) for scored in histories]
        assert (layout.reference_targets is None) == (not histories)
        without = layout.reference_targets or targets
        assert described_targets(without, contexts, without.response_branch) == expected
        assert set(without.target_branch.tolist()) == set(without.response_branch.tolist())
        assert targets.response_lengths.tolist() == [len(scored) for scored in expected]
        assert targets.group_id.tolist() == [g for g, group in enumerate(groups) for _ in group.branches]
        assert targets.is_positive.tolist() == [i == 0 for group in groups for i in range(len(group.branches))]
        assert targets.n_groups == len(groups)
        assert targets.predict_index.tolist() == sorted(set(targets.predict_index.tolist()))
        assert layout.logical_tokens == sum(len(g.prefix) + len(b) for g in groups for b in g.branches)


@given(batches)
@settings(max_examples=60, deadline=None)
def test_duplicates_are_computed_once_and_counted_each_time(groups):
    """One branch for equal responses; its gradient is the sum over all that share it."""
    targets = prefix_layout(groups).targets
    owners = [(g, tuple(row), start) for g, group in enumerate(groups)
              for row, start in zip(group.branches, group.scored_from, strict=True)]  # fmt: skip
    assert targets.n_branches == len(set(owners)) + len(targets.history_branch)
    branch_of = dict(zip(owners, targets.response_branch.tolist(), strict=True))
    assert targets.response_branch.tolist() == [branch_of[owner] for owner in owners]
    values = torch.linspace(-3, -1, len(targets.target_ids), dtype=torch.float64, requires_grad=True)
    weights = torch.linspace(-1, 2, len(owners), dtype=torch.float64)
    sums, _ = targets.split(targets.summed(values))
    branch = targets.target_branch.tolist()
    for response, owner in enumerate(owners):
        own = [v for v, b in zip(values.tolist(), branch, strict=True) if b == branch_of[owner]]
        assert math.isclose(sums[response].item(), math.fsum(own), rel_tol=1e-12)
    (sums * weights).sum().backward()
    for b, gradient in zip(branch, values.grad.tolist(), strict=True):
        total = math.fsum(w for w, owner in zip(weights.tolist(), owners, strict=True) if branch_of[owner] == b)
        assert math.isclose(gradient, total, rel_tol=1e-12, abs_tol=1e-12)


@given(batches, st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_a_window_counts_by_position(groups, window):
    """Every token sees the last ``window`` tokens of its own row, wherever they lie in the packed one."""
    layout = prefix_layout(groups)
    positions = layout.position_ids[0]
    full, windowed = layout.mask(), layout.mask(window)
    for token, position in enumerate(positions.tolist()):
        expected = {p for p in positions[full[token]].tolist() if p > position - window}
        assert sorted(positions[windowed[token]].tolist()) == sorted(expected)
        assert len(expected) == min(window, position + 1)
    assert torch.equal(layout.mask(), full), "a windowed mask replaced the full one"
    row = torch.arange(layout.physical_tokens)
    for mask, blocks in ((full, layout.block_mask()), (windowed, layout.block_mask(window))):
        assert torch.equal(blocks.mask_mod(0, 0, row[:, None], row), mask)
        assert blocks.shape[-2:] == mask.shape
    assert torch.equal(layout.mask(layout.longest), full)
    assert not torch.equal(layout.mask(max(1, layout.longest - 1)), full) or layout.longest == 1


@given(batches)
@settings(max_examples=60, deadline=None)
def test_costs_are_the_tokens_and_attention_pairs_of_the_layout(groups):
    shared, rows = prefix_layout(groups), rows_layout(groups)
    costs = [group_cost(group, shared=True) for group in groups]
    assert sum(cost.tokens for cost in costs) == shared.physical_tokens
    assert sum(cost.pairs for cost in costs) == int(shared.mask().sum())
    costs = [group_cost(group, shared=False) for group in groups]
    assert sum(cost.tokens for cost in costs) == int(rows.attention_mask.sum())
    causal = rows.attention_mask.cumsum(1) * rows.attention_mask  # how many tokens each one sees
    assert sum(cost.pairs for cost in costs) == int(causal.sum())


@given(batches)
@settings(max_examples=60, deadline=None)
def test_spans_and_branch_index_find_every_token(groups):
    """What the mask-free attention reads instead of the mask."""
    layout = prefix_layout(groups)
    ids = layout.input_ids[0].tolist()
    covered = []
    for group, (prompt, branches) in zip(groups, layout.spans, strict=True):
        assert ids[prompt] == group.prefix
        distinct = dict.fromkeys(
            (tuple(row), start) for row, start in zip(group.branches, group.scored_from, strict=True)
        )
        assert ids[branches] == [token for row, _ in distinct for token in row[:-1]]
        covered += [*range(*prompt.indices(len(ids))), *range(*branches.indices(len(ids)))]
    assert sorted(covered) == list(range(layout.physical_tokens))
    segments = [
        [i for i, b in enumerate(layout.token_branch.tolist()) if b == branch]
        for branch in range(layout.targets.n_branches)
    ]
    index = [row[valid].tolist() for row, valid in zip(layout.branch_index, layout.branch_valid, strict=True)]
    assert index == [segment for segment in segments if segment]
    assert [n for lengths in layout.branch_lengths for n in lengths] == [len(row) for row in index]
    first = layout.prefix_tokens
    assert layout.segment_offsets.tolist() == sorted(
        {*layout.prefix_offsets.tolist(), *(row[0] for row in index), len(ids)}
    )
    for (prompt, branches), (start, end), (run, run_end) in zip(
        layout.spans,
        pairwise(layout.prefix_offsets.tolist()),
        pairwise(layout.run_offsets.tolist()),
        strict=True,
    ):
        assert (prompt, branches) == (slice(start, end), slice(first + run, first + run_end))
    for offsets, longest in (
        (layout.segment_offsets, layout.longest_segment),
        (layout.prefix_offsets, layout.longest_prefix),
        (layout.run_offsets, layout.longest_run),
    ):
        assert offsets.dtype == torch.int32
        assert int(offsets.diff().max()) == longest
    assert layout.longest == int(layout.position_ids.max()) + 1


def test_responses_of_one_token_need_no_row_of_their_own():
    layout = prefix_layout([TokenGroup([5, 6], ([7], [8], [7]), (0, 0, 0))])
    assert layout.input_ids.tolist() == [[5, 6]]
    assert layout.targets.predict_index.tolist() == [1]
    assert layout.targets.target_ids.tolist() == [7, 8]
    assert layout.targets.response_branch.tolist() == [0, 1, 0]
    assert layout.branch_index.shape == (0, 0)
    assert layout.branch_lengths == ((),)
    assert layout.run_offsets.tolist() == [0, 0]
    assert layout.longest_run == 0
    assert group_cost(TokenGroup([5, 6], ([7], [8], [7]), (0, 0, 0)), shared=True) == Cost(tokens=2, pairs=3)


def test_equal_tokens_scored_from_different_places_are_different_responses():
    layout = prefix_layout([TokenGroup([5], ([6, 7], [6, 7]), (0, 1))])
    assert layout.targets.n_branches == 2
    assert layout.targets.response_lengths.tolist() == [2, 1]


def test_moving_takes_every_tensor_along_and_leaves_the_masks(groups):
    layout = prefix_layout(groups)
    layout.mask()
    assert layout.to("cpu") is layout
    for moved in (layout.to("meta"), rows_layout(groups).to("meta")):
        holders = [vars(moved), vars(moved.targets)]
        tensors = [value for holder in holders for value in holder.values() if isinstance(value, torch.Tensor)]
        assert len(tensors) > 10
        assert all(tensor.is_meta for tensor in tensors)
    assert layout.to("meta").mask().is_meta


@pytest.mark.parametrize("make", [prefix_layout, rows_layout])
@pytest.mark.parametrize(
    "groups",
    [[], [TokenGroup([], ([1],), (0,))], [TokenGroup([1], ([2], []), (0, 0))], [TokenGroup([1], (), ())]],
    ids=["no groups", "no prompt", "an empty response", "no responses"],
)
def test_what_cannot_be_laid_out_is_refused(make, groups):
    with pytest.raises(ValueError, match="group"):
        make(groups)
