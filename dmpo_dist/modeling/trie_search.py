"""The best titles of a catalogue by a search in their trie, which runs only the beginnings that may lead to one.

``best_titles``    exactly the best ones, as the whole trie would rank them: the best beginnings first, until none that
                   is left can lead to a better title (branch and bound; a longer title never has a higher log-prob).
``beam_searches``  a beam search, level by level, as a model would generate titles: a better title may be lost.

A prompt runs once, and so does each beginning's last token: all later ones read their keys and values.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from dmpo_dist.batching.request_row import NewPrompt, request_row
from dmpo_dist.batching.trie import BeamPart, PromptMemory, TitleTrie, beam_part
from dmpo_dist.modeling.scoring import Forward, node_log_probs

FIRST_ROUND = 32
"""Beginnings that ``best_titles`` runs together at first."""
GROWTH = 1.1
"""And from each round to the next so many times more. Larger rounds are fewer, but run more beginnings for nothing."""


class Beam(NamedTuple):
    """A finished title: its index in the catalogue and its summed log-prob."""

    title: int
    log_prob: float


class BeamRequest(NamedTuple):
    """A search: ``prefix``, the ids of the prompt; ``trie`` of all titles; which of these (R,) may be found, or all."""

    prefix: list[int]
    trie: TitleTrie
    allowed: np.ndarray | None = None


def beam_search(forward: Forward, prefix: list[int], trie: TitleTrie, beams: int, device: torch.device) -> list[Beam]:
    """At most ``beams`` titles, best first, each a title of the trie; see ``beam_searches``."""
    return beam_searches(forward, [BeamRequest(prefix, trie)], beams, device)[0]


@torch.no_grad()
def beam_searches(
    forward: Forward, requests: Sequence[BeamRequest], beams: int, device: torch.device, token_budget: int = 4096
) -> list[list[Beam]]:
    """For each request at most ``beams`` titles, best first.

    Level by level the ``beams`` best unfinished beginnings are kept, so with as many beams as titles nothing is lost
    and the result is the full ranking. Several requests run together, a level of each in a row.

    Args:
        forward: of a model whose attention is ``trie_attention``.
        beams: kept beginnings; at least one.
        device: of the model.
        token_budget: most tokens of the prompts that run together, or one prompt.
    """
    found: list[list[Beam]] = []
    for some in _in_rows(requests, token_budget):
        searches = [_BeamSearch(request, beams) for request in some]
        _run(forward, searches, device)
        found += [search.finished for search in searches]
    return found


@torch.no_grad()
def best_titles(
    forward: Forward, request: BeamRequest, top: int, device: torch.device, token_budget: int
) -> list[Beam]:
    """The ``top`` best titles, and all that tie with the last of them, best first; equal ones in catalogue order.

    No beginning runs twice, so that a search never runs more tokens than the whole trie has, unless more than
    ``token_budget`` of them run: then keys and values are let go of, and ancestors that are still needed run again. A
    search that has then run as many tokens as half of the trie has gives up, and the whole trie runs.

    Args:
        forward: of a model whose attention is ``trie_attention``.
        top: at least one.
        device: of the model.
        token_budget: most tokens in a row behind the prompt, and most whose keys and values are kept for the next row.
    """
    search = BestFirst(request, top, token_budget)
    _run(forward, [search], device)
    if not search.gave_up:
        return search.finished
    nodes = node_log_probs(forward, request.prefix, request.trie, token_budget, device)
    return best_of(request.trie.log_probs(nodes), top, request.allowed)


def best_of(scores: np.ndarray, top: int, allowed: np.ndarray | None = None) -> list[Beam]:
    """What ``best_titles`` gives, from scores (R,) of all titles."""
    scores = _broken_first(scores)
    titles = np.arange(len(scores)) if allowed is None else np.flatnonzero(allowed)
    order = titles[np.argsort(-scores[titles], kind="stable")]
    least = scores[order[:top][-1:]]  # of the last that counts; (1,), or (0,) where no title is allowed
    return [Beam(title, score) for title, score in zip(order.tolist(), scores[order].tolist(), strict=True)
            if (score >= least).all()]  # fmt: skip


def _broken_first(scores: np.ndarray) -> np.ndarray:
    """Ranks what is no number first, so that it comes to light instead of hiding below all titles."""
    return np.where(np.isnan(scores), np.inf, scores)


def _run(forward: Forward, searches: Sequence["_Search"], device: torch.device) -> None:
    """Run the searches together to their ends."""
    prompts = [NewPrompt(search.prefix, search.memory) for search in searches if search.prefix]
    while running := [search for search in searches if len(search.live)]:
        row = request_row(prompts, [search.part() for search in running])
        values = forward(row.to(device)).double().cpu().numpy()
        ends = np.cumsum([len(search.level) for search in running])[:-1]
        for search, own in zip(running, np.split(values, ends), strict=True):
            search.take(own)
        prompts = []


def _in_rows(requests: Sequence[BeamRequest], token_budget: int) -> Iterator[list[BeamRequest]]:
    """Consecutive requests whose prompts have at most ``token_budget`` tokens together, or one by itself."""
    row: list[BeamRequest] = []
    for request in requests:
        if row and sum(len(one.prefix) for one in (*row, request)) > token_budget:
            yield row
            row = []
        row.append(request)
    if row:
        yield row


class _Search(ABC):
    """One search, round by round: ``part`` is what runs next, ``take`` gets its log-probs.

    Attributes:
        prefix: the prompt but for its last token, which is the root of the trie, node 0.
        memory: the prompt's keys and values.
        live: the nodes that run next; level: the children of those that ran last.
        finished: the best titles so far, best first, and equal ones in the order of the catalogue.
        ran: how many tokens behind the prompt have run.
    """

    def __init__(self, request: BeamRequest, wanted: int, most_kept: int | None = None) -> None:
        *self.prefix, root = request.prefix
        self._trie, self._wanted, self._most_kept = request.trie.rooted(root), wanted, most_kept
        titles = len(request.trie.ends)
        self._allowed = np.ones(titles, dtype=bool) if request.allowed is None else request.allowed
        ending = np.bincount(self._trie.ends[self._allowed], minlength=len(self._trie.token))
        self._count = self._trie.count_below(ending)  # (N,) allowed titles at and below a node
        self._leads = self._count > ending  # (N,) to a longer allowed title
        self._totals = np.zeros(len(self._trie.token))  # (N,) float64 summed log-probs, of nodes that were a target
        self.memory: PromptMemory = {}
        self._before: PromptMemory = {}
        self._ways: dict[int, list[int]] = {}  # for each node that ran, the numbers by which it and its ancestors did
        self.live = np.zeros(int(self._leads[0]), dtype=np.int64)
        self.level = self.live
        self.finished: list[Beam] = []
        self.ran = 0

    def part(self) -> BeamPart:
        trie = self._trie
        if self._most_kept is not None and len(self._ways) + len(self.live) > self._most_kept:
            self._before, self._ways = {}, {}
        running = trie.with_ancestors(self.live)
        running = running[[node not in self._ways for node in running.tolist()]]  # (T,)
        for node, parent in zip(running.tolist(), trie.parent[running].tolist(), strict=True):
            self._ways[node] = [len(self._ways), *self._ways.get(parent, ())]
        ways = [self._ways[node] for node in running.tolist()]
        deepest = max(map(len, ways))
        ancestors = np.array([way + [-1] * (deepest - len(way)) for way in ways])  # (T, D)
        self.level = trie.children(running)
        self.ran += len(running)
        return beam_part(trie, running, ancestors, len(self.prefix), self.memory, self._before)

    def take(self, log_probs: np.ndarray) -> None:
        """Go on from the log-probs (n,) of the nodes of ``level``."""
        trie, level = self._trie, self.level
        own = (self._count[level] > 0) & np.isin(trie.parent[level], self.live)  # not those of ancestors that ran again
        level, log_probs = level[own], log_probs[own]
        totals = self._totals[trie.parent[level]] + np.where(trie.scored[level], log_probs, 0.0)
        self._totals[level] = _broken_first(totals)
        for node in level.tolist():
            total = float(self._totals[node])
            self.finished += [Beam(t, total) for t in trie.titles_at.get(node, ()) if self._allowed[t]]
        self.finished.sort(key=lambda beam: (-beam.log_prob, beam.title))
        enough = len(self.finished) >= self._wanted
        # A longer title has not more than its beginning, so what is below the last wanted title will not enter.
        least = self.finished[self._wanted - 1].log_prob if enough else -np.inf
        self.live = np.sort(self._choose(level[self._leads[level]], least))

    @abstractmethod
    def _choose(self, new: np.ndarray, least: float) -> np.ndarray:
        """Which nodes run next, given unfinished children of those that ran and what a title needs to enter."""

    def _best_first(self, nodes: np.ndarray, least: float) -> np.ndarray:
        """Those of ``nodes`` that may lead to a wanted title, the most promising first."""
        nodes = nodes[self._totals[nodes] >= least]
        return nodes[np.lexsort((nodes, -self._totals[nodes]))]


class _BeamSearch(_Search):
    """Keeps the best of a level."""

    def _choose(self, new: np.ndarray, least: float) -> np.ndarray:
        self.finished = self.finished[: self._wanted]
        return self._best_first(new, least)[: self._wanted]


class BestFirst(_Search):
    """Keeps all unfinished nodes of any depth, and runs the best of them; see ``best_titles``.

    While ``live`` is not empty, ``part`` is to run and ``take`` to be told its log-probs.

    Attributes:
        gave_up: the whole trie costs little more than what is left; the titles found are not the best.
    """

    def __init__(self, request: BeamRequest, top: int, token_budget: int) -> None:
        super().__init__(request, top, token_budget)
        # Where keys and values were let go of, all ancestors of these nodes may have to run in the same row.
        self._size, self._most = float(FIRST_ROUND), max(1, token_budget // (1 + int(self._trie.depth.max())))
        self._waiting = np.empty(0, dtype=np.int64)
        self._most_run, self.gave_up = max(len(self._trie.inner) // 2, token_budget), False

    def _choose(self, new: np.ndarray, least: float) -> np.ndarray:
        self.finished = [beam for beam in self.finished if beam.log_prob >= least]
        self._waiting = self._best_first(np.concatenate([self._waiting, new]), least)
        self.gave_up = self.ran > self._most_run and len(self._waiting) > 0
        if self.gave_up:
            return self._waiting[:0]
        size = min(int(self._size), self._most)
        self._size *= GROWTH
        chosen, self._waiting = self._waiting[:size], self._waiting[size:]
        return chosen
