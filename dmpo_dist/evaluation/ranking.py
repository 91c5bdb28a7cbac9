"""What titles are ranked by, and one user's titles in that order: what a worker of `dmpo rank` does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dmpo_dist.config import RankingConfig, RunConfig
from dmpo_dist.data.prompt_texts import PromptTexts
from dmpo_dist.data.requests import Catalogue, RankingRequest
from dmpo_dist.data.store import PreparedData
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.backbone import ModelSource, find_model, unlike_training
from dmpo_dist.modeling.model_files import start_was_changed
from dmpo_dist.modeling.ranking_model import RankingModel
from dmpo_dist.modeling.scoring_rule import adjusted, scored_lengths
from dmpo_dist.modeling.trie_search import Beam, best_of


@dataclass(frozen=True)
class GivenTexts:
    """Tables with the columns title or user, and fields of theirs, from the files of an order; None for none."""

    items: pd.DataFrame | None
    users: pd.DataFrame | None


class TitleScorer:
    """A model and its reference under ``config.ranking``: corrections for length, popularity, prior and reference.

    Args:
        model: model folder or hub id.
        config: gives template, model, evaluation and ranking settings.
        catalogue: gives the titles' popularity.
        reference: model folder or hub id whose log-probs can be subtracted; None for none.
        given: see ``load_ranking_model``.

    Attributes:
        policy: the model.
        reference: the other one, if any; an adapter's base shares its weights.

    Raises:
        UserError: a model, reference or template that cannot be used, or a popularity weight without popularity.
    """

    def __init__(
        self,
        model: str,
        config: RunConfig,
        catalogue: Catalogue | None,
        reference: str | None,
        given: GivenTexts | None = None,
    ) -> None:
        self._path, self._config = model, config
        self.policy = load_ranking_model(model, config, given)
        self.reference = None if reference is None else self.policy.reference(reference)
        self._log_popularity = self.popularity_of(catalogue)

    def scores(
        self, groups: Sequence[TokenGroup], titles: Sequence[str], user: str, whole_catalogue: bool, timestamp: int = 0
    ) -> np.ndarray:
        """(n, R) float64, what ``titles`` are ranked by after each of n prompts, see ``adjusted``.

        Args:
            groups: n prompts of ``user``, each with ``titles`` as its responses.
            whole_catalogue: there are too many titles to pack.
            timestamp: of the request; see ``RankingModel.prior``.

        Raises:
            UserError: a score that is not finite, or a title without popularity where that is corrected for.
        """
        log_probs = log_probs_of(self.policy, groups, whole_catalogue)
        subtracted = self.subtracted
        references = None if subtracted is None else log_probs_of(subtracted, groups, whole_catalogue)
        prior = self.policy.prior(titles, user, timestamp) if self._config.ranking.prior_weight else None
        return self.combined(groups, titles, user, log_probs, references, prior)

    @property
    def subtracted(self) -> RankingModel | None:
        """The reference, where titles are ranked by the difference to it."""
        return None if self._config.ranking.reference is None else self.reference

    def combined(
        self, groups: Sequence[TokenGroup], titles: Sequence[str], user: str, log_probs: Sequence[np.ndarray],
        references: Sequence[np.ndarray] | None, prior: np.ndarray | None,
        log_popularity: Mapping[str, float] | None = None,
    ) -> np.ndarray:  # fmt: skip
        """(n, R) float64, what ``scores`` gives, from log-probs that were computed elsewhere.

        Args:
            log_probs, references: (R,) for each of ``groups``, of the model and of the reference where that counts.
            prior: (R,) of ``titles`` after an empty history, where that counts.
            log_popularity: see ``popularity_of``; None for that of the catalogue that was given at first.
        """
        ranking = self._config.ranking
        popularity = self._popularity(titles, self._log_popularity if log_popularity is None else log_popularity)
        weights = (ranking.length_normalize, ranking.popularity_weight, prior, ranking.prior_weight)
        scores = np.stack([
            adjusted(own, scored_lengths(group), other, popularity, *weights)
            for own, other, group in zip(log_probs, references or [None] * len(groups), groups, strict=True)
        ])  # fmt: skip
        self.require_finite(scores, user)
        return scores

    def best(
        self, history: Sequence[str], titles: Sequence[str], user: str, allowed: np.ndarray, top: int,
        beams: int | None = None,
    ) -> list[Beam]:  # fmt: skip
        """The ``top`` best of a whole catalogue, and all that tie with the last of them, best first.

        Only where titles are ranked by anything but their summed log-prob is every one of them scored.

        Args:
            titles: R titles, in whose order equal ones are listed.
            allowed: (R,) bool, which of them may be among the best.
            beams: of a beam search, which may miss some, and finds so many at most; None for the exact best.

        Raises:
            UserError: see ``scores``, or beams for a model that cannot share a prompt.
        """
        groups = self.policy.token_groups(history, titles, user)
        if self._config.ranking.corrections or len(groups) > 1:
            assert beams is None, "settings that beams cannot search by are refused before"
            return best_of(self.scores(groups, titles, user, True).mean(axis=0), top, allowed)
        (group,) = groups
        find, number = (self.policy.best_titles, top) if beams is None else (self.policy.beam_search, beams)
        found = find(group, number, allowed)
        self.require_finite(np.array([beam.log_prob for beam in found]), user)
        return found

    def require_finite(self, scores: np.ndarray, user: str) -> None:
        """Raise a UserError where one of ``scores`` is no number."""
        if not np.isfinite(scores).all():
            raise UserError(
                f"--model {self._path}: a score of user {user!r} is not finite; "
                f"{_why_not_finite(self._config.model.dtype)}"
            )

    def popularity_of(self, catalogue: Catalogue | None) -> dict[str, float] | None:
        """Title -> log(1 + count), None where rankings are not corrected by it.

        Raises:
            UserError: ``catalogue`` does not say how often titles were taken, where that counts.
        """
        if not self._config.ranking.popularity_weight:
            return None
        if catalogue is None or catalogue.counts is None:
            raise UserError(
                f"ranking.popularity_weight={self._config.ranking.popularity_weight:g} needs --catalogue with a column "
                "popularity, or prepared data in data.path"
            )
        return dict(zip(catalogue.titles, np.log1p(catalogue.counts).tolist(), strict=True))

    def _popularity(self, titles: Sequence[str], known: Mapping[str, float] | None) -> np.ndarray | None:
        """(R,) log(1 + count) of the titles where rankings are corrected by it."""
        if known is None:
            return None
        missing = next((title for title in titles if title not in known), None)
        if missing is not None:
            raise UserError(
                f"ranking.popularity_weight: {missing!r} is not in the catalogue; add it, or leave the weight out"
            )
        return np.array([known[title] for title in titles])


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
        given: see ``load_ranking_model``.

    Raises:
        UserError: a model, reference or template that cannot be used.
    """

    def __init__(
        self, model: str, config: RunConfig, catalogue: Catalogue | None, top: int, given: GivenTexts | None = None
    ) -> None:
        reference = reference_of(find_model(model), config.ranking.reference)
        self._scorer = TitleScorer(model, config, catalogue, reference, given)
        self._titles = catalogue.titles if catalogue else ()
        self._exclude_history, self._beams, self._top = config.ranking.exclude_history, config.ranking.beams, top

    def __call__(self, request: RankingRequest) -> RankedTitles:
        """Rank ``request``.

        Raises:
            UserError: a prompt that does not fit into ``model.max_length``, or scores that are not finite.
        """
        if request.candidates is not None:
            titles = request.candidates
            found = best_of(self.scores(request, np.array(titles, dtype=object)), self._top)
        else:
            titles = self._titles
            taken = request.left_out if self._exclude_history else set()
            found = self.best(request, np.array([title not in taken for title in titles]), self._top, self._beams)
        best = found[: self._top]
        return RankedTitles(request.user, [titles[b.title] for b in best], [b.log_prob for b in best])

    def best(self, request: RankingRequest, allowed: np.ndarray, top: int, beams: int | None = None) -> list[Beam]:
        """What ``TitleScorer.best`` finds in the catalogue for ``request``; raises as a call does."""
        return self._scorer.best(request.history, self._titles, request.user, allowed, top, beams)

    def scores(self, request: RankingRequest, candidates: np.ndarray) -> np.ndarray:
        """(R,) float64, what ``candidates`` (R titles) are ranked by; raises as a call does."""
        titles = candidates.tolist()
        groups = self._scorer.policy.token_groups(request.history, titles, request.user)
        return self._scorer.scores(groups, titles, request.user, whole_catalogue=True).mean(axis=0)

    @property
    def note(self) -> str | None:
        """What to tell the user of the scoring: separate rows (see ``TokenScorer``), and histories cut to fit."""
        models = [self._scorer.policy, *([self._scorer.reference] if self._scorer.reference else [])]
        notes = [fallback for model in models if (fallback := model.load_weights().fallback)][:1]
        encode = self._scorer.policy.encode
        if encode.truncated:
            notes.append(
                "of some histories only the newest titles are in the prompt, as the longest candidate must fit behind "
                f"them into model.max_length={encode.max_length}; `dmpo explain` shows how many were cut off"
            )
        return "; ".join(notes) or None


