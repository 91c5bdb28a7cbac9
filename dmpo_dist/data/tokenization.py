"""Preference groups become token ids: what all candidates share, then one branch per candidate."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from tokenizers import Encoding

from dmpo_dist.data.candidates import list_order, require_no_finished_prompts
from dmpo_dist.data.schema import PreferenceGroup
from dmpo_dist.data.store import groups_from_rows
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
        prefix_scored: indices into ``prefix`` of the ids of history titles, where those are scored too.
    """

    prefix: list[int]
    branches: tuple[list[int], ...]
    scored_from: tuple[int, ...]
    prefix_scored: tuple[int, ...] = ()


class FittedPrompt(NamedTuple):
    """A prompt that fits, and what follows it.

    Attributes:
        dropped: number of oldest history titles left out.
        prompt: what is left, rendered; encoded: its ids.
        rows: for each candidate (number of ids that prompt + response shares with the prompt, the rest).
    """

    dropped: int
    prompt: Prompt
    encoded: Encoding
    rows: list[tuple[int, list[int]]]


@dataclass
class GroupTokenizer:
    """Tokenizes groups as prompt + response together, so that merges over the boundary stay exact.

    Every prompt of a template ends in the same text, so the ids of a title after it are looked up in a cache, where
    merges that reach further back than that text are ruled out; else prompt and candidate are tokenized whole. The
    look-up is also verified on each group's positive, whose whole text is always tokenized at once.

    Attributes:
        tokenizer: a fast Hugging Face tokenizer.
        template: fills in prompts and responses.
        max_length: longest prompt plus response; the oldest history is dropped to fit.
        score_history: also score the titles of the history (for the likelihood on all titles).
        seed: of the order in which prompts list candidates.
        truncated: number of groups that lost history so far.
        dropped_titles: number of history titles lost so far.
    """

    tokenizer: Any
    template: Template
    max_length: int
    score_history: bool = False
    seed: int = 0
    truncated: int = 0
    dropped_titles: int = 0
    _after_tail: dict[str, tuple[int, list[int]]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.score_history and not self.template.item_ends:
            raise UserError(
                "sft.loss_on or objective.sft_loss_on is all_titles, but template.item does not end like a response; "
                'end it with {title}{end}, as in template.item="{title}{end}"'
            )
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()  # a tokenizer.json may ask for both, and only the wrapper turns them off by itself
        backend.no_padding()
        self._tail_ids = self._ids(self.template.tail)

    def __call__(self, group: PreferenceGroup, draw: int = 0, listed: Sequence[str] = ()) -> TokenGroup:
        """Token ids of ``group``.

        Args:
            draw: which order of the candidates, where the prompt lists them; see ``list_order``.
            listed: titles that the prompt lists; none takes the candidates.

        Raises:
            UserError: the prompt without any history and the longest response exceed ``max_length``, the prompt is
                empty, or it is a finished one and should list candidates. ``check_titles`` looks for special tokens in
                titles.
        """
        dropped, prompt, encoded, rows = self.fit(group, draw, listed)
        self.truncated += dropped > 0
        self.dropped_titles += dropped
        shared = min(start for start, _ in rows)
        if shared == 0:
            raise UserError(
                f"user {group.user!r}: nothing stands before the response; the tokenizer has no begin token, "
                "so set template.preamble or template.request to some text"
            )
        prompt_ids = encoded.ids
        return TokenGroup(
            prefix=prompt_ids[:shared],
            branches=tuple(prompt_ids[shared:start] + rest for start, rest in rows),
            scored_from=tuple(start - shared for start, _ in rows),
            prefix_scored=_history_positions(prompt, encoded, shared) if self.score_history else (),
        )

    def fit(self, group: PreferenceGroup, draw: int = 0, listed: Sequence[str] = ()) -> FittedPrompt:
        """The prompt of ``group`` with as much of its history as fits; arguments and errors as of a call."""
        order: tuple[str, ...] = ()
        if self.template.lists_candidates:
            require_no_finished_prompts(self.template, [group.prompt], f"the row of user {group.user!r}")
            order = list_order(listed or _candidates(group), self.seed, group.user, group.timestamp, draw)

        def without(oldest: int) -> FittedPrompt:
            return self._without_oldest(group, oldest, order)

        last, fitted = len(group.history), without(0)
        if _longest(fitted.rows) > self.max_length and last:
            fits = bisect_left(range(1, last), True, key=lambda n: _longest(without(n).rows) <= self.max_length)
            fitted = without(1 + fits)
        if _longest(fitted.rows) > self.max_length:
            raise self._too_long(group.user, _longest(fitted.rows), len(order))
        return fitted

    def _too_long(self, user: str, tokens: int, listed: int) -> UserError:
        if listed:
            return UserError(
                f"user {user!r}: without any history the prompt, which lists {listed} candidates, and its longest "
                f"response take {tokens} tokens, more than model.max_length={self.max_length}; raise model.max_length, "
                "list fewer candidates or shorten the template or titles"
            )
        return UserError(
            f"user {user!r}: the prompt and its longest candidate take {tokens} tokens, more than "
            f"model.max_length={self.max_length}; raise model.max_length or shorten the template or titles"
        )

    def _without_oldest(self, group: PreferenceGroup, dropped: int, listed: tuple[str, ...]) -> FittedPrompt:
        """The prompt without its ``dropped`` oldest titles, tokenized, and what ``_rows`` gives for it."""
        history = group.history[dropped:]
        prompt = self.template.render(history, listed) if group.prompt is None else self.template.wrap(group.prompt)
        encoded = self._encode(prompt.text)
        fixed_tail = group.prompt is None and bool(history or listed)
        return FittedPrompt(
            dropped, prompt, encoded, self._rows(prompt.text, encoded.ids, _candidates(group), fixed_tail)
        )

    def _rows(
        self, prompt: str, prompt_ids: list[int], candidates: Sequence[str], fixed_tail: bool
    ) -> list[tuple[int, list[int]]]:
        """Prompt + response of each candidate as (number of ids it shares with the prompt, the rest)."""
        responses = [self.template.render_response(title) for title in candidates]
        positive = self._whole(prompt, prompt_ids, responses[0])
        look_up = fixed_tail and self._continue(prompt_ids, responses[0]) == positive
        rows = [positive]
        for response in responses[1:]:
            row = self._continue(prompt_ids, response) if look_up else None
            rows.append(self._whole(prompt, prompt_ids, response) if row is None else row)
        return rows

    def _whole(self, prompt: str, prompt_ids: list[int], response: str) -> tuple[int, list[int]]:
        """Prompt and response tokenized at once."""
        ids = self._ids(prompt + response)
        same = _common(prompt_ids, ids)
        return same, ids[same:]

    def _continue(self, prompt_ids: list[int], response: str) -> tuple[int, list[int]] | None:
        """What ``_whole`` gives, from how ``response`` comes out after the template's tail; None where that may differ.

        A row of BPE ids is right if each pair of neighbours is. So the ids of the tail that the response changes, and
        one more before them that it does not, must stand at the end of this prompt too.
        """
        if response not in self._after_tail:
            ids = self._ids(self.template.tail + response)
            same = _common(self._tail_ids, ids)
            self._after_tail[response] = (len(self._tail_ids) - same, ids[same:])
        merged, rest = self._after_tail[response]
        if merged == len(self._tail_ids) or prompt_ids[-merged - 1 :] != self._tail_ids[-merged - 1 :]:
            return None
        return len(prompt_ids) - merged, rest

    def _ids(self, text: str) -> list[int]:
        return self._encode(text).ids

    def _encode(self, text: str) -> Encoding:
        # the Rust tokenizer itself: the wrapper around it costs several times the tokenization of a short text
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)


