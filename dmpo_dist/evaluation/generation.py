"""Titles as a model would generate them: beam search inside a catalogue's trie, and free text that may be no title."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from dmpo_dist.batching.request_row import NewPrompt, request_row
from dmpo_dist.batching.trie import BeamPart, PromptMemory, TitleTrie, beam_part
from dmpo_dist.data.template import Template
from dmpo_dist.modeling.scoring import Forward


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
    and the result is the full ranking. A prompt runs once, and each beginning's last token once: all later ones read
    their keys and values. Several requests run together, a level of each in a row.

    Args:
        forward: of a model whose attention is ``trie_attention``.
        beams: kept beginnings; at least one.
        device: of the model.
        token_budget: most tokens of the prompts that run together, or one prompt.
    """
    found: list[list[Beam]] = []
    for some in _in_rows(requests, token_budget):
        searches = [_Search(request, beams) for request in some]
        prompts = [NewPrompt(s.prefix, s.memory) for s in searches if s.prefix]
        while running := [search for search in searches if len(search.live)]:
            row = request_row(prompts, [search.part() for search in running])
            values = forward(row.to(device)).double().cpu().numpy()
            ends = np.cumsum([len(search.level) for search in running])[:-1]
            for search, own in zip(running, np.split(values, ends), strict=True):
                search.take(own)
            prompts = []
        found += [search.finished for search in searches]
    return found


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


class _Search:
    """One beam search, level by level: ``part`` is what runs next, ``take`` gets its log-probs.

    Attributes:
        prefix: the prompt but for its last token, which is the root of the trie, node 0.
        memory: the prompt's keys and values.
        live: the nodes kept, which run next; level: the children of those that ran last.
        finished: the best titles so far, best first.
    """

    def __init__(self, request: BeamRequest, beams: int) -> None:
        *self.prefix, root = request.prefix
        self._trie, self._beams = request.trie.rooted(root), beams
        titles = len(request.trie.ends)
        self._allowed = np.ones(titles, dtype=bool) if request.allowed is None else request.allowed
        ending = np.bincount(self._trie.ends[self._allowed], minlength=len(self._trie.token))
        self._count = self._trie.count_below(ending)  # (N,) allowed titles at and below a node
        self._leads = self._count > ending  # (N,) to a longer allowed title
        self._totals = {0: 0.0}
        self.memory: PromptMemory = {}
        self._before: PromptMemory = {}
        self._ways: dict[int, list[int]] = {}  # for each node that ran, the numbers by which it and its ancestors did
        self.live = np.zeros(int(self._leads[0]), dtype=np.int64)
        self.level = self.live
        self.finished: list[Beam] = []

    def part(self) -> BeamPart:
        live, parents = self.live.tolist(), self._trie.parent[self.live].tolist()
        for node, parent in zip(live, parents, strict=True):
            self._ways[node] = [len(self._ways), *self._ways.get(parent, ())]
        ancestors = np.array([self._ways[node] for node in live])  # (T, D): all live nodes are equally deep
        self.level = self._trie.children(self.live)
        return beam_part(self._trie, self.live, ancestors, len(self.prefix), self.memory, self._before)

    def take(self, log_probs: np.ndarray) -> None:
        """Go on from the log-probs (n,) of the nodes of ``level``."""
        trie, totals = self._trie, self._totals
        steps = np.where(trie.scored[self.level], log_probs, 0.0).tolist()
        live: list[int] = []
        for node, parent, step in zip(self.level.tolist(), trie.parent[self.level].tolist(), steps, strict=True):
            if not self._count[node]:
                continue
            totals[node] = totals[parent] + step
            self.finished += [Beam(t, totals[node]) for t in trie.titles_at.get(node, ()) if self._allowed[t]]
            if self._leads[node]:
                live.append(node)
        self.finished = sorted(self.finished, key=lambda beam: (-beam.log_prob, beam.title))[: self._beams]
        # a longer title has not more than its beginning, so what is below the last finished beam will not enter
        least = self.finished[-1].log_prob if len(self.finished) == self._beams else -np.inf
        best = sorted((node for node in live if totals[node] >= least), key=lambda node: (-totals[node], node))
        self.live = np.array(sorted(best[: self._beams]), dtype=np.int64)


def greedy_config(tokenizer: Any, template: Template) -> Any:
    """A generation configuration that decodes greedily and ends where a response ends."""
    from transformers import GenerationConfig

    end = tokenizer.backend_tokenizer.encode(template.terminator, add_special_tokens=False).ids
    eos = end[0] if len(end) == 1 else tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos
    return GenerationConfig(do_sample=False, bos_token_id=tokenizer.bos_token_id, eos_token_id=eos, pad_token_id=pad)


@torch.no_grad()
def generate_freely(
    model: Any, tokenizer: Any, template: Template, prompts: Sequence[str], max_new_tokens: int, batch_size: int = 16
) -> list[str]:
    """What ``model`` writes greedily after each prompt, up to the end of a response.

    transformers fills what a generation configuration leaves open from the model's own (sampling, temperature,
    penalties, suppressed tokens); so the model's own is put aside meanwhile.

    Args:
        model: a transformers causal LM or a PEFT model around one, with the attention of ordinary rows
            (``use_backend(model, "unshared")``).
        tokenizer: of the model.
        template: says what ends a response.
        prompts: rendered prompts.
        max_new_tokens: a response that does not end is cut there.
        batch_size: prompts at a time.
    """
    config = greedy_config(tokenizer, template)
    config.max_new_tokens = max_new_tokens
    stops = [] if template.terminator in tokenizer.all_special_tokens else [template.terminator]
    options = {"stop_strings": stops, "tokenizer": tokenizer} if stops else {}
    own, model.generation_config = model.generation_config, config
    try:
        texts: list[str] = []
        for start in range(0, len(prompts), batch_size):
            rows = [
                tokenizer.backend_tokenizer.encode(prompt, add_special_tokens=False).ids
                for prompt in prompts[start : start + batch_size]
            ]
            width = max(map(len, rows))
            ids = torch.tensor([[config.pad_token_id or 0] * (width - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
            out = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=config,
                **options,
            )
            texts += [
                _written(tokenizer, template, row, new.tolist()) for row, new in zip(rows, out[:, width:], strict=True)
            ]
        return texts
    finally:
        model.generation_config = own


def valid_ratio(generated: Sequence[str], template: Template, titles: Sequence[str]) -> float:
    """The share of ``generated`` that is letter by letter the response of one of ``titles``."""
    responses = {template.render_response(title).removesuffix(template.terminator) for title in titles}
    return sum(text in responses for text in generated) / len(generated)


def _written(tokenizer: Any, template: Template, prompt: list[int], new: list[int]) -> str:
    """The text of ``new`` without its end; decoded with ``prompt``, as a decoder may drop a leading space."""
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    before, whole = tokenizer.decode(prompt, **options), tokenizer.decode(prompt + new, **options)
    return whole[len(before) :].split(template.terminator, 1)[0]
