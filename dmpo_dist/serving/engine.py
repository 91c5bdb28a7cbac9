"""The thread that owns a model while it serves: requests that arrive together share rows.

Each token group becomes a trie of its responses behind its prompt. A row takes parts of the waiting groups in turn
until ``token_budget`` is reached, so a user's twenty candidates do not wait for another user's whole catalogue. Where
only the best of a catalogue are asked for, the parts are the rounds of a search that leaves most of the trie out. While
a row runs, new groups queue up for the next one: there is no time to wait for company, and a lone request starts at
once.
"""

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from dmpo_dist.batching.request_row import NewPrompt, request_row
from dmpo_dist.batching.trie import PromptMemory, TitleTrie, TriePart, trie_part
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.modeling.ranking_model import RankingModel
from dmpo_dist.modeling.trie_search import Beam, BeamRequest, BestFirst, best_of
from dmpo_dist.serving.prefix_cache import PrefixCache

SHARES = 4
"""A row has room for parts of so many groups at least, where these are longer than the row; and so many searches are
under way at a time."""
REMEMBERED_TRIE = 200
"""Responses from which on a group's trie is kept for the next group that has the same: a catalogue's."""
SEARCH_TOKENS = 4096
"""Titles' tokens whose keys and values a search keeps at most, where rows are not longer."""


class _Work(ABC):
    """A group on its way; the same one may be under way twice."""

    def __init__(self, model: int, group: TokenGroup) -> None:
        self.model, self.group = model, group
        self.future: Future[Any] = Future()

    @abstractmethod
    def result(self) -> Any:
        """What was asked for."""


class _Apart(_Work):
    """Of a model that shares no prompts: runs by itself. ``best``: how many, and which (R,) may be among them."""

    def __init__(self, model: int, group: TokenGroup, ranked: RankingModel, best: tuple[int, np.ndarray] | None):
        super().__init__(model, group)
        self._ranked, self._best = ranked, best

    def result(self) -> Any:
        scores = self._ranked.score_catalogue(self.group)
        return scores if self._best is None else best_of(scores, *self._best)


class _InParts(_Work):
    """Shares rows with others.

    Attributes:
        memory: the keys and values of ``prompt``, the tokens before the root of the trie; None before they are known.
        alone: a row that it shared has failed.
    """

    def __init__(self, model: int, group: TokenGroup) -> None:
        super().__init__(model, group)
        self.prompt = group.prefix[:-1]
        self.memory: PromptMemory | None = None
        self.alone = False

    @abstractmethod
    def tokens(self, number: int) -> int | None:
        """About how many the ``number``-th part of the next row has; None if there is no such part."""

    @abstractmethod
    def part(self, number: int) -> TriePart:
        """That part, once ``memory`` is there; parts of a row are asked for in order."""

    @abstractmethod
    def take(self, log_probs: np.ndarray) -> bool:
        """Go on from the log-probs of the targets of the oldest part that ran; returns whether it was the last."""

    def start_again(self) -> None:
        """After a row that failed."""
        self.memory = None


