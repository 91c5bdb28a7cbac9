"""A model as it is used: its tokenizer and template, its weights on a device, and how responses share their prompt."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd
import torch

from dmpo_dist.batching.request_row import RequestRow
from dmpo_dist.config import ModelConfig, RunConfig, TemplateConfig
from dmpo_dist.data.prompt_texts import PromptTexts, texts_of_model
from dmpo_dist.data.schema import PreferenceGroup
from dmpo_dist.data.template import Template, make_template
from dmpo_dist.data.titles import as_in_data, titles_given
from dmpo_dist.data.tokenization import GroupTokenizer, TokenGroup, check_texts, check_titles, tokenize_rows
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.backbone import (
    ModelSource,
    changes_base,
    enforce_template,
    find_model,
    load_for_scoring,
    load_tokenizer,
    require_same_rendering,
    with_length_of,
)
from dmpo_dist.modeling.logprobs import Which
from dmpo_dist.modeling.model_files import require_as_written
from dmpo_dist.modeling.scoring_rule import adjusted, require_prior, scored_lengths
from dmpo_dist.modeling.token_scorer import TokenScorer
from dmpo_dist.modeling.trie_search import Beam


class RankedTitle(NamedTuple):
    """A title and its log-probability after the history, in nats."""

    title: str
    score: float


class RankingModel:
    """A frozen language model that scores and ranks titles for a user; made by ``RankingModel.load``.

    Example:
        >>> model = RankingModel.load("runs/dmpo/model")
        >>> model.rank(history=["Heat", "Alien"], candidates=["Up", "The Thing", "Aliens"], top=2)
        [RankedTitle(title='Aliens', score=-4.1), RankedTitle(title='The Thing', score=-6.8)]

    Scores are float64 log-probabilities in nats, summed over the tokens of a title and of what ends it. Histories are
    oldest first; the oldest titles are dropped where the prompt would exceed ``max_length``.

    A model whose prompts list the candidates sees them in an order that is drawn by a seed and does not depend on the
    order in which they are given; scores are the mean over one or more such orders.

    Attributes:
        source: the model's folder or hub id, its base, and what training wrote down about it.
        encode: turns a history and titles into token ids.
        orders: of the candidates in the prompt, over which scores are averaged; 1 where prompts list none.
    """

    def __init__(
        self, source: ModelSource, encode: GroupTokenizer, config: ModelConfig, token_budget: int, orders: int = 1
    ) -> None:
        self.source, self.encode = source, encode
        self.orders = orders if encode.template.lists_candidates else 1
        self._config, self._token_budget = config, token_budget
        self._scorer = cache(
            partial(_load_scorer, source, config, token_budget)
        )  # shared with the view of an adapter's base
        self._which: Which = "policy"
        self._prior: dict[str, float] = {}
        self._references: dict[str, Self] = {}

    @classmethod
    def load(
        cls,
        path: str,
        config: ModelConfig | None = None,
        template: TemplateConfig | None = None,
        token_budget: int = 8192,
        seed: int = 0,
        candidate_orders: int = 1,
        texts: Callable[[PromptTexts], PromptTexts] = lambda texts: texts,
    ) -> Self:
        """Read tokenizer and template now, and the weights when they are first needed.

        So what is wrong with a template or with titles is found before weights are read.

        Args:
            path: a model folder (a whole model or an adapter) or a hub id.
            config: dtype, quantization, attention and ``max_length``; its ``path`` is not looked at. None takes the
                length that the model was trained with.
            template: how prompts read, for a model that training wrote no ``dmpo.json`` for.
            token_budget: most tokens in one row of a forward pass.
            seed, candidate_orders: of the candidates in the prompt, where it lists them; see ``evaluation``'s settings.
            texts: adds fields of items and users to those that training left beside the model.

        Raises:
            UserError: no such model, a damaged file, no fast tokenizer, or another template than the model's own.
        """
        source = find_model(path)
        config = config or with_length_of([source], RunConfig()).model
        tokenizer = load_tokenizer(source)
        asked = enforce_template(source.stamp, template or TemplateConfig(), path)
        trained = make_template(asked, tokenizer)
        require_same_rendering(source.stamp, trained, path)
        known = texts(texts_of_model(asked, Path(source.path)))
        check_texts(known, tokenizer)
        encode = GroupTokenizer(tokenizer, trained, config.max_length, seed=seed, texts=known)
        return cls(source, encode, config, token_budget, candidate_orders)

    @property
    def tokenizer(self) -> Any:
        """A fast Hugging Face tokenizer."""
        return self.encode.tokenizer

    @property
    def template(self) -> Template:
        """How a history becomes a prompt and a title a response."""
        return self.encode.template

    @property
    def scored_source(self) -> ModelSource:
        """The model whose log-probs these are: for the view of an adapter's base that base, else ``source``."""
        return find_model(self.source.base) if self._which == "reference" else self.source

    def reference(self, path: str) -> Self:
        """The model at ``path``, which scores this one's token ids; an adapter's base shares its weights if it can.

        It is kept, so that its weights are read once.

        Raises:
            UserError: no such model, or one with another tokenizer.
        """
        if path not in self._references:
            self._references[path] = self._make_reference(path)
        return self._references[path]

    def _make_reference(self, path: str) -> Self:
        if self.source.is_adapter and path == self.source.base and changes_base(self.source) is None:
            base = copy(self)
            base._which, base._prior, base._references = "reference", {}, {}
            return base
        source = find_model(path)
        self._require_same_tokenizer(load_tokenizer(source), path)
        return type(self)(source, self.encode, self._config, self._token_budget, self.orders)

    def _require_same_tokenizer(self, other: Any, path: str) -> None:
        """Raise UserError where ``other``, the tokenizer of the model in ``path``, reads other texts in our ids."""
        if other.get_vocab() != self.tokenizer.get_vocab():
            raise UserError(
                f"{path}: has another tokenizer than {self.source.path}, so their log-probs cannot be compared; name a "
                "reference with the same one, by ranking.reference or --reference"
            )

    def load_weights(self) -> TokenScorer:
        """The weights and how they are run, read at the first call.

        Raises:
            UserError: weights that cannot be loaded, or a ``config.attention`` that would be wrong for the model.
        """
        return self._scorer()

    def rank(
        self,
        history: Sequence[str],
        candidates: Sequence[str],
        top: int | None = None,
        *,
        length_normalize: bool = False,
        prior_weight: float = 0.0,
        reference: Self | None = None,
        user: Mapping[str, str] | None = None,
    ) -> list[RankedTitle]:
        """``candidates`` from best to worst, at most ``top`` of them; equal scores keep their order.

        With ``top``, and by the log-probability alone, most of many candidates never run (see ``best_titles``).

        Args:
            length_normalize, prior_weight, reference, user: see ``score``.

        Raises:
            UserError: see ``score``; or ``top`` is less than 1.
        """
        if top is not None and top < 1:
            raise UserError(f"top={top}: give the number of titles to keep, 1 or more, or None for all")
        history, candidates = titles_given(history, "history"), titles_given(candidates, "candidates")
        plain = not (length_normalize or prior_weight or reference)
        if top and plain and candidates and self.orders == 1:
            (group,) = self._checked_groups([*map(as_in_data, history)], [*map(as_in_data, candidates)], user)
            return [RankedTitle(candidates[i], score) for i, score in self.best_titles(group, top)[:top]]
        scores = self.score(
            history,
            candidates,
            length_normalize=length_normalize,
            prior_weight=prior_weight,
            reference=reference,
            user=user,
        )
        return [RankedTitle(candidates[i], float(scores[i])) for i in np.argsort(-scores, kind="stable")[:top]]

    def score(
        self,
        history: Sequence[str],
        candidates: Sequence[str],
        *,
        length_normalize: bool = False,
        prior_weight: float = 0.0,
        reference: Self | None = None,
        user: Mapping[str, str] | None = None,
    ) -> np.ndarray:
        """(R,) float64 log-probabilities of the R ``candidates`` as the title that follows ``history``.

        Args:
            length_normalize: divide them by the number of tokens.
            prior_weight: subtract this times the title's log-probability after no history, see ``prior``.
            reference: a model whose log-probabilities are subtracted, from the method of that name or any other with
                the same tokenizer.
            user: field -> text, where prompts show fields of the user.

        Raises:
            UserError: history or candidates are no list of titles, a title that the tokenizer cannot represent or that
                does not fit into ``max_length``, fields of the user that prompts show and are not given, a reference
                with another tokenizer, weights that cannot be loaded, or an attention that is asked for and wrong for
                this model.
        """
        history = [*map(as_in_data, titles_given(history, "history"))]
        candidates = [*map(as_in_data, titles_given(candidates, "candidates"))]
        if not candidates:
            return np.empty(0)
        if reference is not None and reference.encode is not self.encode:
            self._require_same_tokenizer(reference.tokenizer, reference.source.path)
        groups = self._checked_groups(history, candidates, user)
        prior = self.prior(candidates) if prior_weight else None
        scores = [
            adjusted(
                self.score_catalogue(group),
                scored_lengths(group),
                None if reference is None else reference.score_catalogue(group),
                length_normalize=length_normalize,
                prior=prior,
                prior_weight=prior_weight,
            )
            for group in groups
        ]
        return np.mean(scores, axis=0)

    def _checked_groups(
        self, history: Sequence[str], candidates: Sequence[str], user: Mapping[str, str] | None
    ) -> list[TokenGroup]:
        """``token_groups`` of titles that somebody typed; raises UserError for those that the tokenizer cannot take."""
        check_titles([*history, *candidates], self.tokenizer)
        texts = self.encode.texts
        missing = next((field for field in texts.user_fields if field not in (user or {})), None)
        if missing is not None:
            raise UserError(f"user={user!r}: prompts show {{{missing}}} of the user; give user={{{missing!r}: ...}}")
        own = None if user is None else pd.DataFrame([{**user, "user": ""}])
        check_texts(PromptTexts(user_fields=texts.user_fields).with_users(own), self.tokenizer)
        if "" in texts.users:  # of the last caller
            texts = replace(texts, users={name: fields for name, fields in texts.users.items() if name})
        self.encode.texts = texts.with_users(own)
        return self.token_groups(history, candidates)

    def prior(self, titles: Sequence[str], user: str = "", timestamp: int = 0) -> np.ndarray:
        """(R,) float64 log-probabilities of ``titles`` after an empty history: how common the strings are.

        Each title is scored once in a model's life; those of one call are scored together, as a trie. Where prompts
        list the candidates, ``titles`` are listed as in the request of ``user`` and ``timestamp``, anew in each call.

        Raises:
            UserError: the template leaves no prompt where there is no history.
        """
        require_prior(self.template, self.source.path)
        if self.template.lists_candidates or self.encode.texts.user_fields:
            return np.mean([self.score_catalogue(g) for g in self.token_groups((), titles, user, timestamp)], axis=0)
        new = [title for title in dict.fromkeys(titles) if title not in self._prior]
        if new:
            log_probs = self.score_catalogue(self.token_group((), new, "without a history"))
            self._prior |= zip(new, log_probs.tolist(), strict=True)
        return np.array([self._prior[title] for title in titles])

    def token_group(
        self, history: Sequence[str], candidates: Sequence[str], user: str = "", timestamp: int = 0,
        listed: Sequence[str] = (),
    ) -> TokenGroup:  # fmt: skip
        """The token ids of one prompt and of R responses.

        Args:
            user: named in errors; with ``timestamp`` it decides the order in which a prompt lists candidates.
            listed: what such a prompt lists; none takes the candidates.
        """
        return self.encode(_group(user, timestamp, history, candidates), listed=listed)

    def token_groups(
        self, history: Sequence[str], candidates: Sequence[str], user: str = "", timestamp: int = 0
    ) -> list[TokenGroup]:
        """``token_group`` for each of ``orders``."""
        group = _group(user, timestamp, history, candidates)
        return [self.encode(group, draw) for draw in range(self.orders)]

    def score_rows(self, rows: Any, advance: Callable[[int], None] | None = None) -> list[np.ndarray]:
        """For each request of ``rows``, a split of prepared data, (1+K,) float64, the positive first.

        Args:
            advance: told how many more requests are scored; each is once for each of ``orders``.
        """
        draws = [self.score_groups(tokenize_rows(rows, self.encode, draw=draw), advance) for draw in range(self.orders)]
        return [np.mean(of_request, axis=0) for of_request in zip(*draws, strict=True)]

    def score_groups(
        self, groups: Sequence[TokenGroup], advance: Callable[[int], None] | None = None
    ) -> list[np.ndarray]:
        """For each group (R,) float64; groups are packed into rows, so they should be small.

        Args:
            advance: told how many more groups are scored.
        """
        return self._scorer().score(groups, self._which, advance)

    def score_share(self, groups: Sequence[TokenGroup], share: int, shares: int) -> Iterator[tuple[int, np.ndarray]]:
        """(index, (R,) float64) of some of ``groups``; together the ``shares`` give what ``score_groups`` does."""
        return self._scorer().score_share(groups, share, shares, self._which)

    def score_catalogue(self, group: TokenGroup) -> np.ndarray:
        """(R,) float64 of one group with any number of responses, which follow the prompt as a trie."""
        return self._scorer().score_many(group, self._which)

    def best_titles(self, group: TokenGroup, top: int, allowed: np.ndarray | None = None) -> list[Beam]:
        """The ``top`` best by ``score_catalogue``, and what ties with the last; see ``TokenScorer.best_titles``."""
        return self._scorer().best_titles(group, top, allowed, self._which)

    def beam_search(self, group: TokenGroup, beams: int, allowed: np.ndarray | None = None) -> list[Beam]:
        """At most ``beams`` responses of one group, found by beam search; see ``TokenScorer.beam_search``."""
        return self._scorer().beam_search(group, beams, allowed, self._which)

    def score_row(self, row: RequestRow) -> np.ndarray:
        """(N,) float64 of the targets of a row of several requests; see ``TokenScorer.score_row``."""
        return self._scorer().score_row(row, self._which)

    def token_scores(self, groups: Sequence[TokenGroup]) -> list[np.ndarray]:
        """For each group of one response (N,) float64 of its scored tokens, in order."""
        return self._scorer().token_scores(groups, self._which)


def _group(user: str, timestamp: int, history: Sequence[str], candidates: Sequence[str]) -> PreferenceGroup:
    first, *rest = candidates
    return PreferenceGroup(user, timestamp, tuple(history), first, tuple(rest))


def _load_scorer(source: ModelSource, config: ModelConfig, token_budget: int) -> TokenScorer:
    """The frozen weights on the accelerator if there is one; an adapter can also be run without."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    require_as_written(source)
    model = load_for_scoring(source.path, config).to(device)
    reference = "adapter_off" if source.is_adapter else None
    return TokenScorer(model, token_budget, config.max_length, config.attention, reference)
