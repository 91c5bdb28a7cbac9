"""Preference groups become token ids: what all candidates share, then one branch per candidate."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from tokenizers import Encoding, models

from dmpo_dist.data.candidates import list_order, require_no_finished_prompts
from dmpo_dist.data.continuation import continuation, encode, joins_spaces, require_end
from dmpo_dist.data.messages import messages_of
from dmpo_dist.data.prompt_texts import PromptTexts
from dmpo_dist.data.schema import PreferenceGroup
from dmpo_dist.data.store import groups_from_rows
from dmpo_dist.data.template import Prompt, Template, special_tokens
from dmpo_dist.errors import UserError

MOST_REMEMBERED = 500_000
"""Titles whose ids are kept; more than catalogues usually have."""


@dataclass(frozen=True)
class TokenGroup:
    """The token ids of a preference group.

    Attributes:
        prefix: ids that all candidates start with; at least one.
        branches: for each candidate, positive first, the ids after the prefix; at least one each.
        scored_from: for each branch, the index of its first scored id; those before it are prompt that differs
            from candidate to candidate (a merge over the boundary, say).
        prefix_scored: indices into ``prefix`` of the ids of history titles, where those are scored too.
        levels, scores: of the candidates, as in ``PreferenceGroup``, or rewards (see ``training/on_policy.py``).
        dropped: number of oldest history titles that did not fit.
    """

    prefix: list[int]
    branches: tuple[list[int], ...]
    scored_from: tuple[int, ...]
    prefix_scored: tuple[int, ...] = ()
    levels: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    dropped: int = field(default=0, compare=False)

    @property
    def ambiguous(self) -> bool:
        """Whether a negative has the positive's ids, as "HEAT" and "Heat" do where a tokenizer lower-cases."""
        return self.branches[0] in self.branches[1:]

    def taking(self, columns: Sequence[int]) -> "TokenGroup":
        """The group with these of its candidates alone, in this order."""
        chosen = (self.branches, self.scored_from, self.levels, self.scores)
        branches, scored_from, levels, scores = (tuple(of[c] for c in columns) if of else () for of in chosen)
        levels = levels if len(branches) > 1 else ()  # one response alone stands above none
        return replace(self, branches=branches, scored_from=scored_from, levels=levels, scores=scores)


class FittedPrompt(NamedTuple):
    """A prompt that fits, and what follows it.

    Attributes:
        dropped: number of oldest history titles left out.
        prompt: what is left, rendered.
        asked: its text, but for spaces at its end where these belong to the responses; encoded: the ids of that.
        responses: for each candidate the ids that follow.
    """

    dropped: int
    prompt: Prompt
    asked: str
    encoded: Encoding
    responses: list[list[int]]


