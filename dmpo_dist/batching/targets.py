"""What a layout scores: which hidden states predict which tokens of which responses and histories."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Movable:
    """A dataclass whose tensor fields move between devices together."""

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Self:
        """A copy on ``device``; DeepSpeed also calls this, and passes its own value of ``non_blocking``."""
        return self._mapped(lambda tensors: tensors.to(device, non_blocking=non_blocking))

    def pinned(self) -> Self:
        """A copy in page-locked memory, from which transfers to an accelerator do not block."""
        return self._mapped(lambda tensors: tensors.pinned() if isinstance(tensors, Movable) else tensors.pin_memory())

    def _mapped(self, change: Callable[[Any], Any]) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: change(v) for n, v in values.items() if isinstance(v, Tensor | Movable)})


@dataclass(frozen=True)
class Targets(Movable):
    """Which hidden states predict which tokens of which responses.

    Attributes:
        predict_index: (M,) int64, the flat positions whose hidden states are projected, ascending and without repeats.
        target_row: (N,) int64, for each scored token the index in ``predict_index`` of the state that predicts it.
        target_ids: (N,) int64, the scored tokens.
        target_branch: (N,) int64, the branch each scored token belongs to.
        response_branch: (R,) int64, the branch of each response; equal responses of a group share one.
        response_lengths: (R,) int64, scored tokens of each response.
        history_branch: (G,) int64, for each group the branch that holds its scored history; (0,) where none is scored.
        history_lengths: the same shape, scored tokens of each history.
        group_id: (R,) int64 in [0, n_groups).
        is_positive: (R,) bool; a group's positive comes first.
        n_branches, n_groups: counts.
        level: (R,) int64, see ``objectives.groups.Groups``; None where no group has levels.
        scores: (R,) float32, the same; None where a group has none.
        n_levels: 1 + the largest level.
    """

    predict_index: Tensor
    target_row: Tensor
    target_ids: Tensor
    target_branch: Tensor
    response_branch: Tensor
    response_lengths: Tensor
    history_branch: Tensor
    history_lengths: Tensor
    group_id: Tensor
    is_positive: Tensor
    n_branches: int
    n_groups: int
    level: Tensor | None = None
    scores: Tensor | None = None
    n_levels: int = 2

    def summed(self, token_log_probs: Tensor) -> Tensor:
        """(N,) log-probs of the scored tokens -> (R,) sums of the responses, then (G,) of the histories if scored."""
        branches = token_log_probs.new_zeros(self.n_branches).index_add(0, self.target_branch, token_log_probs)
        return branches[torch.cat([self.response_branch, self.history_branch])]

    def split(self, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """The result of ``summed`` -> (R,) of the responses, and (G,) or (0,) of the histories."""
        responses = len(self.response_branch)
        return log_probs[:responses], log_probs[responses:]


def single_targets(predict_index: Tensor, target_row: Tensor, target_ids: Tensor) -> Targets:
    """Every scored token as a response of its own, so that ``summed`` returns (N,) log-probs of single tokens.

    Group ids and positives have no meaning then.

    Args:
        predict_index, target_row, target_ids: as in ``Targets``.
    """
    tokens = len(target_ids)
    each = torch.arange(tokens)
    none = torch.empty(0, dtype=torch.int64)
    return Targets(
        predict_index=predict_index,
        target_row=target_row,
        target_ids=target_ids,
        target_branch=each,
        response_branch=each,
        response_lengths=torch.ones_like(each),
        history_branch=none,
        history_lengths=none,
        group_id=torch.zeros_like(each),
        is_positive=torch.zeros_like(each, dtype=torch.bool),
        n_branches=tokens,
        n_groups=1,
    )


class TargetCollector:
    """Collects (position, token) pairs branch by branch; scored histories become branches after all others.

    ``position`` is the flat position whose hidden state predicts ``token``.
    """

    def __init__(self) -> None:
        self.n_branches = 0
        self._scored: list[list[tuple[int, int]]] = []
        self._histories: list[list[tuple[int, int]]] = []
        self._groups: list[list[int]] = []
        self._levels: list[Sequence[int]] = []
        self._scores: list[Sequence[float]] = []
        self._group_start = 0

    def add_branch(self, scored: list[tuple[int, int]]) -> None:
        """Add the (position, token) pairs that are scored in the next branch."""
        self._scored.append(scored)
        self.n_branches += 1

    def add_group(
        self,
        response_rows: list[int],
        history: list[tuple[int, int]],
        levels: Sequence[int] = (),
        scores: Sequence[float] = (),
    ) -> None:
        """Close a group whose responses are the given rows of the branches added since the last one.

        Args:
            levels, scores: of the responses; () for one positive and its negatives, and where none are known.
        """
        self._levels.append(levels)
        self._scores.append(scores)
        self._groups.append([self._group_start + row for row in response_rows])
        self._group_start = self.n_branches
        self._histories.append(history)

    def targets(self) -> Targets:
        """Everything added, histories included."""
        return self._targets(self._histories if any(self._histories) else [])

    def reference_targets(self) -> Targets | None:
        """The same without histories; None where there are none."""
        return self._targets([]) if any(self._histories) else None

    def _targets(self, histories: list[list[tuple[int, int]]]) -> Targets:
        branches = self._scored + histories
        positions = torch.tensor([position for scored in branches for position, _ in scored])  # (N,), with repeats
        # The first tokens of all branches of a group are predicted by one state, the prompt's last. Each state is
        # projected to the vocabulary once, (M, V) logits with M <= N, and target_row reads its row for each token.
        predict_index, target_row = torch.unique(positions, return_inverse=True)
        lengths = torch.tensor([len(scored) for scored in branches])
        response_branch = torch.tensor([branch for group in self._groups for branch in group])
        history_branch = torch.arange(len(self._scored), len(branches))
        return Targets(
            predict_index=predict_index,
            target_row=target_row,
            target_ids=torch.tensor([token for scored in branches for _, token in scored]),
            target_branch=torch.arange(len(branches)).repeat_interleave(lengths),
            response_branch=response_branch,
            response_lengths=lengths[response_branch],
            history_branch=history_branch,
            history_lengths=lengths[history_branch],
            group_id=torch.tensor([g for g, group in enumerate(self._groups) for _ in group]),
            is_positive=torch.tensor([i == 0 for group in self._groups for i in range(len(group))]),
            n_branches=len(branches),
            n_groups=len(self._groups),
            **self._ranks(),
        )

    def _ranks(self) -> dict[str, Any]:
        """The fields of ``Targets`` on levels and scores."""
        ranks: dict[str, Any] = {}
        if any(self._levels):
            groups = zip(self._groups, self._levels, strict=True)
            flat = [level for group, levels in groups for level in levels or [0] + [1] * (len(group) - 1)]
            ranks |= {"level": torch.tensor(flat), "n_levels": 1 + max(flat)}
        if all(self._scores):
            ranks["scores"] = torch.tensor([score for scores in self._scores for score in scores], dtype=torch.float32)
        return ranks
