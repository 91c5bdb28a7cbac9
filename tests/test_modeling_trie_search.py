"""Searches in a catalogue's trie against the full ranking of the whole trie."""

import numpy as np
import pytest
import torch
from conftest import tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_modeling_token_scorer import GROUP, MODEL, titles

from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.errors import UserError
from dmpo_dist.modeling import trie_search
from dmpo_dist.modeling.logprobs import LogProbModel
from dmpo_dist.modeling.scoring import node_log_probs
from dmpo_dist.modeling.token_scorer import TokenScorer
from dmpo_dist.modeling.trie_search import BeamRequest, beam_search, best_of, best_titles

CPU = torch.device("cpu")


def searched(model, group, beams):
    """What beam search finds, and the full ranking's scores."""
    scorer = TokenScorer(model, 64, 256)
    scores, trie = scorer.score_many(group), scorer.trie(group)
    return beam_search(LogProbModel(model), group.prefix, trie, beams, CPU), scores


@pytest.mark.parametrize(("kind", "options"), [("llama", {}), ("gpt2", {}), ("gemma3", {"window": 7})])
def test_as_many_beams_as_titles_are_the_full_ranking(kind, options):
    found, scores = searched(tiny_model(kind, **options).eval(), GROUP, len(GROUP.branches))
    assert sorted(beam.title for beam in found) == list(range(len(scores)))
    np.testing.assert_allclose([beam.log_prob for beam in found], np.sort(scores)[::-1], rtol=1e-5)


@given(titles=titles, beams=st.integers(1, 14))
@settings(max_examples=40, deadline=None)
def test_any_beams_find_titles_by_their_own_scores(titles, beams):
    group = TokenGroup([5, 9, 3], tuple(titles), (0,) * len(titles))
    found, scores = searched(MODEL, group, beams)
    assert len({beam.title for beam in found}) == len(found) <= beams
    np.testing.assert_allclose([beam.log_prob for beam in found], scores[[beam.title for beam in found]], rtol=1e-10)
    assert [b.log_prob for b in found] == sorted((b.log_prob for b in found), reverse=True)
    if beams >= len(titles):
        assert len(found) == len(titles)


class Counting:
    """A forward function that counts the tokens of the rows that it runs."""

    def __init__(self, forward):
        self.forward, self.tokens = forward, 0

    def __call__(self, row):
        self.tokens += row.input_ids.numel()
        return self.forward(row)


@pytest.fixture
def narrow_rounds(monkeypatch):
    """Tiny tries in several rounds."""
    monkeypatch.setattr(trie_search, "FIRST_ROUND", 2)
    monkeypatch.setattr(trie_search, "GROWTH", 1.5)


@pytest.mark.usefixtures("narrow_rounds")
@given(data=st.data(), titles=titles, top=st.integers(1, 14), token_budget=st.sampled_from([1, 9, 4096]))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_best_titles_are_those_of_the_whole_trie(data, titles, top, token_budget):
    """With equal titles, beginnings of one another, titles that may not be found, and prompt tokens in titles."""
    scored_from = tuple(data.draw(st.integers(0, len(title) - 1)) for title in titles)
    allowed = np.array(data.draw(st.lists(st.booleans(), min_size=len(titles), max_size=len(titles))))
    prompt = data.draw(st.sampled_from([[5], [5, 9, 3]]))
    group = TokenGroup(prompt, tuple(titles), scored_from)
    scorer = TokenScorer(MODEL, token_budget, 256)
    scores, trie = scorer.score_many(group), scorer.trie(group)
    forward = Counting(LogProbModel(MODEL))
    found = best_titles(forward, BeamRequest(prompt, trie, allowed), top, CPU, token_budget)
    expected = best_of(scores, top, allowed)
    np.testing.assert_allclose([b.log_prob for b in found], [b.log_prob for b in expected], rtol=1e-10)
    by_rank = sorted(np.flatnonzero(allowed), key=lambda title: (-scores[title], title))
    assert [b.title for b in expected][:top] == by_rank[:top]
    assert all(scores[title] < expected[-1].log_prob for title in by_rank[len(expected) :])
    assert [b.title for b in found] == [b.title for b in expected]
    if token_budget == 4096:
        assert forward.tokens <= len(prompt) + len(trie.inner), "no token runs twice"
    else:
        node_log_probs(whole := Counting(LogProbModel(MODEL)), prompt, trie, token_budget, CPU)
        assert forward.tokens <= 2 * whole.tokens + 2 * token_budget + 6, "a search that pays no more gives up"