@dataclass
class GroupTokenizer:
    """Tokenizes groups so that what is scored is the response with its terminator, for all candidates alike.

    Prompt and response are tokenized together. Where that merges the prompt's end with the response, the response is
    tokenized apart instead: the prompt's ids are the same for all candidates, as they are when a model is asked. Only
    spaces at the end of a prompt are counted to the responses, where the tokenizer joins a space to any word.

    Every prompt of a template ends in the same text, so BPE ids of a title after it are looked up in a cache. The
    look-up is verified on each group's positive, whose whole text is always tokenized at once.

    Attributes:
        tokenizer: a fast Hugging Face tokenizer.
        template: fills in prompts and responses.
        max_length: longest prompt plus response; the oldest history is dropped to fit.
        score_history: also score the titles of the history (for the likelihood on all titles).
        seed: of the order in which prompts list candidates.
        texts: what further placeholders of the template stand for.
        truncated: number of groups that lost history so far.
        dropped_titles: number of history titles lost so far.
    """

    tokenizer: Any
    template: Template
    max_length: int
    score_history: bool = False
    seed: int = 0
    texts: PromptTexts = field(default_factory=PromptTexts)
    truncated: int = 0
    dropped_titles: int = 0
    _after_tail: dict[str, list[int]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.score_history and not self.template.item_ends:
            raise UserError(
                "sft.loss_on or objective.sft_loss_on is all_titles, but template.item does not end like a response; "
                'end it with {title}{end}, as in template.item="{title}{end}"'
            )
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()  # a tokenizer.json may ask for both, and only the wrapper turns them off by itself
        backend.no_padding()
        self._joins_spaces = joins_spaces(self.tokenizer)
        self._tail = self._asked(self.template.tail)
        self._tail_ids = encode(self.tokenizer, self._tail).ids
        # other models decide by all of a text: Unigram breaks ties so
        self._is_local = isinstance(backend.model, models.BPE) and bool(self._tail_ids)
        require_end(self.tokenizer, self.template)

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
        dropped, prompt, _, encoded, responses = self.fit(group, draw, listed)
        self.truncated += dropped > 0
        self.dropped_titles += dropped
        if not encoded.ids:
            raise UserError(
                f"user {group.user!r}: nothing stands before the response; the tokenizer has no begin token, "
                "so set template.preamble or template.request to some text"
            )
        return TokenGroup(
            prefix=encoded.ids,
            branches=tuple(responses),
            scored_from=(0,) * len(responses),
            prefix_scored=_history_positions(prompt, encoded, self._end_id()) if self.score_history else (),
            levels=group.levels,
            scores=group.scores,
            dropped=dropped,
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
        if _longest(fitted) > self.max_length and last:
            fits = bisect_left(range(1, last), True, key=lambda n: _longest(without(n)) <= self.max_length)
            fitted = without(1 + fits)
        if _longest(fitted) > self.max_length:
            raise self._too_long(group.user, _longest(fitted), len(order))
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
        """The prompt without its ``dropped`` oldest titles and the responses, tokenized."""
        history = group.history[dropped:]
        prompt = self._prompt(group, history, listed)
        before = self._asked(prompt.text)
        spaces = prompt.text[len(before) :]
        responses = [spaces + self._response(title, group.prompt, prompt) for title in _candidates(group)]
        encoded = encode(self.tokenizer, before)
        fixed_tail = group.prompt is None and bool(history or listed)
        look_up = fixed_tail and self._is_local and encoded.ids[-1:] == self._tail_ids[-1:]
        return FittedPrompt(dropped, prompt, before, encoded, self._responses(before, encoded.ids, responses, look_up))

    def _prompt(self, group: PreferenceGroup, history: tuple[str, ...], listed: tuple[str, ...]) -> Prompt:
        if group.prompt is None:
            items = self.texts.of_items((*history, *listed)) if self.texts.item_fields else {}
            return self.template.render(history, listed, items, self.texts.of_user(group.user))
        turns = messages_of(group.prompt)
        return self.template.wrap(group.prompt) if turns is None else self.template.converse(turns, self.tokenizer)

    def _asked(self, prompt: str) -> str:
        return prompt.rstrip(" ") if self._joins_spaces else prompt

    def _response(self, title: str, finished: str | None, prompt: Prompt) -> str:
        if finished is None:
            return self.template.render_response(title)
        return self.template.complete(title, prompt.templated)

    def _responses(
        self, prompt: str, prompt_ids: list[int], responses: Sequence[str], look_up: bool
    ) -> list[list[int]]:
        """The ids of each response after ``prompt``, by ``look_up`` where that is right for the first of them."""
        positive = continuation(self.tokenizer, prompt, prompt_ids, responses[0]).ids
        if look_up and self._look_up(responses[0]) == positive:
            return [positive, *(self._look_up(response) for response in responses[1:])]
        return [
            positive,
            *(continuation(self.tokenizer, prompt, prompt_ids, response).ids for response in responses[1:]),
        ]

    def _look_up(self, response: str) -> list[int]:
        """The ids of ``response`` after the text that ends every prompt.

        A row of BPE ids is right if each pair of neighbours is, so they are those after any prompt that ends with the
        same id; where it merges with the response, the response is tokenized apart, whatever stands before it.
        """
        if response not in self._after_tail:
            if len(self._after_tail) >= MOST_REMEMBERED:  # a server sees new titles for as long as it runs
                self._after_tail.clear()
            self._after_tail[response] = continuation(self.tokenizer, self._tail, self._tail_ids, response).ids
        return self._after_tail[response]

    def _end_id(self) -> int | None:
        """The id of a terminator that is a token of its own."""
        return self.tokenizer.backend_tokenizer.token_to_id(self.template.terminator)


def tokenize_rows(
    rows: Any, tokenizer: GroupTokenizer, negatives: int | None = None, draw: int = 0
) -> list[TokenGroup]:
    """Token groups of a split (a ``Dataset``), with the first ``negatives`` of each row's stored ones (None: all).

    ``draw`` is that of ``GroupTokenizer``.
    """
    groups = groups_from_rows(rows)
    if negatives is not None:
        groups = [group.taking(range(1 + len(group.negatives[:negatives]))) for group in groups]
    return [tokenizer(group, draw) for group in groups]


def _candidates(group: PreferenceGroup) -> tuple[str, ...]:
    return (group.positive, *group.negatives)


def _history_positions(prompt: Prompt, encoded: Encoding, end_id: int | None) -> tuple[int, ...]:
    """Indices of the prompt's ids of history titles and their terminators, except the first id of all.

    Spaces before a title belong to it, as do template characters that its first id takes in. An id that takes in what
    follows a terminator does not count, unless it is the terminator's own (``end_id``) and swallows white space.
    """
    positions, spans, before = [], iter(prompt.titles), 0
    span = next(spans, None)
    for index, (id_, (start, end)) in enumerate(zip(encoded.ids, encoded.offsets, strict=True)):
        while span is not None and start >= span[1]:
            before, span = span[1], next(spans, None)
        if span is None:
            break
        first = before + len(prompt.text[before : span[0]].rstrip(" "))
        ends_inside = end <= span[1] or id_ == end_id
        if index and start >= before and end > first and ends_inside:
            positions.append(index)
    return tuple(positions)


def _longest(fitted: FittedPrompt) -> int:
    return len(fitted.encoded.ids) + max(map(len, fitted.responses))


def check_texts(texts: PromptTexts, tokenizer: Any) -> None:
    """Raise UserError for a field of an item or user that holds a special token of the tokenizer."""
    special = special_tokens(tokenizer)
    for text in texts.texts():
        for token in special:
            if token in text:
                raise UserError(f"the text {text!r} of an item or user contains the special token {token!r}; change it")


def check_titles(titles: Sequence[str], tokenizer: Any) -> None:
    """Raise UserError for a title with a special token, or that the tokenizer drops or cannot represent."""
    special = special_tokens(tokenizer)
    unknown = tokenizer.unk_token_id
    for title in titles:
        for token in special:
            if token in title:
                raise UserError(f"title {title!r} contains the tokenizer's special token {token!r}; rename the item")
        ids = tokenizer(title, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UserError(f"title {title!r} has no character that the tokenizer keeps; rename the item")
        if unknown is not None and unknown in ids:
            raise UserError(f"title {title!r} has characters the tokenizer cannot represent; rename the item")
