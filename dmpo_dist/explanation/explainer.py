"""Questions answered by a model: contributions, counterfactuals and the words of a title; see ``contributions.py``."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from dmpo_dist.config import RunConfig
from dmpo_dist.data.requests import Catalogue
from dmpo_dist.data.schema import PreferenceGroup
from dmpo_dist.data.template import make_template
from dmpo_dist.data.tokenization import GroupTokenizer, TokenGroup
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.catalogue import adjusted
from dmpo_dist.explanation.contributions import Method, Outcomes, Removed, leave_one_out, rivals, singles
from dmpo_dist.explanation.counterfactual import Counterfactual, nearest_counterfactual, usual_top
from dmpo_dist.explanation.questions import Question, among
from dmpo_dist.explanation.scoring import LoadedModel, Which, needs_trie
from dmpo_dist.explanation.tokens import Piece, readable_pieces, sum_pieces
from dmpo_dist.modeling.backbone import enforce_template, find_model, load_tokenizer

USUAL_BUDGET = 200
"""Pairs of history items tried for a counterfactual: all of those of 20 items."""


@dataclass(frozen=True)
class Words:
    """How a policy differs from its reference on one title.

    Attributes:
        pieces: texts of the title's parts; empty without a reference.
        log_ratios: (pieces,) log policy minus log reference of each.
        others: the same of whole titles, the mean over the other candidates; None without a reference.
    """

    pieces: list[str]
    log_ratios: np.ndarray
    others: float | None


@dataclass(frozen=True)
class Answer:
    """One explained request.

    Attributes:
        question: what was asked, its item known, its candidates those that were compared.
        ranked: how many candidates there were.
        cut_off: how many of the oldest history items did not fit into the prompt and had no part in anything here.
        rank: of the title with the whole history that was seen.
        words: what training did to the title.
        contributions: (n,) of the history items that were seen; of a single one only where an empty history makes a
            prompt, else (0,).
        ranks_without: (n,) the title's rank without each.
        counterfactual: the nearest.
    """

    question: Question
    ranked: int
    cut_off: int
    rank: int
    words: Words
    contributions: np.ndarray
    ranks_without: np.ndarray
    counterfactual: Counterfactual


@dataclass(frozen=True)
class Subject:
    """A question whose prompt is known.

    Attributes:
        question: its item known; its candidates are those that are compared, see ``rivals``.
        ranked: how many candidates there were.
        history: what of it fits.
        outcomes: scores what is left of that.
    """

    question: Question
    ranked: int
    history: tuple[str, ...]
    outcomes: Outcomes

    @property
    def item(self) -> int:
        assert self.question.item is not None, "a subject knows its item"
        return self.question.item


class Explainer:
    """A model that explains its ranking, by ``dmpo rank``'s scores.

    Args:
        model: model folder or hub id.
        config: gives template, model, evaluation and ranking settings.
        reference: model whose log-probs are subtracted for the title's words; None for none.
        catalogue: gives popularity to ``ranking.popularity_weight``.
        method: see ``title_values``.
        rivals: of a whole catalogue, compare a title with all above it and so many below, see ``rivals``; 0 for all.

    Attributes:
        whole_catalogue: whether candidates are too many for a row; known once it is loaded.

    Raises:
        UserError: a model, reference or template that cannot be used.
    """

    def __init__(
        self, model: str, config: RunConfig, reference: str | None, catalogue: Catalogue | None, method: Method,
        rivals: int,
    ) -> None:  # fmt: skip
        source = find_model(model)
        self._tokenizer = load_tokenizer(source)
        self._template = make_template(enforce_template(source.stamp, config.template, model), self._tokenizer)
        self._tokenize = GroupTokenizer(self._tokenizer, self._template, config.model.max_length)
        self._path, self._config, self._method, self._rivals = model, config, method, rivals
        self._base = source.is_adapter and reference == source.base
        if reference is not None and not self._base:
            _require_same_tokenizer(reference, self._tokenizer, model)
        self._which: Which = "reference" if self._base else "policy"  # how the reference is asked for
        self._reference_path = reference
        self._log_popularity = _log_popularity(catalogue, config.ranking.popularity_weight)

    def load(self, questions: Sequence[Question]) -> None:
        """Load what scores ``questions``: packed rows, or a trie where their candidates are too many.

        Raises:
            UserError: a prompt that does not fit into ``model.max_length``, or weights that cannot be loaded.
        """
        # a generator: of whole catalogues there is one in memory at a time
        groups = (self._tokenize(_group(q.user, q.history, q.candidates)) for q in questions)
        self.whole_catalogue = needs_trie(groups, self._config.evaluation.token_budget)
        load = partial(LoadedModel, config=self._config, catalogue=self.whole_catalogue)
        self._policy = load(self._path, base_too=self._base)
        self._reference: LoadedModel | None = None
        if self._reference_path is not None:
            self._reference = self._policy if self._base else load(self._reference_path, base_too=False)

    def subject(self, question: Question) -> Subject:
        """``question`` with its prompt, and where it names no title, about the one ranked first.

        A whole catalogue is scored once, for the whole history; what is left of that is scored for the title's rivals.
        """
        ranked = len(question.candidates)
        before = self._tokenize.dropped_titles
        group = self._tokenize(_group(question.user, question.history, question.candidates))
        history = question.history[self._tokenize.dropped_titles - before :]
        narrow = self.whole_catalogue and 0 < self._rivals < ranked
        if question.item is None or narrow:
            scores = self._scores([group], question)[0]
            item = int(scores.argmax()) if question.item is None else question.item
            question = replace(question, item=item)
            question = among(question, rivals(scores, item, self._rivals)) if narrow else question

        def score(removed: Sequence[Removed]) -> np.ndarray:
            kept = [tuple(title for i, title in enumerate(history) if i not in one) for one in removed]
            return self._scores([self._tokenize(_group(question.user, k, question.candidates)) for k in kept], question)

        assert question.item is not None
        return Subject(question, ranked, history, Outcomes(score, question.item, self._method))

    def words(self, subjects: Sequence[Subject]) -> list[Words]:
        """For each subject what training did to its title; nothing without a reference."""
        if self._reference is None or not subjects:
            return [Words([], np.empty(0), None) for _ in subjects]
        groups = [
            self._tokenize(_group(s.question.user, s.history, (s.question.candidates[s.item],))) for s in subjects
        ]
        policy, reference = self._policy.token_scores(groups), self._reference.token_scores(groups, self._which)
        words = []
        for subject, group, ours, theirs in zip(subjects, groups, policy, reference, strict=True):
            pieces = self._pieces(subject, group)
            whole = [self._tokenize(_group(subject.question.user, subject.history, subject.question.candidates))]
            change = self._policy.scores(whole)[0] - self._reference.scores(whole, self._which)[0]
            others = float(np.delete(change, subject.item).mean())
            words.append(Words([piece.text for piece in pieces], sum_pieces(pieces, ours - theirs), others))
        return words

    def answer(self, subject: Subject, words: Words, top: int | None, budget: int | None) -> Answer:
        """Contributions and the nearest counterfactual of ``subject``.

        Args:
            top: see ``nearest_counterfactual``; None takes ``usual_top``.
            budget: likewise; None takes ``USUAL_BUDGET``, or 0 where a whole catalogue is scored for each set.
        """
        rank = int(subject.outcomes.ranks([frozenset()])[0])
        top = top or usual_top(rank, subject.ranked)
        budget = (0 if self.whole_catalogue else USUAL_BUDGET) if budget is None else budget
        items = len(subject.history)
        explained = items if items > 1 or self._allows_empty_history() else 0
        return Answer(
            question=subject.question,
            ranked=subject.ranked,
            cut_off=len(subject.question.history) - items,
            rank=rank,
            words=words,
            contributions=leave_one_out(subject.outcomes.values, explained),
            ranks_without=subject.outcomes.ranks(singles(explained)),
            counterfactual=nearest_counterfactual(subject.outcomes, items, top, budget),
        )

    def _scores(self, groups: list[TokenGroup], question: Question) -> np.ndarray:
        """(n, R) what the candidates are ranked by, see ``adjusted``."""
        ranking = self._config.ranking
        lengths = [np.array([len(b) - s for b, s in zip(g.branches, g.scored_from, strict=True)]) for g in groups]
        references: Sequence[np.ndarray | None] = [None] * len(groups)
        if ranking.reference is not None and self._reference is not None:
            references = self._reference.scores(groups, self._which)
        popularity = self._popularity(question)
        scores = np.stack([
            adjusted(ours, length, theirs, popularity, ranking.length_normalize, ranking.popularity_weight)
            for ours, theirs, length in zip(self._policy.scores(groups), references, lengths, strict=True)
        ])  # fmt: skip
        if not np.isfinite(scores).all():
            raise UserError(
                f"--model {self._path}: a score of user {question.user!r} is not finite; its training diverged or its weights "
                f"are damaged, or model.dtype={self._config.model.dtype} is too narrow: try model.dtype=float32"
            )
        return scores

    def _allows_empty_history(self) -> bool:
        """Whether anything stands before a response whose prompt has no history: a begin token or the template's text."""
        return bool(self._template.render(()).text)

    def _popularity(self, question: Question) -> np.ndarray | None:
        """(R,) log(1 + count) of the candidates where rankings are corrected by it."""
        known = self._log_popularity
        if known is None:
            return None
        missing = next((title for title in question.candidates if title not in known), None)
        if missing is not None:
            raise UserError(
                f"ranking.popularity_weight: {missing!r} is not in the catalogue; add it, or leave the weight out"
            )
        return np.array([known[title] for title in question.candidates])

    def _pieces(self, subject: Subject, group: TokenGroup) -> list[Piece]:
        prompt = self._template.render(subject.history).text
        text = prompt + self._template.render_response(subject.question.candidates[subject.item])
        encoded = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        scored = group.branches[0][group.scored_from[0] :]
        assert encoded.ids[-len(scored) :] == scored, "prompt and response are tokenized together"
        end = len(text) - len(self._template.terminator)
        return readable_pieces(text, encoded.offsets[-len(scored) :], len(prompt), end)


def _group(user: str, history: tuple[str, ...], candidates: tuple[str, ...]) -> PreferenceGroup:
    return PreferenceGroup(user, 0, history, candidates[0], candidates[1:])


def _log_popularity(catalogue: Catalogue | None, weight: float) -> dict[str, float] | None:
    if not weight:
        return None
    if catalogue is None or catalogue.counts is None:
        raise UserError(
            f"ranking.popularity_weight={weight:g} needs --catalogue with a column popularity, or prepared data in data.path"
        )
    return dict(zip(catalogue.titles, np.log1p(catalogue.counts).tolist(), strict=True))


def _require_same_tokenizer(reference: str, tokenizer: object, model: str) -> None:
    if load_tokenizer(find_model(reference)).get_vocab() != tokenizer.get_vocab():  # pyrefly: ignore
        raise UserError(
            f"--reference {reference}: has another tokenizer than {model}, so their log-probs cannot be compared; name a "
            "model with the same one"
        )