def load_ranking_model(path: str, config: RunConfig, given: GivenTexts | None = None) -> RankingModel:
    """``RankingModel.load`` by a run's template, model and evaluation settings.

    Args:
        given: fields of items and users beside those of ``config.data.path`` and of the model itself.
    """

    def with_data(texts: PromptTexts) -> PromptTexts:
        if not texts.item_fields and not texts.user_fields:
            return texts
        if config.data.path is not None:
            data = PreparedData.load(config.data.path)
            texts = texts.with_items(data.items).with_users(data.users)
        return texts.with_items(given.items).with_users(given.users) if given else texts

    settings = config.evaluation
    return RankingModel.load(
        path, config.model, config.template, settings.token_budget, config.seed, settings.candidate_orders, with_data
    )


RANKING_KEY = {
    "mean": "ranking.length_normalize=true",
    "prior": "ranking.prior_weight",
    "reference": "ranking.reference",
}
"""Rule of ``evaluation`` -> what ranks so elsewhere."""


def ranking_notes(path: str, config: RunConfig) -> list[str]:
    """What to say before the model at ``path`` ranks by the section ``ranking``: in what it was trained otherwise, and
    that ``evaluation.rule`` has no part in it."""
    notes = [f"{path} was trained with {difference}" for difference in unlike_training(find_model(path), config.model)]
    rule = config.evaluation.rule
    if rule != "sum":
        instead = RANKING_KEY.get(rule, f"one of {', '.join(RANKING_KEY.values())}")
        notes.append(f"evaluation.rule={rule} has no effect here, as it is dmpo evaluate's alone; give {instead}")
    return notes


