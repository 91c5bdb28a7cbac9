"""Requests of several users in one row: prompts that have not run yet, then titles behind any prompt, as tries.

A prompt's keys and values are kept in a ``PromptMemory``, which later rows read: of a user who comes back, or of a
catalogue that takes several rows. A row may hold the titles of several prompts, and prompts beside titles; each title
sees its own prompt and nothing else of the row.

The last token of a prompt is the root of the tries behind it rather than a part of the memory. So the states that
predict first tokens are always in the row, whether the prompt ran in it or in an earlier one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import ClassVar, Self

import torch
from torch import Tensor

from dmpo_dist.batching.targets import Movable, Targets, single_targets
from dmpo_dist.batching.trie import PromptMemory, TriePart


@dataclass(frozen=True)
class NewPrompt:
    """A prompt's tokens but its last, which the row runs, and where their keys and values go."""

    tokens: Sequence[int]
    memory: PromptMemory


@dataclass(frozen=True)
class RequestRow(Movable):
    """``NewPrompt`` after ``NewPrompt``, then ``TriePart`` after ``TriePart``: T tokens.

    Attributes:
        input_ids, position_ids: (1, T) int64.
        prompts: row indices of each new prompt, and the memory that it fills.
        tries: row indices of each part, and the part.
        targets: those of all parts, in their order; each is a response of its own.
    """

    input_ids: Tensor
    position_ids: Tensor
    prompts: tuple[tuple[slice, PromptMemory], ...]
    tries: tuple[tuple[slice, TriePart], ...]
    targets: Targets
    reference_targets: ClassVar[None] = None

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Self:
        tries = tuple((at, part.to(device, non_blocking)) for at, part in self.tries)
        return replace(super().to(device, non_blocking), tries=tries)


def request_row(prompts: Sequence[NewPrompt], parts: Sequence[TriePart]) -> RequestRow:
    """The row of ``prompts`` and ``parts``; a part's memory is filled, or is that of one of ``prompts``."""
    lengths = [*(len(prompt.tokens) for prompt in prompts), *(part.input_ids.shape[1] for part in parts)]
    ends = list(accumulate(lengths))
    spans = [slice(end - length, end) for length, end in zip(lengths, ends, strict=True)]
    of_prompts, of_parts = spans[: len(prompts)], spans[len(prompts) :]
    predicting = [0, *accumulate(len(part.targets.predict_index) for part in parts)]  # states before each part's
    targets = single_targets(
        torch.cat([part.targets.predict_index + at.start for part, at in zip(parts, of_parts, strict=True)]),
        torch.cat([part.targets.target_row + before for part, before in zip(parts, predicting, strict=False)]),
        torch.cat([part.targets.target_ids for part in parts]),
    )
    return RequestRow(
        input_ids=torch.cat([*(torch.tensor([p.tokens]) for p in prompts), *(p.input_ids for p in parts)], dim=1),
        position_ids=torch.cat(
            [*(torch.arange(len(p.tokens))[None] for p in prompts), *(p.position_ids for p in parts)], dim=1
        ),
        prompts=tuple((at, prompt.memory) for at, prompt in zip(of_prompts, prompts, strict=True)),
        tries=tuple(zip(of_parts, parts, strict=True)),
        targets=targets,
    )
