"""One user's titles ranked by a model: what a worker of `dmpo rank` does."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from dmpo_dist.config import RunConfig
from dmpo_dist.data.requests import Catalogue, RankingRequest
from dmpo_dist.data.schema import PreferenceGroup
from dmpo_dist.data.template import make_template
from dmpo_dist.data.tokenization import GroupTokenizer, TokenGroup
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.catalogue import TitleScorer, adjusted
from dmpo_dist.modeling.backbone import (
    ModelSource,
    enforce_template,
    find_model,
    load_for_scoring,
    load_tokenizer,
    read_model_config,
)


@dataclass(frozen=True)
class RankedTitles:
    """The best titles of a user, best first, and what they were ranked by."""

    user: str
    titles: list[str]
    scores: list[float]


class Ranker:
    """Ranks one user after another; equal scores keep the order of the candidates.

    Args:
        model: model folder or hub id.
        config: gives template, model, evaluation and ranking settings.
        catalogue: what users without candidates choose from, and the titles' popularity.
        top: how many titles are kept.

    Raises:
        UserError: a model, reference or template that cannot be used.
    """

    def __init__(self, model: str, config: RunConfig, catalogue: Catalogue | None, top: int) -> None:
        source = find_model(model)
        tokenizer = load_tokenizer(source)
        template = make_template(enforce_template(source.stamp, config.template, model), tokenizer)
        self._tokenize = GroupTokenizer(tokenizer, template, config.model.max_length)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model, self._config, self._catalogue, self._top = model, config, catalogue, top
        reference = reference_of(source, config.ranking.reference)
        base = source.is_adapter and reference == source.base
        self._policy = self._load(model, base)
        self._reference: Callable[[TokenGroup], np.ndarray] | None = None
        if base:
            self._reference = lambda group: self._policy(group, "reference")
        elif reference is not None:
            if load_tokenizer(find_model(reference)).get_vocab() != tokenizer.get_vocab():
                raise UserError(
                    f"ranking.reference={reference}: has another tokenizer than {model}, so their log-probs cannot be "
                    "compared; name a model with the same one"
                )
            self._reference = self._load(reference, False)
        counts = catalogue.counts if catalogue else None
        self._log_popularity = (
            dict(zip(catalogue.titles, np.log1p(counts), strict=True)) if catalogue and counts is not None else None
        )

    def __call__(self, request: RankingRequest) -> RankedTitles:
        """Rank ``request``.

        Raises:
            UserError: a prompt that does not fit into ``model.max_length``, or scores that are not finite.
        """
        candidates = np.array(request.candidates or (self._catalogue.titles if self._catalogue else ()), dtype=object)
        scores = self.scores(request, candidates)
        if not np.isfinite(scores).all():
            raise UserError(
                f"--model {self._model}: a score of user {request.user!r} is not finite; its training diverged or its "
                f"weights are damaged, or model.dtype={self._config.model.dtype} is too narrow: try model.dtype=float32"
            )
        if request.candidates is None and self._config.ranking.exclude_history:
            new = ~np.isin(candidates, request.history)
            candidates, scores = candidates[new], scores[new]
        order = np.argsort(-scores, kind="stable")[: self._top]
        return RankedTitles(request.user, candidates[order].tolist(), scores[order].tolist())

    def scores(self, request: RankingRequest, candidates: np.ndarray) -> np.ndarray:
        """(R,) float64, what ``candidates`` (R titles) are ranked by."""
        first, *rest = candidates.tolist()
        group = self._tokenize(PreferenceGroup(request.user, 0, request.history, first, tuple(rest)))
        lengths = np.array([len(b) - s for b, s in zip(group.branches, group.scored_from, strict=True)])
        weight = self._config.ranking.popularity_weight
        popularity = None
        if weight and self._log_popularity is not None:
            popularity = np.array([self._log_popularity[title] for title in candidates])
        return adjusted(
            self._policy(group), lengths,
            reference=self._reference(group) if self._reference else None,
            log_popularity=popularity,
            length_normalize=self._config.ranking.length_normalize,
            popularity_weight=weight,
        )  # fmt: skip

    def _load(self, path: str, base_too: bool) -> TitleScorer:
        model = load_for_scoring(path, self._config.model).to(self._device)
        unshared = self._config.model.attention == "unshared"
        budget = self._config.evaluation.token_budget
        return TitleScorer(model, budget, self._device, unshared, "adapter_off" if base_too else None)


def reference_of(source: ModelSource, asked: str | None) -> str | None:
    """Folder or hub id of the model whose log-probs are subtracted; None for none.

    Raises:
        UserError: the model has no base or does not say what it started from.
    """
    if asked == "base":
        if not source.is_adapter:
            raise UserError(
                f"ranking.reference=base: {source.path} is a whole model without a base; name a folder, or start"
            )
        return source.base
    if asked == "start":
        start = source.stamp.start
        if not start:
            raise UserError(
                f"ranking.reference=start: {source.path} does not say what it was started from; name that model's folder"
            )
        find_model(start)
        return start
    return find_model(asked).path if asked else None


def within_context(source: ModelSource, config: RunConfig) -> RunConfig:
    """``config`` with its ``model.max_length`` lowered to the context of ``source``, where nobody asked for another."""
    context = getattr(read_model_config(source.base, 0), "max_position_embeddings", None)
    if not context or "max_length" in config.model.model_fields_set or config.model.max_length <= context:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"max_length": context})})
