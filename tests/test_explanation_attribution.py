"""Contributions, counterfactuals and deletion curves on worlds whose answers are known: no language model here."""

from itertools import combinations, permutations

import numpy as np
import pytest

from dmpo_dist.explanation.contributions import Outcomes, leave_one_out, title_ranks, title_values
from dmpo_dist.explanation.counterfactual import nearest_counterfactual, sentence, usual_top
from dmpo_dist.explanation.faithfulness import area_between, delete, summarise


def deletion_curve(values, order):
    """(n,) values without the first k items of ``order``: the last one always stays."""
    return values([frozenset(order[:k]) for k in range(len(order))])


def additive(weights):
    """v(S) = the weights of what is left."""
    return lambda removed: np.array([weights.sum() - sum(weights[i] for i in one) for one in removed])


def counted(ranks_of):
    """Outcomes with the explained title first among as many rivals as it needs to have ``ranks_of(removed)``."""
    asked = []

    def score(removed):
        asked.extend(removed)
        ranks = np.array([ranks_of(one) for one in removed])
        return np.stack([np.zeros(len(removed)), *(np.where(ranks > n, 1.0, -1.0) for n in range(1, 40))], axis=1)

    return Outcomes(score, 0, "margin"), asked


def smallest_crossing(ranks_of, items, top):
    """By trying everything."""
    before = ranks_of(frozenset()) <= top
    for size in range(1, items):
        for one in combinations(range(items), size):
            if (ranks_of(frozenset(one)) <= top) != before:
                return size
    return None


def test_values_and_ranks_by_hand():
    scores = np.array([[-1.0, -3.0, -2.0], [-4.0, -4.0, -1.0]])
    assert title_values(scores, 0, "margin").tolist() == [1.5, -1.5]
    assert title_values(scores, 0, "log_prob").tolist() == [-1.0, -4.0]
    assert title_ranks(scores, 0).tolist() == [1, 2]
    assert title_values(scores + 7.0, 1, "margin").tolist() == title_values(scores, 1, "margin").tolist()


def test_contributions_of_an_additive_scorer_are_its_weights_and_their_order_the_best_there_is():
    weights = np.array([0.5, -1.0, 2.0, 0.25, 1.0])
    values = additive(weights)
    contributions = leave_one_out(values, 5)
    np.testing.assert_allclose(contributions, weights, atol=1e-12)

    lowest = {order: deletion_curve(values, order)[1:].mean() for order in permutations(range(5))}
    ours = delete("u", values, contributions, 4, np.random.default_rng(0))
    assert ours.attribution[1:].mean() == pytest.approx(min(lowest.values()))
    assert ours.inverse[1:].mean() == pytest.approx(max(lowest.values()))
    # over all orders k removals cost k times the mean weight, the best order costs the k largest weights
    chance = np.mean([deletion_curve(values, order) for order in lowest], axis=0)
    largest = np.cumsum(np.sort(weights)[::-1])
    optimum = np.mean([largest[k - 1] - k * weights.mean() for k in range(1, 5)])
    assert area_between(chance, ours.attribution) == pytest.approx(optimum)
    np.testing.assert_allclose(ours.recent, deletion_curve(values, [4, 3, 2, 1, 0]))


def areas(attribute, seed, users=60):
    rng = np.random.default_rng(seed)
    deletions = []
    for user in range(users):
        weights = rng.normal(size=rng.integers(2, 9))
        deletions.append(delete(f"u{user}", additive(weights), attribute(weights, rng), 5, rng))
    return summarise(deletions, 200, seed)["areas"]


def test_random_numbers_are_not_faithful():
    """Their area's 95 % interval holds 0 as often as it says: binomial(30, 0.95) is below 24 once in 1,700 times."""
    found = [areas(lambda w, rng: rng.normal(size=len(w)), s, users=40)["attribution_vs_random"] for s in range(30)]
    assert sum(area["low"] <= 0 <= area["high"] for area in found) >= 24


