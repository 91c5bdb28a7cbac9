"""Preference groups become token ids: what all candidates share, then one branch per candidate."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dmpo_dist.data.schema import PreferenceGroup
from dmpo_dist.data.template import Prompt, Template
from dmpo_dist.errors import UserError


@dataclass(frozen=True)
class TokenGroup:
    """The token ids of a preference group.

    Attributes:
        prefix: ids that all candidates start with; at least one.
        branches: for each candidate, positive first, the ids after the prefix; at least one each.
        scored_from: for each branch, the index of its first scored id; those before it are prompt that differs
            from candidate to candidate (a merge over the boundary, say).
        prefix_scored: indices into ``prefix`` of ids that count towards the positive (loss on history titles).
    """

    prefix: list[int]
    branches: tuple[list[int], ...]
    scored_from: tuple[int, ...]
    prefix_scored: tuple[int, ...] = ()


@dataclass
class GroupTokenizer:
    """Tokenizes groups as prompt + response together, so that merges over the boundary stay exact.

    Every prompt of a template ends in the same text, so the ids of a title after it are looked up in a cache. The
    look-up is verified on each group's positive against the whole text tokenized at once; where they differ, all
    candidates of the group are tokenized whole.

    Attributes:
        tokenizer: a fast Hugging Face tokenizer.
        template: fills in prompts and responses.
        max_length: longest prompt plus response; the oldest history is dropped to fit.
        score_history: also score the titles of the history (for SFT).
        truncated: number of groups that lost history so far.
        dropped_titles: number of history titles lost so far.
    """

    tokenizer: Any
    template: Template
    max_length: int
    score_history: bool = False
    truncated: int = 0
    dropped_titles: int = 0
    _after_tail: dict[str, tuple[int, list[int]]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.score_history and not self.template.item_ends:
            raise UserError(
                "sft.loss_on is all_titles, but template.item does not end like a response; "
                'end it with {title}{end}, as in template.item="{title}{end}"'
            )
        self._tail_ids = self._ids(self.template.tail)

    def __call__(self, group: PreferenceGroup) -> TokenGroup:
        """Token ids of ``group``.

        Raises:
            UserError: the prompt without any history and the longest response exceed ``max_length``, the prompt is
                empty, or a title contains one of the tokenizer's special tokens.
        """
        candidates = (group.positive, *group.negatives)
        history = group.history
        while True:
            prompt = self.template.render(history) if group.prompt is None else self.template.wrap(group.prompt)
            prompt_ids, rows = self._rows(prompt, candidates, fixed_tail=group.prompt is None and bool(history))
            longest = max(len(row) for row in rows)
            if longest <= self.max_length:
                break
            if not history:
                raise UserError(
                    f"user {group.user!r}: the prompt and its longest candidate take {longest} tokens, more than "
                    f"model.max_length={self.max_length}; raise model.max_length or shorten the template or titles"
                )
            history = history[max(1, len(history) * (longest - self.max_length) // longest) :]
        self.truncated += history != group.history
        self.dropped_titles += len(group.history) - len(history)
        scored = tuple(_common(prompt_ids, row) for row in rows)
        shared = min(_common_all(rows), min(scored))
        if shared == 0:
            raise UserError(
                f"user {group.user!r}: nothing stands before the response; the tokenizer has no begin token, "
                "so set template.preamble or template.request to some text"
            )
        return TokenGroup(
            prefix=rows[0][:shared],
            branches=tuple(row[shared:] for row in rows),
            scored_from=tuple(start - shared for start in scored),
            prefix_scored=self._history_positions(prompt, shared) if self.score_history else (),
        )

    def _rows(
        self, prompt: Prompt, candidates: Sequence[str], fixed_tail: bool
    ) -> tuple[list[int], list[list[int]]]:
        """Ids of the prompt alone, and of prompt + response for each candidate."""
        responses = [self.template.render_response(title) for title in candidates]
        prompt_ids, positive = self._ids(prompt.text), self._ids(prompt.text + responses[0])
        if fixed_tail:
            rows = [self._continue(prompt_ids, response) for response in responses]
            if rows[0] == positive:
                return prompt_ids, rows
        return prompt_ids, [positive, *(self._ids(prompt.text + response) for response in responses[1:])]

    def _continue(self, prompt_ids: list[int], response: str) -> list[int]:
        """Prompt ids with the ids of ``response`` as they come out after the template's tail."""
        if response not in self._after_tail:
            ids = self._ids(self.template.tail + response)
            same = _common(self._tail_ids, ids)
            self._after_tail[response] = (len(self._tail_ids) - same, ids[same:])
        merged, ids = self._after_tail[response]
        return prompt_ids[: len(prompt_ids) - merged] + ids

    def _history_positions(self, prompt: Prompt, limit: int) -> tuple[int, ...]:
        """Indices of prompt tokens inside a history title or its terminator, except the first token of all."""
        offsets = self.tokenizer(prompt.text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        positions, spans = [], iter(prompt.titles)
        span = next(spans, None)
        for index, (start, end) in enumerate(offsets[:limit]):
            while span is not None and start >= span[1]:
                span = next(spans, None)
            if span is not None and index and start >= span[0] and end <= span[1]:
                positions.append(index)
        return tuple(positions)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def check_titles(titles: Sequence[str], tokenizer: Any) -> None:
    """Raise UserError for a title that contains a special token or that the tokenizer cannot represent."""
    special = [token for token in tokenizer.all_special_tokens if token.strip()]
    unknown = tokenizer.unk_token_id
    for title in titles:
        for token in special:
            if token in title:
                raise UserError(f"title {title!r} contains the tokenizer's special token {token!r}; rename the item")
        if unknown is not None and unknown in tokenizer(title, add_special_tokens=False)["input_ids"]:
            raise UserError(f"title {title!r} has characters the tokenizer cannot represent; rename the item")


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    limit = min(len(a), len(b))
    return next((i for i in range(limit) if a[i] != b[i]), limit)


def _common_all(rows: Sequence[Sequence[int]]) -> int:
    """Length of the prefix common to all rows (that of the smallest and the largest)."""
    return _common(min(rows), max(rows))
