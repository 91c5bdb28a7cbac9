"""The simulated world: repeatable, well-formed, and its oracle is hard to beat."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest

from dmpo_dist.config import Simulator
from dmpo_dist.data.negatives import NegativeSampler
from dmpo_dist.data.schema import Interactions
from dmpo_dist.data.sources.simulator import simulate
from dmpo_dist.data.splits import find_requests, time_cuts
from dmpo_dist.errors import UserError


@pytest.fixture(scope="module")
def simulated() -> Interactions:
    return simulate(Simulator(), seed=0)


def test_a_world_is_its_seed(simulated: Interactions) -> None:
    again, other = simulate(Simulator(), seed=0), simulate(Simulator(), seed=1)
    pd.testing.assert_frame_equal(again.events, simulated.events)
    pd.testing.assert_frame_equal(again.items, simulated.items)
    assert np.array_equal(again.oracle, simulated.oracle)
    assert not other.events.equals(simulated.events)


def test_the_tables_keep_the_contract(simulated: Interactions) -> None:
    events = simulated.events
    assert simulated.items["title"].is_unique
    assert simulated.items["item"].is_unique
    assert simulated.items["title"].str.split().str.len().between(2, 4).all()
    assert not events.duplicated(["user", "item"]).any()
    assert events["timestamp"].is_monotonic_increasing
    assert set(events["rating"]) == {1.0, 2.0, 3.0, 4.0, 5.0}
    assert 0.70 <= (events["rating"] >= 4).mean() <= 0.75
    assert events.groupby("user").size().mean() == pytest.approx(Simulator().events_per_user, rel=0.05)
    assert simulated.oracle.shape == (len(simulated.oracle_users), len(simulated.items))


def test_popularity_is_skewed_unless_the_exponent_is_zero() -> None:
    def top_share(exponent: float) -> float:
        config = Simulator(users=500, popularity_exponent=exponent, taste_strength=0.0)
        counts = simulate(config, seed=0).events["item"].value_counts()
        return counts.head(40).sum() / counts.sum()

    assert top_share(0.0) < 0.16
    assert top_share(0.8) > 0.3


def test_the_oracle_ranks_best_and_titles_tell_tastes(simulated: Interactions) -> None:
    """Share of negatives ranked below the positive on the test requests, by the oracle, by popularity before the first
    cut, and by words shared with the history: title words must carry taste, and nothing beats the oracle."""
    cuts = time_cuts(simulated.events["timestamp"].to_numpy(), 0.8, 0.9)
    limits = {"rating_threshold": 4.0, "min_history": 3, "max_history": 20, "train_requests_per_user": 1}
    requests = find_requests(simulated.events, cuts, **limits)["test"].table
    sampler = NegativeSampler(simulated.events, rating_threshold=4.0, seed=0)
    before = simulated.events[simulated.events["timestamp"] < cuts[0]]
    popularity = before["item"].value_counts()
    words = dict(zip(simulated.items["item"], simulated.items["title"].str.split(), strict=True))
    row = {user: n for n, user in enumerate(simulated.oracle_users)}
    column = {item: n for n, item in enumerate(simulated.items["item"])}
    auc = Counter()
    for user, timestamp, positive, history in requests.itertuples(index=False, name=None):
        candidates = [positive, *sampler.evaluation(user, timestamp, 19, timestamp)]
        heard = Counter(word for item in history for word in words[item])
        scores = {
            "oracle": simulated.oracle[row[user], [column[i] for i in candidates]],
            "popularity": popularity.reindex(candidates, fill_value=0).to_numpy(),
            "words": np.array([sum(heard[w] for w in words[i]) for i in candidates]),
        }
        for name, s in scores.items():  # ties count half
            auc[name] += ((s[1:] < s[0]).mean() + 0.5 * (s[1:] == s[0]).mean()) / len(requests)
    assert len(requests) > 200
    assert auc["oracle"] > auc["popularity"] + 0.1
    assert auc["oracle"] > 0.85
    assert auc["words"] > 0.6


def test_the_oracle_knows_how_likely_a_like_is() -> None:
    """Without taste and popularity in the choices, the oracle is log P(like): its mean is the share of likes."""
    log = simulate(Simulator(taste_strength=0.0, popularity_exponent=0.0), seed=0)
    row, column = pd.Index(log.oracle_users), pd.Index(log.items["item"])
    p_like = np.exp(log.oracle[row.get_indexer(log.events["user"]), column.get_indexer(log.events["item"])])
    liked = (log.events["rating"] >= 4).to_numpy()
    for low, high in [(0.0, 0.3), (0.3, 0.6), (0.6, 0.9), (0.9, 1.0)]:
        inside = (p_like >= low) & (p_like < high)
        assert liked[inside].mean() == pytest.approx(p_like[inside].mean(), abs=0.02)


@pytest.mark.parametrize("config", [Simulator(items=30, events_per_user=20), Simulator(users=1_000_000, items=1000)])
def test_impossible_worlds(config: Simulator) -> None:
    with pytest.raises(UserError, match=r"lower data\.source\.simulator"):
        simulate(config, seed=0)


def test_the_smallest_world() -> None:
    log = simulate(Simulator(users=2, items=10, events_per_user=2, taste_dim=1), seed=0)
    assert log.events.groupby("user").size().tolist() == [2, 2]