class _Whole(_InParts):
    """Runs all of the trie; the result is (R,) float64, the log-probs of the responses."""

    def __init__(self, model: int, group: TokenGroup, trie: TitleTrie, most: int) -> None:
        super().__init__(model, group)
        self._trie = trie.rooted(group.prefix[-1])
        self._chunks = deque(self._trie.chunks(max(1, most // SHARES)))
        self._out = np.empty(len(self._trie.token))

    def tokens(self, number: int) -> int | None:
        if number >= len(self._chunks):
            return None
        return len(self._chunks[number]) + (int(self._trie.depth.max()) if number else 0)

    def part(self, number: int) -> TriePart:
        assert self.memory is not None
        return trie_part(self._trie, self._chunks[number], len(self.prompt), self.memory)

    def take(self, log_probs: np.ndarray) -> bool:
        self._out[self._trie.children(self._chunks.popleft())] = log_probs
        return not self._chunks

    def result(self) -> Any:
        return self._trie.log_probs(self._out)


class _Best(_Whole):
    """Runs what may lead to one of the ``top`` best responses, or all where that is hardly less; a list of ``Beam``."""

    def __init__(self, model: int, group: TokenGroup, trie: TitleTrie, most: int, top: int, allowed: np.ndarray):
        super().__init__(model, group, trie, most)
        self._request, self._top, self._kept = BeamRequest(group.prefix, trie, allowed), top, max(most, SEARCH_TOKENS)
        self._search = BestFirst(self._request, top, self._kept)

    def tokens(self, number: int) -> int | None:
        if self._search.gave_up:
            return super().tokens(number)
        return None if number else len(self._search.live)

    def part(self, number: int) -> TriePart:
        if self._search.gave_up:
            return super().part(number)
        assert self.memory is not None
        self._search.memory = self.memory
        return self._search.part()

    def take(self, log_probs: np.ndarray) -> bool:
        if self._search.gave_up:
            return super().take(log_probs)
        self._search.take(log_probs)
        return not self._search.gave_up and not len(self._search.live)

    def result(self) -> Any:
        if self._search.gave_up:
            return best_of(super().result(), self._top, self._request.allowed)
        return self._search.finished

    def start_again(self) -> None:
        super().start_again()
        if not self._search.gave_up:
            self._search = BestFirst(self._request, self._top, self._kept)


@dataclass
class EngineCounts:
    """What the engine has done since it was made.

    Attributes:
        rows: forward passes.
        shared_rows: those that held parts of two groups or more.
        tokens: tokens that ran, prompts and titles.
        groups: groups that were scored.
    """

    rows: int = 0
    shared_rows: int = 0
    tokens: int = 0
    groups: int = 0


class Engine:
    """Scores token groups by one model or by a model and its reference, whatever thread they come from.

    Args:
        models: loaded; a group names one of them by its index. They may share weights.
        token_budget: most tokens in a row, unless a single prompt takes more.
        cache_bytes: of the memories of prompts, divided among the models.

    Attributes:
        counts: see ``EngineCounts``.
        caches: one for each model.
    """

    def __init__(self, models: Sequence[RankingModel], token_budget: int, cache_bytes: int) -> None:
        self._models, self._budget = models, token_budget
        self.caches = [PrefixCache(cache_bytes // len(models)) for _ in models]
        self.counts = EngineCounts()
        self._waiting: deque[_Work] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._trie: tuple[TokenGroup, TitleTrie] | None = None
        self._thread = threading.Thread(target=self._run, name="dmpo-engine", daemon=True)
        self._thread.start()

    def submit(self, group: TokenGroup, model: int = 0) -> Future[np.ndarray]:
        """(R,) float64 log-probs of the responses of ``group``, once they are known; a cancelled group is dropped."""
        if self._models[model].load_weights().trie_obstacle is None:
            return self._put(_Whole(model, group, self._trie_of(group), self._budget))
        return self._put(_Apart(model, group, self._models[model], None))

    def best(self, group: TokenGroup, top: int, allowed: np.ndarray) -> Future[list[Beam]]:
        """The ``top`` best responses by the first model, and what ties with the last; see ``best_titles``.

        Args:
            allowed: (R,) bool, which responses may be among them; at least one.
        """
        if self._models[0].load_weights().trie_obstacle is None:
            return self._put(_Best(0, group, self._trie_of(group), self._budget, top, allowed))
        return self._put(_Apart(0, group, self._models[0], (top, allowed)))

    def _put(self, work: _Work) -> Future[Any]:
        with self._changed:
            if self._closed:
                raise RuntimeError("the engine is closed")
            self._waiting.append(work)
            self._changed.notify()
        return work.future

    @property
    def waiting(self) -> int:
        """Groups that are not finished."""
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def close(self) -> None:
        """End the thread after the row at hand; what waits is cancelled."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        for work in self._waiting:
            work.future.cancel()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                self._drop_cancelled()
            if self._waiting:
                self._step(self._waiting[0])

    def _step(self, first: _Work) -> None:
        """Run a row, or by itself a group whose model shares no prompts; the groups of a row that fails run alone."""
        row: list[tuple[_InParts, int]] = []
        try:
            if isinstance(first, _InParts):
                row = self._choose(first)
                self._run_row(first.model, row)
            else:
                self.counts.rows += 1
                self._finish(first)
        except Exception as error:
            works = list({id(work): work for work, _ in row}.values())
            for work in works:
                work.start_again()
                work.alone = True
            if len(works) <= 1:
                self._remove(first)
                with suppress(InvalidStateError):  # cancelled, maybe at this moment: the thread must go on
                    first.future.set_exception(error)

    def _choose(self, first: _InParts) -> list[tuple[_InParts, int]]:
        """Parts of the waiting groups of one model, the oldest first, in turns until the row is full."""
        row, room, prompts, number = [], self._budget, set(), 0
        with self._changed:
            waiting = list(self._waiting)
        works = [w for w in waiting if isinstance(w, _InParts) and w.model == first.model and not w.alone]
        later = [work for work in works if isinstance(work, _Best)][SHARES:]
        works = [first] if first.alone else [work for work in works if work not in later]
        while works:
            left = []
            for work in works:
                tokens = work.tokens(number)
                if tokens is None:
                    continue
                if work.memory is None and id(work) not in prompts:
                    tokens += len(work.prompt)
                if row and tokens > room:
                    return row
                row.append((work, number))
                room -= tokens
                prompts.add(id(work))
                left.append(work)
            works, number = left, number + 1
        return row

    def _run_row(self, model: int, row: list[tuple[_InParts, int]]) -> None:
        cache = self.caches[model]
        fresh: dict[tuple[int, ...], NewPrompt] = {}  # two groups of a row may have the same prompt, which runs once
        parts: list[TriePart] = []
        for work, number in row:
            if work.memory is None:
                prompt = tuple(work.prompt)
                found = cache.get(prompt) if prompt and prompt not in fresh else None
                if found is None:
                    found = fresh.setdefault(prompt, NewPrompt(prompt, {})).memory
                work.memory = found
            parts.append(work.part(number))
        prompts = [prompt for prompt in fresh.values() if prompt.tokens]
        packed = request_row(prompts, parts)
        log_probs = self._models[model].score_row(packed)
        for prompt in prompts:
            cache.put(prompt.tokens, prompt.memory)
        self.counts.rows += 1
        self.counts.shared_rows += len({id(work) for work, _ in row}) > 1
        self.counts.tokens += packed.input_ids.numel()
        start = 0
        for (work, _), part in zip(row, parts, strict=True):
            end = start + len(part.targets.target_ids)
            if work.take(log_probs[start:end]):
                self._finish(work)
            start = end

    def _finish(self, work: _Work) -> None:
        result = work.result()
        self._remove(work)
        self.counts.groups += 1
        if work.future.set_running_or_notify_cancel():
            work.future.set_result(result)

    def _remove(self, work: _Work) -> None:
        with self._changed:
            if work in self._waiting:
                self._waiting.remove(work)

    def _drop_cancelled(self) -> None:
        for work in [work for work in self._waiting if work.future.cancelled()]:
            self._waiting.remove(work)

    def _trie_of(self, group: TokenGroup) -> TitleTrie:
        last = self._trie
        if last is not None and (last[0].scored_from, last[0].branches) == (group.scored_from, group.branches):
            return last[1]
        trie = TitleTrie.of(group.branches, group.scored_from)
        if len(group.branches) >= REMEMBERED_TRIE:
            self._trie = group, trie
        return trie
