"""Explanations of a tiny model against plain scores of the same prompts, one at a time."""

from functools import cache

import numpy as np
import pytest
from worlds import make_three_models

from dmpo_dist.config import RunConfig
from dmpo_dist.data.requests import Catalogue, RankingRequest
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.ranking import Ranker
from dmpo_dist.explanation.explainer import Explainer
from dmpo_dist.explanation.questions import Question, asked
from dmpo_dist.explanation.view import notes, to_json
from dmpo_dist.explanation.words import END

TITLES = ("Heat", "Alien", "Alien 3", "Léon", "The Thing", "The Fly", "日本 🎬", "Up")
HISTORY = ("Tron", "Alien Nation", "The Flying Fish", "Heathers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_three_models(folder, TITLES)
    return folder


def config(budget=4096, length=128, **ranking):
    settings = {"model": {"max_length": length}, "ranking": ranking, "evaluation": {"token_budget": budget}}
    return RunConfig.model_validate(settings)


def question(item=4, history=HISTORY, candidates=TITLES):
    return Question("u", history, history, candidates, candidates, item)


def answer(folder, settings, reference="base", asked=None, method="margin", rivals=0):
    catalogue = Catalogue(TITLES, np.arange(len(TITLES)))
    explainer = Explainer(str(folder / "adapter"), settings, reference, catalogue, method, rivals)
    asked = asked or question()
    explainer.load([asked])
    subject = explainer.subject(asked)
    return explainer.answer(subject, explainer.words([subject])[0], top=4, budget=50)


@cache
def ranker(model: str, settings: str) -> Ranker:
    """Loaded once, as the tests ask it for dozens of single prompts; ``settings`` are JSON."""
    return Ranker(model, RunConfig.model_validate_json(settings), Catalogue(TITLES, np.arange(len(TITLES))), top=1)


def plain(model, settings, history, candidates=TITLES):
    request = RankingRequest("u", history, None)
    return ranker(str(model), settings.model_dump_json()).scores(request, np.array(candidates, dtype=object))


def test_an_item_is_named_by_title_or_id_and_never_guessed():
    """A film called 949 is not the item 949: --item took the title without a word."""
    items = {"1": "Heat", "2": "949", "949": "Alien", "3": "Up"}
    shown = Question("u", ("Tron",), ("9",), ("Heat", "949"), ("1", "2"), None)
    for wanted, index in (("1", 0), ("Heat", 0), ("hEAT", 0), ("2", 1)):
        assert asked(shown, wanted, items).item == index
    with pytest.raises(UserError, match="'949' is a title, and the id of another item, 'Alien': write '2'"):
        asked(shown, "949", items)
    for wanted, title in (("3", "Up"), ("up", "Up"), ("alien", "Alien")):
        with pytest.raises(UserError, match=f"{title!r} is not among the 2 candidates"):
            asked(shown, wanted, items)


@pytest.mark.parametrize(("budget", "method"), [(4096, "margin"), (32, "log_prob")], ids=["packed", "trie"])
def test_contributions_are_those_of_single_prompts(folder, budget, method):
    settings = config(budget)
    seen = answer(folder, settings, str(folder / "base"), method=method)

    def value(history):
        scores = plain(folder / "adapter", settings, history)
        return scores[4] - (np.delete(scores, 4).mean() if method == "margin" else 0), 1 + (scores > scores[4]).sum()

    whole, rank = value(HISTORY)
    without = [value(HISTORY[:i] + HISTORY[i + 1 :]) for i in range(4)]
    assert seen.rank == rank
    np.testing.assert_allclose(seen.contributions, [whole - v for v, _ in without], atol=1e-4)
    assert seen.ranks_without.tolist() == [r for _, r in without]
    found = seen.counterfactual
    left = tuple(title for i, title in enumerate(HISTORY) if i not in found.removed)
    assert found.rank_after == value(left)[1]


def test_in_a_whole_catalogue_a_title_is_compared_with_its_rivals(folder):
    """All above it and the next two: its rank is that among all; the shortened histories are scored for them alone."""
    settings = config(budget=32)
    whole = plain(folder / "adapter", settings, HISTORY)
    third = int(np.argsort(-whole)[2])
    kept = np.sort(np.argsort(-whole)[:5])
    index = kept.tolist().index(third)
    seen = answer(folder, settings, None, question(item=third), rivals=2)
    assert (seen.rank, seen.ranked) == (3, len(TITLES))
    assert seen.question.candidates == tuple(TITLES[i] for i in kept)
    few = [plain(folder / "adapter", settings, HISTORY[:i] + HISTORY[i + 1 :])[kept] for i in range(4)]
    margins = [s[index] - np.delete(s, index).mean() for s in (whole[kept], *few)]
    np.testing.assert_allclose(seen.contributions, margins[0] - np.array(margins[1:]), atol=1e-4)
    assert seen.ranks_without.tolist() == [1 + (s > s[index]).sum() for s in few]
    entry = to_json(seen)
    assert (entry["candidates"], entry["compared"]) == (len(TITLES), 5)
    assert any("compared with 4 titles" in note for note in notes(entry))
    first = answer(folder, settings, None, question(item=None), rivals=2)
    assert (first.rank, first.question.candidates[first.question.item]) == (1, TITLES[int(whole.argmax())])


@pytest.mark.parametrize(("reference", "budget"), [("base", 4096), ("base", 32), ("other", 32)])
def test_the_words_sum_to_the_difference_of_log_probs(folder, reference, budget):
    settings = config(budget)
    seen = answer(folder, settings, str(folder / reference), question(item=6))
    change = plain(folder / "adapter", settings, HISTORY) - plain(folder / reference, settings, HISTORY)
    assert seen.words.log_ratios.sum() == pytest.approx(change[6], abs=1e-5)
    assert seen.words.others == pytest.approx(np.delete(change, 6).mean(), abs=1e-5)
    assert "".join(seen.words.pieces) == "日本 🎬" + END


def test_a_ranking_by_reference_length_and_popularity_is_explained_as_it_is(folder):
    settings = config(reference="base", length_normalize=True, popularity_weight=0.3)
    seen = answer(folder, settings, str(folder / "base"))
    scores = [plain(folder / "adapter", settings, HISTORY[:i] + HISTORY[i + 1 :]) for i in range(4)]
    assert seen.ranks_without.tolist() == [1 + (s > s[4]).sum() for s in scores]
    whole = plain(folder / "adapter", settings, HISTORY)
    expected = [(whole - s)[4] - np.delete(whole - s, 4).mean() for s in scores]
    np.testing.assert_allclose(seen.contributions, expected, atol=1e-4)


def test_what_the_model_did_not_see_has_no_contribution(folder):
    seen = answer(folder, config(length=95), str(folder / "base"))
    entry = to_json(seen)
    assert 0 < seen.cut_off < 4
    assert entry["cut_off"] == list(HISTORY[: seen.cut_off])
    assert [row["title"] for row in entry["history"]] == list(HISTORY[seen.cut_off :])
    shorter = answer(folder, config(), str(folder / "base"), question(history=HISTORY[seen.cut_off :]))
    np.testing.assert_allclose(seen.contributions, shorter.contributions, atol=1e-5)


def test_one_item_no_reference_and_the_title_ranked_first(folder):
    settings = config()
    seen = answer(folder, settings, None, question(item=None, history=("Tron",)))
    scores = plain(folder / "adapter", settings, ("Tron",))
    assert (seen.question.item, seen.rank) == (int(scores.argmax()), 1)
    assert (seen.words.pieces, seen.words.others) == ([], None)
    assert seen.contributions.shape == (1,)
    assert seen.counterfactual.removed == ()
