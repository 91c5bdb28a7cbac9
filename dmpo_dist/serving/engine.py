"""The thread that owns a model while it serves: requests that arrive together share rows.

Each token group becomes a trie of its responses behind its prompt. A row takes parts of the waiting groups in turn
until ``token_budget`` is reached, so a user's twenty candidates do not wait for another user's whole catalogue. While a
row runs, new groups queue up for the next one: there is no time to wait for company, and a lone request starts at once.
"""

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from dmpo_dist.batching.request_row import NewPrompt, request_row, rooted_trie
from dmpo_dist.batching.trie import PromptMemory, TitleTrie, TriePart, trie_part
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.modeling.ranking_model import RankingModel
from dmpo_dist.serving.prefix_cache import PrefixCache

SHARES = 4
"""A row has room for parts of so many groups at least, where these are longer than the row."""
REMEMBERED_TRIE = 200
"""Responses from which on a group's trie is kept for the next group that has the same: a catalogue's."""


@dataclass(eq=False)
class _Work:
    """A group on its way: what is left of its trie, and what is known of its nodes; another one's may be equal."""

    model: int
    group: TokenGroup
    trie: TitleTrie | None
    future: Future[np.ndarray]
    chunks: deque[np.ndarray] = field(default_factory=deque)
    memory: PromptMemory | None = None
    alone: bool = False
    out: np.ndarray = field(default_factory=lambda: np.empty(0))

    @property
    def prompt(self) -> list[int]:
        """The tokens before the root of the trie."""
        return self.group.prefix[:-1]


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
        future: Future[np.ndarray] = Future()
        work = _Work(model, group, None, future)
        if self._models[model].load_weights().trie_obstacle is None:
            work.trie = self._trie_of(group)
            work.chunks.extend(work.trie.chunks(max(1, self._budget // SHARES)))
            work.out = np.empty(len(work.trie.token))
        with self._changed:
            if self._closed:
                raise RuntimeError("the engine is closed")
            self._waiting.append(work)
            self._changed.notify()
        return future

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
        row: list[tuple[_Work, np.ndarray]] = []
        try:
            if first.trie is None:
                row = [(first, np.empty(0))]
                scores = self._models[first.model].score_catalogue(first.group)
                self.counts.rows += 1
                self._finish(first, scores)
            else:
                row = self._choose(first.model)
                self._run_row(first.model, row)
        except Exception as error:
            works = list({id(work): work for work, _ in row}.values())
            for work in works:
                work.alone, work.memory = True, None
            if len(works) <= 1:
                self._remove(first)
                if not first.future.done():
                    first.future.set_exception(error)

    def _choose(self, model: int) -> list[tuple[_Work, np.ndarray]]:
        """Parts of the waiting groups of ``model``, the oldest first, in turns until the row is full."""
        row, room, prompts = [], self._budget, set()
        with self._changed:
            waiting = list(self._waiting)
        works = [work for work in waiting if work.model == model and work.trie is not None and not work.alone]
        works = waiting[:1] if waiting[0].alone else works
        taken = dict.fromkeys(map(id, works), 0)
        while works:
            left = []
            for work in works:
                number = taken[id(work)]
                if number == len(work.chunks):
                    continue
                chunk = work.chunks[number]
                tokens = len(chunk) + (int(work.trie.depth.max()) if number else 0)  # pyrefly: ignore
                if work.memory is None and id(work) not in prompts:
                    tokens += len(work.prompt)
                if row and tokens > room:
                    return row
                row.append((work, chunk))
                room -= tokens
                prompts.add(id(work))
                taken[id(work)] = number + 1
                left.append(work)
            works = left
        return row

    def _run_row(self, model: int, row: list[tuple[_Work, np.ndarray]]) -> None:
        cache = self.caches[model]
        fresh: dict[tuple[int, ...], NewPrompt] = {}  # two groups of a row may have the same prompt, which runs once
        parts: list[TriePart] = []
        for work, nodes in row:
            if work.memory is None:
                prompt = tuple(work.prompt)
                found = cache.get(prompt) if prompt and prompt not in fresh else None
                if found is None:
                    found = fresh.setdefault(prompt, NewPrompt(prompt, {})).memory
                work.memory = found
            parts.append(trie_part(work.trie, nodes, len(work.prompt), work.memory))  # pyrefly: ignore
        prompts = [prompt for prompt in fresh.values() if prompt.tokens]
        packed = request_row(prompts, parts)
        log_probs = self._models[model].score_row(packed)
        for prompt in prompts:
            cache.put(prompt.tokens, prompt.memory)
        self.counts.rows += 1
        self.counts.shared_rows += len({id(work) for work, _ in row}) > 1
        self.counts.tokens += packed.input_ids.numel()
        start = 0
        for (work, nodes), part in zip(row, parts, strict=True):
            end = start + len(part.targets.target_ids)
            work.out[work.trie.children(nodes)] = log_probs[start:end]  # pyrefly: ignore
            work.chunks.popleft()
            start = end
            if not work.chunks:
                self._finish(work, work.trie.log_probs(work.out))  # pyrefly: ignore

    def _finish(self, work: _Work, scores: np.ndarray) -> None:
        self._remove(work)
        self.counts.groups += 1
        if work.future.set_running_or_notify_cancel():
            work.future.set_result(scores)

    def _remove(self, work: _Work) -> None:
        with self._changed:
            if work in self._waiting:
                self._waiting.remove(work)

    def _drop_cancelled(self) -> None:
        for work in [work for work in self._waiting if work.future.cancelled()]:
            self._waiting.remove(work)

    def _trie_of(self, group: TokenGroup) -> TitleTrie:
        last = self._trie
        same = last is not None and last[0].prefix[-1] == group.prefix[-1] and last[0].scored_from == group.scored_from
        if last is not None and same and last[0].branches == group.branches:
            return last[1]
        trie = rooted_trie(group)
        if len(group.branches) >= REMEMBERED_TRIE:
            self._trie = group, trie
        return trie
