"""Beam search over the catalogue by the engine in training: its own weights, with all ranks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dmpo_dist.batching.layout import lay_out
from dmpo_dist.batching.request_row import request_row
from dmpo_dist.batching.trie import TitleTrie, beam_part
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.logprobs import AnyLayout, unwrap_peft
from dmpo_dist.modeling.routing import Backend, use_backend
from dmpo_dist.modeling.self_check import COMPARED, confirmed, disagreement
from dmpo_dist.modeling.trie_attention import trie_obstacle, use_trie_attention
from dmpo_dist.modeling.trie_search import Beam, BeamRequest, beam_searches


def require_searchable(model: Any, max_length: int) -> None:
    """Raise UserError where titles cannot share a prompt in ``model`` (a transformers causal LM)."""
    obstacle = trie_obstacle(model, max_length)
    if obstacle:
        raise UserError(
            f"train.on_policy searches titles behind a shared prompt, which would be wrong for this model: {obstacle}; "
            "leave train.on_policy out, or take another model"
        )


@dataclass
class TitleSearch:
    """Searches with the weights of ``engine``, whose attention is switched meanwhile.

    Attributes:
        engine: in training; its module takes any layout.
        backend: the attention that training uses.
        beams: width of the search.
        token_budget: most tokens of the prompts that run together.
        device: of the model.
        in_step: whether forwards are collectives (ZeRO-3), so that all ranks must run equally many.
        check: compare the titles of the very first prompt with the layout that training uses.
        can_widen: see ``confirmed``.
    """

    engine: Any
    backend: Backend
    beams: int
    token_budget: int
    device: torch.device
    in_step: bool
    check: bool
    can_widen: bool

    @contextmanager
    def __call__(self) -> Iterator[Callable[[Sequence[BeamRequest]], list[list[Beam]]]]:
        """Opens a search by the weights as they are; all ranks open and close it together."""
        use_trie_attention(self._model)
        try:
            yield self._search
            self._wait_for_others()
        finally:
            use_backend(self._model, self.backend)

    def _search(self, requests: Sequence[BeamRequest]) -> list[list[Beam]]:
        """For each request the titles found, best first.

        Raises:
            UserError: at the first search, the log-probs of the titles are not those that training computes.
        """
        found = beam_searches(self._forward, requests, self.beams, self.device, self.token_budget)
        if self.check:
            self.check = False
            self._require_exact(requests[0])
        return found

    @property
    def _model(self) -> Any:
        return unwrap_peft(self.engine.module.causal_lm)

    def _forward(self, layout: AnyLayout) -> Tensor:
        if self.in_step:
            self._any_running(True)
        return self.engine(layout)

    @torch.no_grad()
    def _wait_for_others(self) -> None:
        """Run a short row as often as another rank still searches."""
        filler = _filler().to(self.device)
        while self.in_step and self._any_running(False):
            self.engine(filler)

    def _any_running(self, running: bool) -> bool:
        """Whether any rank is about to run a row; ranks meet here before each."""
        count = torch.tensor([float(running)], device=self.device)
        dist.all_reduce(count)
        return bool(count.item())

    @torch.no_grad()
    def _require_exact(self, request: BeamRequest) -> None:
        """Compare a few titles found with what training computes for them."""
        shared = self.backend != "unshared"

        def compare(dtype: torch.dtype) -> str | None:
            (found,) = beam_searches(self._forward, [request], min(self.beams, COMPARED), self.device)
            rows = [request.trie.sequence(beam.title) for beam in found]
            group = TokenGroup(request.prefix, tuple(row for row, _ in rows), tuple(start for _, start in rows))
            use_backend(self._model, self.backend)
            expected = self._forward(lay_out([group], shared).to(self.device)).double().cpu().numpy()
            use_trie_attention(self._model)
            return disagreement([np.array([beam.log_prob for beam in found])], [expected], dtype)

        wrong = confirmed(compare, self.engine, self._model.dtype, self.can_widen)
        if wrong is not None:
            raise UserError(
                f"train.on_policy: a search behind a shared prompt {wrong} on this model; leave train.on_policy out, "
                "and please report the model type"
            )


def _filler() -> AnyLayout:
    """A row of one token."""
    return request_row([], [beam_part(TitleTrie.of([[0, 0]], [0]), np.array([0]), np.array([[0]]), 0, {}, {})])
