"""A frozen model on its device, and the attention by which responses share their prompt there."""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from dmpo_dist.batching.layout import lay_out, prefix_layout
from dmpo_dist.batching.request_row import RequestRow
from dmpo_dist.batching.trie import TitleTrie
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.attention import NotShareableError
from dmpo_dist.modeling.logprobs import LogProbModel, Which, unwrap_peft
from dmpo_dist.modeling.routing import Route, choose_backend, use_backend
from dmpo_dist.modeling.scoring import deal_for_scoring, node_log_probs, per_token, score_micro_batches, score_rows
from dmpo_dist.modeling.self_check import confirmed, disagreement, probe
from dmpo_dist.modeling.suitability import require_known_ids
from dmpo_dist.modeling.trie_attention import trie_obstacle, use_trie_attention
from dmpo_dist.modeling.trie_search import Beam, BeamRequest, beam_searches, best_of, best_titles

Sharing = Literal["packed", "trie"]


class TokenScorer:
    """Scores token groups, and checks on the first of them that sharing a prompt changes no log-prob of this model.

    A model can lose what a layout says of its prompts (layers that drop keyword arguments do) and then scores every
    title without its history. So before prompts are shared, packed or before a trie, a few responses are compared with
    separate rows, once for each of the two. Where they differ, ``attention="auto"`` goes on with separate rows and
    says so in ``fallback`` and as a warning; any other value is refused.

    Args:
        causal_lm: a frozen transformers causal LM, or a PEFT model around one; its attention is switched here.
        token_budget: most tokens in a row.
        max_length: longest prompt plus response in tokens.
        attention: ``model.attention`` of the configuration.
        reference: as in ``LogProbModel``.

    Attributes:
        route: how packed groups share their prompts.
        trie_obstacle: why a catalogue's titles are scored as separate rows; None where they are not.
        fallback: what the comparison found where it failed; None as long as it did not.
    """

    def __init__(
        self, causal_lm: Any, token_budget: int, max_length: int, attention: str = "auto",
        reference: Literal["adapter_off"] | None = None,
    ) -> None:  # fmt: skip
        self._causal_lm, self._language_model = causal_lm, unwrap_peft(causal_lm)
        self._device: torch.device = self._language_model.device
        self._token_budget, self._asked = token_budget, attention
        self.route: Route = choose_backend(self._language_model, self._device.type, max_length, attention)
        unshared = "model.attention=unshared asks for separate rows" if attention == "unshared" else None
        self.trie_obstacle: str | None = unshared or trie_obstacle(self._language_model, max_length)
        self.fallback: str | None = None
        self._module = LogProbModel(causal_lm, reference)
        self._checked: set[Sharing] = set()
        self._last_trie: tuple[TokenGroup, TitleTrie] | None = None

    def score(
        self, groups: Sequence[TokenGroup], which: Which = "policy", advance: Callable[[int], None] | None = None
    ) -> list[np.ndarray]:
        """For each group (K+1,) float64 log-probs of its responses; groups are packed into rows of the budget.

        Args:
            advance: told how many more groups are scored.
        """
        scores: dict[int, np.ndarray] = {}
        for index, of_group in self.score_share(groups, 0, 1, which):
            scores[index] = of_group
            if advance is not None:
                advance(1)
        return [scores[index] for index in range(len(groups))]

    def score_share(
        self, groups: Sequence[TokenGroup], share: int, shares: int, which: Which = "policy"
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(index of a group, what ``score`` gives for it) for the groups in the rows of one of equal ``shares``.

        Rows are packed as for all groups, so that the numbers are those of ``score`` to the last bit.
        """
        self._require_exact("packed", groups)
        use_backend(self._language_model, self.route.backend)
        batches = deal_for_scoring(groups, 1, self._token_budget, self._shared)[0]
        first, last = share * len(batches) // shares, (share + 1) * len(batches) // shares
        yield from score_micro_batches(self._forward(which), groups, batches[first:last], self._shared, self._device)

    def score_many(self, group: TokenGroup, which: Which = "policy") -> np.ndarray:
        """(R,) float64 log-probs of the responses of one group, however many there are: a trie behind the prompt."""
        self._require_exact("trie", [group])
        if self.trie_obstacle:
            return self._score_rows(group, which)
        use_trie_attention(self._language_model)
        trie = self.trie(group)
        nodes = node_log_probs(self._forward(which), group.prefix, trie, self._token_budget, self._device)
        return trie.log_probs(nodes)

    def best_titles(
        self, group: TokenGroup, top: int, allowed: np.ndarray | None = None, which: Which = "policy"
    ) -> list[Beam]:
        """The ``top`` best responses by ``score_many``, and all that tie with the last; most of the others never run.

        Args:
            allowed: (R,) bool, which responses may be among them; None for all.
        """
        self._require_exact("trie", [group])
        if self.trie_obstacle:
            return best_of(self._score_rows(group, which), top, allowed)
        request = BeamRequest(group.prefix, self.trie(group), allowed)
        use_trie_attention(self._language_model)
        return best_titles(self._forward(which), request, top, self._device, self._token_budget)

    def beam_search(
        self, group: TokenGroup, beams: int, allowed: np.ndarray | None = None, which: Which = "policy"
    ) -> list[Beam]:
        """At most ``beams`` responses, as the model would generate them; see ``beam_searches``.

        Raises:
            UserError: the model cannot share a prompt.
        """
        self._require_exact("trie", [group])
        if self.trie_obstacle:
            raise UserError(
                f"{beams} beams need a prompt that titles share, which is not possible here: {self.trie_obstacle}; "
                "leave ranking.beams or evaluation.catalogue_beams out, as the exact ranking needs no beams"
            )
        request = BeamRequest(group.prefix, self.trie(group), allowed)
        use_trie_attention(self._language_model)
        return beam_searches(self._forward(which), [request], beams, self._device)[0]

    @torch.no_grad()
    def score_row(self, row: RequestRow, which: Which = "policy") -> np.ndarray:
        """(N,) float64 log-probs of the targets of ``row``; for models without ``trie_obstacle`` once that is known."""
        use_trie_attention(self._language_model)
        return self._forward(which)(row.to(self._device)).double().cpu().numpy()

    @torch.no_grad()
    def token_scores(self, groups: Sequence[TokenGroup], which: Which = "policy") -> list[np.ndarray]:
        """For each group of one response (N,) float64 log-probs of its scored tokens, in order."""
        self._require_exact("packed", groups)
        use_backend(self._language_model, self.route.backend)
        out: dict[int, np.ndarray] = {}
        for micro_batch in deal_for_scoring(groups, 1, self._token_budget, self._shared)[0]:
            members = [groups[index] for index in micro_batch.groups]
            layout = per_token(lay_out(members, self._shared)).to(self._device)
            lengths = [len(group.branches[0]) - group.scored_from[0] for group in members]
            parts = self._forward(which)(layout).double().cpu().split(lengths)
            out |= zip(micro_batch.groups, (part.numpy() for part in parts), strict=True)
        return [out[index] for index in range(len(groups))]

    def writer(self) -> Any:
        """The causal LM with the attention of ordinary rows, as ``generate`` needs it; scoring switches it back."""
        use_backend(self._language_model, "unshared")
        return self._causal_lm

    def trie(self, group: TokenGroup) -> TitleTrie:
        """The trie of the group's responses; users of one catalogue mostly share it."""
        last = self._last_trie
        if last and (last[0].branches, last[0].scored_from) == (group.branches, group.scored_from):
            return last[1]
        trie = TitleTrie.of(group.branches, group.scored_from)
        self._last_trie = group, trie
        return trie

    @property
    def _shared(self) -> bool:
        return self.route.backend != "unshared"

    def _forward(self, which: Which) -> Callable[..., torch.Tensor]:
        return partial(self._module, which=which)

    def _score_rows(self, group: TokenGroup, which: Which = "policy") -> np.ndarray:
        use_backend(self._language_model, "unshared")
        return score_rows(self._forward(which), group, self._token_budget, self._device)

    def _require_exact(self, sharing: Sharing, groups: Sequence[TokenGroup]) -> None:
        """Compare with separate rows before prompts are first shared this way.

        Raises:
            UserError: they differ, and separate rows were not left to us; or an id that the model does not know.
        """
        require_known_ids(groups, self._language_model.config)
        obstacle = self.trie_obstacle if sharing == "trie" else None if self._shared else self.route.reason
        if obstacle or sharing in self._checked:
            return
        few = probe(groups, self._token_budget)

        def compare(dtype: torch.dtype) -> str | None:
            expected = [self._score_rows(group) for group in few]
            return disagreement(self._score_shared(sharing, few), expected, dtype)

        quantized = getattr(self._language_model, "hf_quantizer", None) is not None
        try:
            found = confirmed(compare, self._causal_lm, self._language_model.dtype, not quantized)
        except NotShareableError as error:
            found = error.found
        if found is None:
            self._checked.add(sharing)  # not before: whoever goes on after an error must meet it again
            return
        name = f"model.attention={self._asked}" if self._asked != "auto" else "a shared prompt"
        problem = f"{self._language_model.config.model_type}: {name} {found}"
        if self._asked != "auto":
            raise UserError(f"{problem}; use model.attention=unshared or auto")
        self.fallback = f"{problem}; its responses run as separate rows"
        self.route, self.trie_obstacle = Route("unshared", self.fallback), self.fallback
        logging.getLogger(__name__).warning(self.fallback)

    @torch.no_grad()
    def _score_shared(self, sharing: Sharing, groups: Sequence[TokenGroup]) -> list[np.ndarray]:
        """The same responses as they will be scored: all groups in one row, or each as a trie."""
        if sharing == "trie":
            use_trie_attention(self._language_model)
            tries = [(group.prefix, TitleTrie.of(group.branches, group.scored_from)) for group in groups]
            return [
                trie.log_probs(node_log_probs(self._module, prefix, trie, self._token_budget, self._device))
                for prefix, trie in tries
            ]
        use_backend(self._language_model, self.route.backend)
        scores = self._module(prefix_layout(groups).to(self._device)).double().cpu()
        return [part.numpy() for part in scores.split([len(group.branches) for group in groups])]