def tokenize_rows(
    rows: Any, tokenizer: GroupTokenizer, negatives: int | None = None, draw: int = 0
) -> list[TokenGroup]:
    """Token groups of a split (a ``Dataset``), with the first ``negatives`` of each row's stored ones (None: all).

    ``draw`` is that of ``GroupTokenizer``.
    """
    groups = groups_from_rows(rows)
    if negatives is not None:
        groups = [replace(group, negatives=group.negatives[:negatives]) for group in groups]
    return [tokenizer(group, draw) for group in groups]


def _candidates(group: PreferenceGroup) -> tuple[str, ...]:
    return (group.positive, *group.negatives)


def _history_positions(prompt: Prompt, encoded: Encoding, limit: int) -> tuple[int, ...]:
    """Indices of prompt tokens inside a history title or its terminator, except the first token of all."""
    positions, spans = [], iter(prompt.titles)
    span = next(spans, None)
    for index, (start, end) in enumerate(encoded.offsets[:limit]):
        while span is not None and start >= span[1]:
            span = next(spans, None)
        if span is not None and index and start >= span[0] and end <= span[1]:
            positions.append(index)
    return tuple(positions)


def _longest(rows: list[tuple[int, list[int]]]) -> int:
    return max(start + len(rest) for start, rest in rows)


def check_titles(titles: Sequence[str], tokenizer: Any) -> None:
    """Raise UserError for a title that contains a special token or that the tokenizer cannot represent."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    special = [token for token in dict.fromkeys([*tokenizer.all_special_tokens, *added]) if token.strip()]
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