def require_finite(called: str, scores: Sequence[np.ndarray], dtype: str) -> None:
    """Raise UserError where one of ``scores``, which the model ``called`` so gave in ``dtype``, is no number."""
    flat = np.concatenate([[], *scores])
    bad = ~np.isfinite(flat)
    if bad.any():
        raise UserError(
            f"{called}: {int(bad.sum())} of {len(flat)} scores are not finite, the first is {flat[bad][0]}; "
            f"{_why_not_finite(dtype)}"
        )


def _why_not_finite(dtype: str) -> str:
    narrow = f", or model.dtype={dtype} is too narrow for it: try model.dtype=float32" if dtype != "float32" else ""
    return f"its training diverged or its weights are damaged{narrow}"


def log_probs_of(model: RankingModel, groups: Sequence[TokenGroup], whole_catalogue: bool) -> list[np.ndarray]:
    """For each group (R,) float64 log-probs: packed, or one catalogue after the other."""
    return [model.score_catalogue(group) for group in groups] if whole_catalogue else model.score_groups(groups)


def reference_of(source: ModelSource, asked: str | None, option: str = "ranking.reference=") -> str | None:
    """Folder or hub id of the model whose log-probs are subtracted; None for none.

    Args:
        asked: ``base``, ``start``, a model folder or a hub id.
        option: what the user sets it by, for errors.

    Raises:
        UserError: the model has no base or does not say what it started from, or there is no such model.
    """
    if asked == "base":
        if not source.is_adapter:
            raise UserError(f"{option}base: {source.path} is a whole model without a base; name a folder, or start")
        return source.base
    if asked == "start":
        asked = source.stamp.start
        if not asked:
            raise UserError(f"{option}start: {source.path} does not say what it was started from; name that model")
        if start_was_changed(source):
            raise UserError(
                f"{option}start: {asked} was trained again since {source.path} started from it; train the latter "
                "again, or name a model to subtract"
            )
    return find_model(asked, option=option.rstrip("= ")).path if asked else None


def check_beams(ranking: RankingConfig, titles: int, top: int) -> None:
    """Raise UserError where ``ranking.beams`` cannot find the ``top`` best of a catalogue of ``titles`` titles."""
    beams = ranking.beams
    if beams is not None and beams > titles:
        raise UserError(f"ranking.beams={beams}: the catalogue has {titles} titles; lower it, or leave it out for all")
    if beams is not None and beams < min(top, titles):
        raise UserError(f"ranking.beams={beams}: finds {beams} titles at most, and --top asks for {top}; lower --top")


def require_no_beams(ranking: RankingConfig, command: str, instead: str = "") -> None:
    """Raise UserError where ``ranking.beams`` is set for a ``command`` that ranks exactly.

    Args:
        instead: what else to do, after "leave it out".
    """
    if ranking.beams is not None:
        raise UserError(f"ranking.beams={ranking.beams}: {command} ranks exactly; leave it out{instead}")
