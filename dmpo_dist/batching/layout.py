"""Two ways to lay a batch of preference groups out for one forward pass.

``PrefixLayout`` runs each prompt once. All tokens lie in one flat row [x_1 .. x_E | branches of group 1 | branches of
group 2 ..]. A branch attends to its group's prompt and to itself, and its positions continue where the prompt ends.
``modeling/attention.py`` holds the attention backends that compute this. A group takes P + (K+1)R tokens, unpadded.

``RowsLayout`` runs K+1 separate, padded rows. It is the oracle of the tests and the fallback for models that cannot
share a prompt.

A *branch* is a distinct response of a group: equal responses share one. Both layouts leave out a branch's last token,
which is only predicted and never read, and both describe what is scored by ``Targets``. Layouts are built on the CPU
and then moved to the accelerator with ``to``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from typing import Self

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from dmpo_dist.batching.targets import Movable, TargetCollector, Targets
from dmpo_dist.data.tokenization import TokenGroup


@dataclass(frozen=True)
class PrefixLayout(Movable):
    """Prompts once, then branches, in one row of T tokens.

    Attributes:
        input_ids, position_ids: (1, T) int64; positions restart at 0 for each prompt and at P for each branch.
        token_group: (T,) int64, the group of each token.
        token_branch: (T,) int64, the branch of each token, -1 in a prompt.
        branch_index: (S, R) int64, row positions of each non-empty branch, padded to the longest with 0.
        branch_valid: (S, R) bool, False for that padding.
        prefix_lengths: for each group, tokens of its prompt; the prompts fill the row's start in this order.
        branch_lengths: for each group, tokens of its branches (those with none left out), in row order.
        segment_offsets: (E + S + 1,) int32, where each prompt and each non-empty branch begins, then T.
        prefix_offsets: (E + 1,) int32, where each of the E prompts begins, then the row's first branch.
        run_offsets: (E + 1,) int32, where each group's run of branches begins, counted from the first branch.
        targets: see ``Targets``.
        reference_targets: the same without scored histories, which need no reference; None where no history is scored.
        logical_tokens: tokens of all prompts and full responses, as separate rows would hold them.
    """

    input_ids: Tensor
    position_ids: Tensor
    token_group: Tensor
    token_branch: Tensor
    branch_index: Tensor
    branch_valid: Tensor
    prefix_lengths: tuple[int, ...]
    branch_lengths: tuple[tuple[int, ...], ...]
    segment_offsets: Tensor
    prefix_offsets: Tensor
    run_offsets: Tensor
    targets: Targets
    reference_targets: Targets | None
    logical_tokens: int
    _masks: dict[int | None, Tensor] = field(default_factory=dict, repr=False, compare=False)
    _block_masks: dict[int | None, BlockMask] = field(default_factory=dict, repr=False, compare=False)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Self:
        same = self.input_ids.device == torch.device(device)
        return self if same else replace(super().to(device, non_blocking), _masks={}, _block_masks={})

    def mask(self, window: int | None = None) -> Tensor:
        """(T, T) bool, True where the token of the row attends to the token of the column.

        The mask is made once per window and kept, because every layer asks for it.

        Args:
            window: a token attends to this many positions at most, its own included; None for all before it.
        """
        if window not in self._masks:
            group, branch, position = self.token_group, self.token_branch, self.position_ids[0]
            order = torch.arange(len(group), device=group.device)
            # [i, j]: query i may attend to key j of its own group if j is in the prompt or in the branch of i. (T, T)
            same = (group[:, None] == group) & ((branch == -1) | (branch[:, None] == branch))
            # Causality goes by the index in the row, where a prompt comes before its branches.
            seen = same & (order <= order[:, None])
            # A window goes by position, as other prompts and branches may lie between a branch and its prompt.
            self._masks[window] = seen if window is None else seen & (position > position[:, None] - window)
        return self._masks[window]

    def block_mask(self, window: int | None = None) -> BlockMask:
        """The mask in the form of flex attention, which skips blocks that are all False; kept like ``mask``."""
        if window not in self._block_masks:
            group, branch, position = self.token_group, self.token_branch, self.position_ids[0]

            def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                same = (group[query] == group[key]) & ((branch[key] == -1) | (branch[query] == branch[key]))
                seen = same & (key <= query)
                return seen if window is None else seen & (position[key] > position[query] - window)

            row = self.physical_tokens
            self._block_masks[window] = create_block_mask(sees, None, None, row, row, device=group.device)
        return self._block_masks[window]

    @property
    def spans(self) -> Iterator[tuple[slice, slice]]:
        """For each group, the slices of its prompt and of all its branches."""
        prefix_start, branch_start = 0, self.prefix_tokens
        for prefix, lengths in zip(self.prefix_lengths, self.branch_lengths, strict=True):
            yield slice(prefix_start, prefix_start + prefix), slice(branch_start, branch_start + sum(lengths))
            prefix_start, branch_start = prefix_start + prefix, branch_start + sum(lengths)

    @property
    def physical_tokens(self) -> int:
        """Tokens that go through the model."""
        return self.input_ids.numel()

    @property
    def prefix_tokens(self) -> int:
        """Tokens of all prompts, where the row's first branch begins."""
        return sum(self.prefix_lengths)

    @property
    def longest_prefix(self) -> int:
        """Tokens of the longest prompt."""
        return max(self.prefix_lengths)

    @property
    def longest_run(self) -> int:
        """The largest sum of a group's branch lengths; 0 where no branch runs any token."""
        return max(map(sum, self.branch_lengths))

    @property
    def longest_segment(self) -> int:
        """Tokens of the longest prompt or branch."""
        return max(self.longest_prefix, *(max(lengths, default=0) for lengths in self.branch_lengths))

    @property
    def longest(self) -> int:
        """The largest position + 1: a sliding window of at least this size hides nothing."""
        return max(
            prefix + max(branches, default=0)
            for prefix, branches in zip(self.prefix_lengths, self.branch_lengths, strict=True)
        )


