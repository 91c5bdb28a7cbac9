"""Questions answered by a model: contributions, counterfactuals and the words of a title; see ``contributions.py``."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dmpo_dist.batching.layout import group_cost
from dmpo_dist.config import RunConfig
from dmpo_dist.data.continuation import continuation
from dmpo_dist.data.requests import Catalogue
from dmpo_dist.data.schema import PreferenceGroup
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.evaluation.ranking import GivenTexts, TitleScorer, log_probs_of
from dmpo_dist.explanation.contributions import Method, Outcomes, Removed, leave_one_out, rivals, singles
from dmpo_dist.explanation.counterfactual import Counterfactual, nearest_counterfactual, usual_top
from dmpo_dist.explanation.questions import Question, among
from dmpo_dist.explanation.tokens import Piece, readable_pieces, sum_pieces

USUAL_BUDGET = 200
"""Pairs of history items tried for a counterfactual: all of those of 20 items."""
USUAL_RIVALS = 500
"""Titles below the explained one that are scored again where a whole catalogue is ranked."""


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
        rivals: of a whole catalogue, compare a title with all above it and so many below, see ``rivals``; 0 for all,
            None for ``USUAL_RIVALS``.
        given: see ``load_ranking_model``.

    Attributes:
        whole_catalogue: whether candidates are too many for a row; known once it is loaded.

    Raises:
        UserError: a model, reference or template that cannot be used.
    """

    def __init__(
        self, model: str, config: RunConfig, reference: str | None, catalogue: Catalogue | None, method: Method,
        rivals: int | None, given: GivenTexts | None = None,
    ) -> None:  # fmt: skip
        self._scorer = TitleScorer(model, config, catalogue, reference, given)
        self._model = self._scorer.policy
        self._token_budget, self._method = config.evaluation.token_budget, method
        self._rivals = USUAL_RIVALS if rivals is None else rivals

    def load(self, questions: Sequence[Question]) -> None:
        """Load what scores ``questions``, and see whether their candidates are too many to pack.

        Raises:
            UserError: a prompt that does not fit into ``model.max_length``, or weights that cannot be loaded.
        """
        # a generator: of whole catalogues there is one in memory at a time
        groups = (self._group(question, question.history) for question in questions)
        self.whole_catalogue = needs_trie(groups, self._token_budget)
        self._model.load_weights()

    def subject(self, question: Question) -> Subject:
        """``question`` with its prompt, and where it names no title, about the one ranked first.

        A whole catalogue is scored once, for the whole history; what is left of that is scored for the title's rivals.
        """
        ranked = len(question.candidates)
        before = self._model.encode.dropped_titles
        self._group(question, question.history)
        history = question.history[self._model.encode.dropped_titles - before :]
        listed = self._model.template.lists_candidates  # in every prompt, so that all of them stay
        narrow = self.whole_catalogue and 0 < self._rivals < ranked and not listed
        if question.item is None or narrow:
            scores = self._scores([history], question)[0]
            item = int(scores.argmax()) if question.item is None else question.item
            question = replace(question, item=item)
            question = among(question, rivals(scores, item, self._rivals)) if narrow else question

        def score(removed: Sequence[Removed]) -> np.ndarray:
            kept = [tuple(title for i, title in enumerate(history) if i not in one) for one in removed]
            return self._scores(kept, question)

        assert question.item is not None
        return Subject(question, ranked, history, Outcomes(score, question.item, self._method))

    def words(self, subjects: Sequence[Subject]) -> list[Words]:
        """For each subject what training did to its title; nothing without a reference."""
        reference = self._scorer.reference
        if reference is None or not subjects:
            return [Words([], np.empty(0), None) for _ in subjects]
        titles = [(subject.question.candidates[subject.item],) for subject in subjects]
        groups = [
            self._group(subject.question, subject.history, title)
            for subject, title in zip(subjects, titles, strict=True)
        ]
        of_policy, of_reference = self._model.token_scores(groups), reference.token_scores(groups)
        words = []
        for subject, group, ours, theirs in zip(subjects, groups, of_policy, of_reference, strict=True):
            pieces = self._pieces(subject, group)
            question = subject.question
            whole = [self._group(question, subject.history)]
            before, after = (log_probs_of(model, whole, self.whole_catalogue)[0] for model in (reference, self._model))
            others = float(np.delete(after - before, subject.item).mean())
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

    def _group(self, question: Question, history: Sequence[str], responses: Sequence[str] = ()) -> TokenGroup:
        """The token ids of ``question`` after ``history``, with some ``responses`` in place of all candidates."""
        candidates, listed = responses or question.candidates, question.candidates
        return self._model.token_group(history, candidates, question.user, question.timestamp, listed)

    def _scores(self, histories: Sequence[Sequence[str]], question: Question) -> np.ndarray:
        """(n, R) what the candidates are ranked by after each of n histories, see ``adjusted``; a mean over orders."""
        candidates, user, time = question.candidates, question.user, question.timestamp
        groups = [group for h in histories for group in self._model.token_groups(h, candidates, user, time)]
        scores = self._scorer.scores(groups, candidates, user, self.whole_catalogue, time)
        return scores.reshape(len(histories), self._model.orders, -1).mean(axis=1)

    def _allows_empty_history(self) -> bool:
        """Whether a prompt without a history has any text: a begin token, or what the template puts around it."""
        return bool(self._model.template.render(()).text)

    def _pieces(self, subject: Subject, group: TokenGroup) -> list[Piece]:
        question = subject.question
        request = PreferenceGroup(question.user, question.timestamp, subject.history, question.candidates[0], ())
        fitted = self._model.encode.fit(request, listed=question.candidates)
        prompt, before = fitted.prompt.text, fitted.asked
        text = prompt + self._model.template.render_response(question.candidates[subject.item])
        found = continuation(self._model.tokenizer, before, fitted.encoded.ids, text[len(before) :])
        assert found.ids == group.branches[0][group.scored_from[0] :], "the same response"
        spans = [(start + len(before), end + len(before)) for start, end in found.spans]
        return readable_pieces(text, spans, len(prompt), len(text) - len(self._model.template.terminator))


def needs_trie(groups: Iterable[TokenGroup], token_budget: int) -> bool:
    """Whether a group's responses, packed behind their prompt, would take more than a row of ``token_budget``."""
    return any(group_cost(group, shared=True).tokens > token_budget for group in groups)