def test_a_title_that_ties_with_the_last_is_among_the_best():
    group = TokenGroup([5, 9, 3], ([20, 2], [30, 31, 2], [20, 2], [40, 2], [20, 2]), (0,) * 5)
    scorer = TokenScorer(MODEL, 64, 256)
    order = np.argsort(-scorer.score_many(group), kind="stable").tolist()
    first = order.index(0)
    assert order[first : first + 3] == [0, 2, 4]
    for top in (1, 2, 3):
        found = scorer.best_titles(group, first + top)
        assert [beam.title for beam in found] == order[: first + 3]


def test_beginnings_that_lead_to_none_of_the_best_never_run():
    """Of titles of one to twelve tokens the long ones fall behind long before their ends."""
    rng = np.random.default_rng(0)
    rows = tuple([*rng.integers(3, 20, size=1 + number % 12).tolist(), 2] for number in range(300))
    group = TokenGroup([5, 9, 3], rows, (0,) * 300)
    scorer = TokenScorer(MODEL, 4096, 256)
    expected, trie = best_of(scorer.score_many(group), 10), scorer.trie(group)
    forward = Counting(LogProbModel(MODEL))
    found = best_titles(forward, BeamRequest(group.prefix, trie), 10, CPU, 4096)
    assert [beam.title for beam in found] == [beam.title for beam in expected]
    assert forward.tokens < len(trie.inner) / 2


def test_a_search_that_keeps_too_little_gives_way_to_the_whole_trie(monkeypatch):
    asked = []
    whole_trie = trie_search.node_log_probs
    monkeypatch.setattr(trie_search, "node_log_probs", lambda *given: asked.append(given) or whole_trie(*given))
    for token_budget, expected in ((4096, 0), (2, 1)):
        scorer = TokenScorer(MODEL, token_budget, 256)
        found = scorer.best_titles(GROUP, len(GROUP.branches))
        assert len(asked) == expected
        assert [b.title for b in found] == np.argsort(-scorer.score_many(GROUP), kind="stable").tolist()


def test_what_is_no_number_comes_to_light():
    """A search must not rank a broken score below all others, where no one would see it."""
    scorer = TokenScorer(MODEL, 64, 256)
    scorer.score_many(GROUP)
    trie = scorer.trie(GROUP)

    def broken(row):
        return LogProbModel(MODEL)(row).where(torch.arange(len(row.targets.target_ids)) != 1, torch.nan)

    found = best_titles(broken, BeamRequest(GROUP.prefix, trie), 3, CPU, 64)
    assert not np.isfinite(found[0].log_prob)


@pytest.mark.parametrize("kind", ["gemma3", "gpt_oss"])
def test_a_scorer_finds_the_best_of_any_model(kind):
    """Within a sliding window, and by separate rows where a model cannot share a prompt; beams are refused there."""
    model = tiny_model(kind, **({"window": 7} if kind == "gemma3" else {})).eval()
    scorer = TokenScorer(model, 64, 256)
    allowed = np.arange(len(GROUP.branches)) != 3
    found, expected = scorer.best_titles(GROUP, 4, allowed), best_of(scorer.score_many(GROUP), 4, allowed)
    assert [beam.title for beam in found] == [beam.title for beam in expected]
    np.testing.assert_allclose([b.log_prob for b in found], [b.log_prob for b in expected], rtol=1e-5)
    if kind == "gpt_oss":
        with pytest.raises(UserError, match="4 beams need a prompt that titles share.*leave ranking.beams"):
            scorer.beam_search(GROUP, 4)
    else:
        wide = scorer.beam_search(GROUP, len(GROUP.branches), allowed)
        assert [beam.title for beam in wide][: len(found)] == [beam.title for beam in found]