@dataclass(frozen=True)
class RowsLayout(Movable):
    """One padded row per distinct response.

    Attributes:
        input_ids, attention_mask, position_ids: (B, L) int64, padded on the right.
        targets, reference_targets: as in ``PrefixLayout``; positions are flat over B x L.
        logical_tokens: as in ``PrefixLayout``.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    targets: Targets
    reference_targets: Targets | None
    logical_tokens: int

    @property
    def physical_tokens(self) -> int:
        """Tokens that go through the model, padding included."""
        return self.input_ids.numel()


Layout = PrefixLayout | RowsLayout


def prefix_layout(groups: Sequence[TokenGroup]) -> PrefixLayout:
    """Lay ``groups`` out with their prompts shared.

    Raises:
        ValueError: no groups, an empty prompt or an empty response.
    """
    distinct = _all_distinct(groups)
    prefix_lengths = tuple(len(group.prefix) for group in groups)
    prefix_starts = [0, *accumulate(prefix_lengths)]
    # The four lists grow token by token to length T: first the prompts of all groups, then the branches of all groups.
    ids, positions, token_group, token_branch = [], [], [], []
    for index, group in enumerate(groups):
        _extend(ids, positions, token_group, token_branch, group.prefix, 0, index, -1)
    collector = TargetCollector()
    branch_lengths: list[tuple[int, ...]] = []
    bodies: list[range] = []
    for index, (group, branches) in enumerate(zip(groups, distinct, strict=True)):
        start, prefix = prefix_starts[index], len(group.prefix)
        for number, branch in enumerate(branches.rows):
            # The last token of a branch is only a target, so a branch of R tokens takes R - 1 indices of the row.
            bodies.append(range(len(ids), len(ids) + len(branch) - 1))
            # The hidden state at row index at[t] predicts token t. The prompt's last one predicts the first token of
            # every branch, so the K+1 branches share it; it is projected to the vocabulary once (``Targets``).
            at = [start + prefix - 1, *bodies[-1]]
            _extend(ids, positions, token_group, token_branch, branch[:-1], prefix, index, collector.n_branches)
            collector.add_branch([(at[t], branch[t]) for t in range(branches.scored_from[number], len(branch))])
        # A branch of one token runs nothing: its only token is predicted by the prompt. It has no segment in the row.
        branch_lengths.append(tuple(len(row) - 1 for row in branches.rows if len(row) > 1))
        # A scored history token lies in the prompt and is predicted by the token before it.
        history = [(start + t - 1, group.prefix[t]) for t in group.prefix_scored]
        collector.add_group(branches.index, history, group.levels, group.scores)
    branch_index, branch_valid = _padded([body for body in bodies if body])  # (S, R)
    return PrefixLayout(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        token_group=torch.tensor(token_group),
        token_branch=torch.tensor(token_branch),
        branch_index=branch_index,
        branch_valid=branch_valid,
        prefix_lengths=prefix_lengths,
        branch_lengths=tuple(branch_lengths),
        segment_offsets=_offsets([*prefix_lengths, *chain.from_iterable(branch_lengths)]),
        prefix_offsets=_offsets(prefix_lengths),
        run_offsets=_offsets([sum(lengths) for lengths in branch_lengths]),
        targets=collector.targets(),
        reference_targets=collector.reference_targets(),
        logical_tokens=_logical_tokens(groups),
    )


def rows_layout(groups: Sequence[TokenGroup], pad_id: int = 0) -> RowsLayout:
    """Lay ``groups`` out as separate rows; raises like ``prefix_layout``."""
    distinct = _all_distinct(groups)
    rows = [group.prefix + row[:-1] for group, d in zip(groups, distinct, strict=True) for row in d.rows]
    width = max(len(row) for row in rows)
    collector = TargetCollector()
    for group, branches in zip(groups, distinct, strict=True):
        first_row, prefix = collector.n_branches, len(group.prefix)
        for number, branch in enumerate(branches.rows):
            # Branch b is row b of (B, L), and positions are flat over B x L: this one predicts its first token.
            before = collector.n_branches * width + prefix - 1
            collector.add_branch([(before + t, branch[t]) for t in range(branches.scored_from[number], len(branch))])
        # Every row of the group repeats the prompt; its history is scored in the first of them.
        history = [(first_row * width + t - 1, group.prefix[t]) for t in group.prefix_scored]
        collector.add_group(branches.index, history, group.levels, group.scores)
    return RowsLayout(
        input_ids=torch.tensor([row + [pad_id] * (width - len(row)) for row in rows]),
        attention_mask=torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        position_ids=torch.arange(width).expand(len(rows), width).contiguous(),
        targets=collector.targets(),
        reference_targets=collector.reference_targets(),
        logical_tokens=_logical_tokens(groups),
    )


def lay_out(groups: Sequence[TokenGroup], shared: bool) -> Layout:
    """A layout with prompts shared or repeated."""
    return prefix_layout(groups) if shared else rows_layout(groups)


@dataclass(frozen=True)
class Cost:
    """What a group costs in a layout: ``tokens`` for the linear layers, (query, key) ``pairs`` for attention."""

    tokens: int
    pairs: int


def group_cost(group: TokenGroup, shared: bool) -> Cost:
    """Tokens and attention pairs of ``group``, prompt shared or repeated."""
    prefix, bodies = len(group.prefix), [len(row) - 1 for row in _distinct(group).rows]
    if not shared:
        lengths = [prefix + body for body in bodies]
        return Cost(sum(lengths), sum(_triangle(n) for n in lengths))
    # A branch token meets the whole prompt and the tokens of its own branch up to itself.
    return Cost(prefix + sum(bodies), _triangle(prefix) + sum(prefix * n + _triangle(n) for n in bodies))


@dataclass(frozen=True)
class _Distinct:
    rows: list[list[int]]
    scored_from: list[int]
    index: list[int]  # response -> row


def _all_distinct(groups: Sequence[TokenGroup]) -> list[_Distinct]:
    if not groups:
        raise ValueError("there are no groups to lay out")
    return [_distinct(group) for group in groups]


def _distinct(group: TokenGroup) -> _Distinct:
    """The distinct responses of ``group``: equal ones that are scored from the same token run once."""
    if not group.prefix or not group.branches or not all(group.branches):
        raise ValueError("a group needs a prompt and non-empty responses")
    seen: dict[tuple[int, tuple[int, ...]], int] = {}
    index = [
        seen.setdefault((start, tuple(row)), len(seen))
        for row, start in zip(group.branches, group.scored_from, strict=True)
    ]
    return _Distinct([list(row) for _, row in seen], [start for start, _ in seen], index)


def _extend(
    ids: list[int],
    positions: list[int],
    token_group: list[int],
    token_branch: list[int],
    tokens: Sequence[int],
    position: int,
    group: int,
    branch: int,
) -> None:
    ids += tokens
    positions += range(position, position + len(tokens))
    token_group += [group] * len(tokens)
    token_branch += [branch] * len(tokens)


def _offsets(lengths: Sequence[int]) -> Tensor:
    """(S,) lengths -> (S + 1,) int32: the start of each segment, then the end of the last one."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def _padded(bodies: Sequence[range]) -> tuple[Tensor, Tensor]:
    """(S, R) row indices of S branches padded with 0, and (S, R) bool, False for the padding."""
    starts = torch.tensor([body.start for body in bodies], dtype=torch.int64)[:, None]
    lengths = torch.tensor([len(body) for body in bodies], dtype=torch.int64)[:, None]
    offset = torch.arange(max(map(len, bodies), default=0))  # (R,) of a token in its branch
    valid = offset < lengths
    return torch.where(valid, starts + offset, 0), valid


def _logical_tokens(groups: Sequence[TokenGroup]) -> int:
    return sum(len(group.prefix) + len(row) for group in groups for row in group.branches)


def _triangle(n: int) -> int:
    """(query, key) pairs of n tokens under causal attention."""
    return n * (n + 1) // 2
