"""Log-probs for explanations, by the forward passes that training and ranking use."""

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import torch

from dmpo_dist.batching.layout import group_cost, lay_out
from dmpo_dist.config import RunConfig
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.evaluation.catalogue import TitleScorer
from dmpo_dist.evaluation.scoring import deal_for_scoring, score_groups
from dmpo_dist.explanation.tokens import per_token
from dmpo_dist.modeling.backbone import load_for_scoring
from dmpo_dist.modeling.logprobs import LogProbModel, unwrap_peft
from dmpo_dist.modeling.routing import choose_backend, use_backend

Which = Literal["policy", "reference"]


class LoadedModel:
    """A frozen model that scores packed groups, whole catalogues, and titles token by token.

    Args:
        path: model folder or hub id.
        config: gives model settings and ``evaluation.token_budget``.
        base_too: also score by the adapter's base, which is then the "reference".
        catalogue: groups are too large to pack, so their titles follow the prompt as a trie; see ``needs_trie``.
    """

    def __init__(self, path: str, config: RunConfig, base_too: bool, catalogue: bool) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._budget = config.evaluation.token_budget
        self._model = load_for_scoring(path, config.model).to(self._device)
        self._language_model = unwrap_peft(self._model)
        route = choose_backend(self._language_model, self._device.type, config.model.max_length, config.model.attention)
        self._backend, self._shared = route.backend, route.backend != "unshared"
        self._reference: Literal["adapter_off"] | None = "adapter_off" if base_too else None
        self._log_probs = LogProbModel(self._model, self._reference)
        self._catalogue = catalogue
        self._titles: TitleScorer | None = None
        use_backend(self._language_model, self._backend)

    def scores(self, groups: Sequence[TokenGroup], which: Which = "policy") -> list[np.ndarray]:
        """For each group (R,) float64 log-probs of its responses: many groups in a row of the token budget, or a
        catalogue's trie for one prompt after another."""
        if not self._catalogue:
            return score_groups(
                lambda layout: self._log_probs(layout, which), groups, self._budget, self._shared, self._device
            )
        if self._titles is None:  # this switches the model's attention
            self._titles = TitleScorer(
                self._model, self._budget, self._device, self._backend == "unshared", self._reference
            )
        return [self._titles(group, which) for group in groups]

    @torch.no_grad()
    def token_scores(self, groups: Sequence[TokenGroup], which: Which = "policy") -> list[np.ndarray]:
        """For each group of one response (N,) float64 log-probs of its scored tokens, in order."""
        self._titles = None
        use_backend(self._language_model, self._backend)
        out: dict[int, np.ndarray] = {}
        for micro_batch in deal_for_scoring(groups, 1, self._budget, self._shared)[0]:
            members = [groups[index] for index in micro_batch.groups]
            layout = per_token(lay_out(members, self._shared)).to(self._device)
            lengths = [len(group.branches[0]) - group.scored_from[0] for group in members]
            parts = self._log_probs(layout, which).double().cpu().split(lengths)
            out |= zip(micro_batch.groups, (part.numpy() for part in parts), strict=True)
        return [out[index] for index in range(len(groups))]


def needs_trie(groups: Iterable[TokenGroup], token_budget: int) -> bool:
    """Whether a group's responses, packed behind their prompt, would take more than a row of ``token_budget``."""
    return any(group_cost(group, shared=True).tokens > token_budget for group in groups)