def test_the_truth_is_faithful_and_its_inverse_the_contrary():
    truth, inverse = areas(lambda w, _: w, 0), areas(lambda w, _: -w, 0)
    assert truth["attribution_vs_random"]["low"] > 0.3
    assert truth["attribution_vs_random_after_first"]["low"] > 0.3
    assert truth["inverse_vs_random"]["high"] < -0.3
    assert truth["inverse_vs_random"]["sign_test_p"] < 1e-6
    assert inverse["attribution_vs_random"]["area"] == pytest.approx(truth["inverse_vs_random"]["area"])


def test_a_user_with_many_requests_counts_once():
    def requests(user, weight, times):
        weights = np.array([weight, 0.0])
        return [delete(user, additive(weights), weights, 1, np.random.default_rng(0)) for _ in range(times)]

    single = summarise(requests("a", 1.0, 1) + requests("b", 3.0, 1), 100, 0)
    many = summarise(requests("a", 1.0, 9) + requests("b", 3.0, 1), 100, 0)
    assert single["areas"] == many["areas"]
    assert (many["users"], many["requests"]) == (2, 10)


@pytest.mark.parametrize("seed", range(12))
def test_the_smallest_set_is_found_and_never_claimed_wrongly(seed):
    rng = np.random.default_rng(seed)
    table = {frozenset(one): int(rng.integers(1, 9)) for size in range(6) for one in combinations(range(6), size)}
    hidden = rng.random() < 0.5  # now and then nothing below three items does it
    top = 4
    low, high = (1, 4) if rng.random() < 0.5 else (5, 8)
    if hidden:
        table |= {one: int(rng.integers(low, high + 1)) for one in table if len(one) < 3}
    outcomes, asked = counted(table.__getitem__)
    found = nearest_counterfactual(outcomes, 6, top, budget=200)
    size = smallest_crossing(table.__getitem__, 6, top)
    assert found.rank_before == table[frozenset()]
    assert found.rank_after == table[frozenset(found.removed)]
    assert len(set(asked)) == len(asked), "each history is scored once"
    if found.crosses:
        assert (found.rank_before <= top) != (found.rank_after <= top)
        assert len(found.removed) == size or not found.smallest
    if size is not None and size <= 2:
        assert found.crosses
        assert found.smallest
        assert len(found.removed) == size


def test_greedy_search_drops_what_is_not_needed_and_keeps_to_its_budget():
    def ranks(removed):  # three items hold the title up; a fourth is the strongest by itself, and in vain
        return 30 if {0, 1, 2} <= removed else 3 if 3 in removed else 2

    outcomes, asked = counted(ranks)
    found = nearest_counterfactual(outcomes, 8, 5, budget=100)
    assert found.removed == (0, 1, 2)
    text = sentence(found, list("ABCDEFGH"))
    assert text.startswith("Without 'A', 'B' and 'C' it falls from rank 2 to 30")
    assert ("smaller" in text) == (not found.smallest)

    outcomes, asked = counted(ranks)
    stopped = nearest_counterfactual(outcomes, 8, 5, budget=0)
    assert set(asked) == {frozenset(), *(frozenset([i]) for i in range(8))}
    assert not stopped.crosses
    assert sentence(stopped, list("ABCDEFGH")) == (
        "No removal that was tried takes it from the top 5; "
        "without 'D' it falls from rank 2 to 3, the most a single item does."
    )


def test_a_title_outside_the_top_can_be_brought_in():
    outcomes, _ = counted(lambda removed: 4 if 1 in removed else 31)
    found = nearest_counterfactual(outcomes, 3, 20, budget=10)
    assert sentence(found, ["A", "B", "C"]) == "Without 'B' it rises from rank 31 to 4."


def test_one_item_cannot_be_taken_away():
    outcomes, asked = counted(lambda removed: 2)
    found = nearest_counterfactual(outcomes, 1, 5, budget=10)
    assert (found.removed, found.crosses, asked) == ((), False, [frozenset()])
    assert sentence(found, ["A"]) == "The history is a single title: there is no smaller part of it to look for."


def test_the_usual_top_holds_the_title_and_leaves_somebody_outside():
    tops = [usual_top(rank, 20) for rank in (1, 2, 5, 6, 10, 11, 20)]
    assert tops == [1, 5, 5, 10, 10, 10, 10]
    assert (usual_top(31, 1000), usual_top(2, 2)) == (20, 1)
