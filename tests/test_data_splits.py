"""Splits and negatives: what a request may know, as properties of random logs."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmpo_dist.config import load_config
from dmpo_dist.data.database import Database
from dmpo_dist.data.log import Log
from dmpo_dist.data.negatives import NegativeSampler, request_stream
from dmpo_dist.data.splits import SPLITS, Requests, find_requests, time_cuts
from dmpo_dist.errors import UserError

CUTS = (20, 30)
LIMITS = {"rating_threshold": 4.0, "min_history": 1, "max_history": 3, "train_requests_per_user": 2}
KINDS = st.sampled_from(["uniform", "dislikes", "popularity", "in_batch"])


def random_events(seed: int, size: int, first: int, last: int) -> pd.DataFrame:
    """Up to ``size`` events of 6 users and 16 items with first <= timestamp <= last, one per (user, item)."""
    rng = np.random.default_rng(seed)
    events = pd.DataFrame(
        {
            "user": [f"u{n}" for n in rng.integers(0, 6, size)],
            "item": [f"i{n}" for n in rng.integers(0, 16, size)],
            "rating": rng.integers(2, 6, size).astype(float),
            "timestamp": rng.integers(first, last + 1, size),
        }
    )
    return events.drop_duplicates(["user", "item"]).sort_values(["timestamp", "user", "item"], ignore_index=True)


def logs(first: int, last: int) -> st.SearchStrategy[pd.DataFrame]:
    return st.builds(random_events, st.integers(0, 2**32 - 1), st.integers(1, 120), st.just(first), st.just(last))


LOGS = logs(0, 40)


def all_requests(requests: dict[str, Requests]) -> list[tuple[str, str, int, str, list[str]]]:
    return [(s, *row) for s in SPLITS for row in requests[s].table.itertuples(index=False, name=None)]


def requests_by_hand(events: pd.DataFrame) -> set[tuple]:
    """The definition, one like at a time."""
    rows = list(events.itertuples(index=False, name=None))
    eligible: dict[tuple[str, str], list] = {}
    for user, item, rating, t in sorted(rows, key=lambda row: (row[3], row[1])):
        liked = sorted((when, i) for u, i, r, when in rows if u == user and r >= 4 and when < t)
        seen = any(i == item and when < t for _, i, _, when in rows)
        if rating >= 4 and liked and seen:
            split = SPLITS[(t >= CUTS[0]) + (t >= CUTS[1])]
            eligible.setdefault((split, user), []).append((split, user, t, item, tuple(i for _, i in liked[-3:])))
    chosen = (found[-2:] if split == "train" else found[:1] for (split, _), found in eligible.items())
    return {request for found in chosen for request in found}


@settings(deadline=None)
@given(LOGS)
def test_requests_are_what_their_definition_says(events: pd.DataFrame) -> None:
    """No history at or after the request, its item seen before, the latest two for training, else one per user."""
    requests = find_requests(events, CUTS, **LIMITS)
    found = [(*row[:4], tuple(row[4])) for row in all_requests(requests)]
    assert len(found) == len(set(found))
    assert set(found) == requests_by_hand(events)
    period = np.searchsorted(CUTS, events.loc[events["rating"] >= 4, "timestamp"], side="right")
    for number, split in enumerate(SPLITS):
        assert len(requests[split].table) + sum(requests[split].dropped.values()) == (period == number).sum()


@settings(deadline=None)
@given(LOGS, KINDS)
def test_negatives_were_in_the_world_and_not_taken(events: pd.DataFrame, kind: str) -> None:
    first_seen = events.groupby("item")["timestamp"].min()
    sampler = NegativeSampler(events, rating_threshold=4.0, seed=3)
    for split, user, t, _, _ in all_requests(find_requests(events, CUTS, **LIMITS)):
        known = set(first_seen.index[first_seen < t])
        own = events[events["user"] == user]
        taken = set(own["item"] if split != "train" else own.loc[own["timestamp"] <= t, "item"])
        disliked = set(own.query("rating < 4 and timestamp < @t")["item"]) if kind == "dislikes" else set()
        allowed = (known - taken) | (disliked if split == "train" else set())

        def draw(count: int, split: str = split, user: str = user, t: int = t) -> list[str]:
            return sampler.training(kind, user, t, count) if split == "train" else sampler.evaluation(user, t, count, t)

        everything = draw(len(allowed))
        assert len(everything) == len(allowed)
        assert set(everything) == allowed
        assert set(draw(len(allowed) // 2)) <= allowed
        if split == "train":
            assert sampler.available_for_training(kind, user, t) == len(allowed)
        if kind == "dislikes" and split == "train":
            assert set(everything[: len(disliked)]) == disliked
        with pytest.raises(UserError, match=rf"'{user}' at {t} .* lower data\.\w+"):
            draw(len(allowed) + 1)


@settings(deadline=None)
@given(logs(0, 19), logs(20, 60), KINDS)
def test_later_events_never_change_training(events: pd.DataFrame, later: pd.DataFrame, kind: str) -> None:
    extended = pd.concat([events, later], ignore_index=True).drop_duplicates(["user", "item"])
    tables = [find_requests(e, CUTS, **LIMITS)["train"].table for e in (events, extended)]
    pd.testing.assert_frame_equal(*tables, check_dtype=False)
    samplers = [NegativeSampler(e, 4.0, seed=1) for e in (events, extended)]
    for user, t, _, _ in tables[0].itertuples(index=False, name=None):
        count = samplers[0].available_for_training(kind, user, t) // 2
        drawn = [sampler.training(kind, user, t, count) for sampler in samplers]
        assert drawn[0] == drawn[1]


def test_the_stream_is_the_same_everywhere() -> None:
    assert request_stream(0, "u1", 5).integers(1 << 30, size=3).tolist() == [999925876, 813949991, 122730183]
    keys = [(0, "u1", 5), (1, "u1", 5), (0, "u15", 5), (0, "u", 15)]
    assert len({tuple(request_stream(*key).integers(1 << 30, size=3)) for key in keys}) == len(keys)


@pytest.mark.parametrize(("n_items", "n_crowd"), [(50, 0), (50, 2000), (2, 2000)])
def test_popularity_negatives_follow_the_counts(n_items: int, n_crowd: int) -> None:
    """First draws against counts before the request; a crowd on an item the user took leads to the exact path."""
    n_requests = 600
    counts = pd.Series({f"i{item}": 1 + item % 4 for item in range(n_items)})
    log = [(f"u{n}", item, 5.0, 0) for item, count in counts.items() for n in range(count)]
    log += [(f"crowd{n}", "hit", 5.0, 0) for n in range(n_crowd)]
    log += [(f"q{n}", "hit", 5.0, 1) for n in range(n_requests)]
    log += [(f"later{n}", "i0", 5.0, 1) for n in range(1000)]  # popularity after the request must not show
    sampler = NegativeSampler(pd.DataFrame(log, columns=["user", "item", "rating", "timestamp"]), 4.0, seed=0)
    drawn = pd.Series([sampler.training("popularity", f"q{n}", 1, 1)[0] for n in range(n_requests)]).value_counts()
    expected = counts / counts.sum() * n_requests
    chi2 = ((drawn.reindex(counts.index, fill_value=0) - expected) ** 2 / expected).sum()
    assert drawn.sum() == n_requests
    assert chi2 < n_items + 4 * np.sqrt(2 * n_items)  # mean n - 1, variance 2 (n - 1)


@pytest.mark.parametrize("exponent", [0.5, 2.0])
def test_popularity_to_a_power(exponent: float) -> None:
    """First draws against counts ** a of what was taken before the request; requests come in any order of time."""
    n_requests, n_items = 600, 30
    counts = pd.Series({f"i{item}": 1 + item % 5 for item in range(n_items)})
    log = [(f"u{n}", item, 5.0, 0) for item, count in counts.items() for n in range(count)]
    log += [(f"q{n}", "hit", 5.0, 2) for n in range(n_requests)] + [(f"later{n}", "i0", 5.0, 1) for n in range(500)]
    events = pd.DataFrame(log, columns=["user", "item", "rating", "timestamp"])
    sampler = NegativeSampler(events, 4.0, seed=0, exponent=exponent)
    sampler.training("popularity", "q0", 2, 1)
    drawn = pd.Series([sampler.training("popularity", f"q{n}", 1, 1)[0] for n in range(n_requests)]).value_counts()
    expected = counts**exponent / (counts**exponent).sum() * n_requests
    chi2 = ((drawn.reindex(counts.index, fill_value=0) - expected) ** 2 / expected).sum()
    assert chi2 < n_items + 4 * np.sqrt(2 * n_items)


def test_in_batch_negatives_are_other_requests_positives() -> None:
    events = pd.DataFrame(
        [(f"u{n}", f"i{n}", 5.0, n) for n in range(40)] + [("q", "i1", 5.0, 50)],
        columns=["user", "item", "rating", "timestamp"],
    )
    batch = ["i1", "i2", "i3", "i4", "i30"]
    sampler = NegativeSampler(events, 4.0, seed=0, batch=batch)
    assert set(sampler.training("in_batch", "q", 50, 4)) == {"i2", "i3", "i4", "i30"}
    drawn = sampler.training("in_batch", "q", 50, 10)
    assert set(drawn) > {"i2", "i3", "i4", "i30"}, "filled up with others"
    assert len(set(drawn)) == 10
    assert "i1" not in drawn


@settings(deadline=None, max_examples=20)
@given(LOGS)
def test_leave_one_out_asks_for_the_last_two_likes(events: pd.DataFrame) -> None:
    requests = find_requests(events, None, **(LIMITS | {"train_requests_per_user": 100}))
    liked = events[events["rating"] >= 4].sort_values(["timestamp", "item"])
    for split, place in (("test", -1), ("validation", -2)):
        for user, t, item, history in requests[split].table.itertuples(index=False, name=None):
            last = liked[liked["user"] == user].iloc[place]
            assert (last["item"], last["timestamp"]) == (item, t)
            assert item not in history
    found = all_requests(requests)
    assert len({(user, item) for _, user, _, item, _ in found}) == len(found)
    total = sum(len(requests[s].table) + sum(requests[s].dropped.values()) for s in SPLITS)
    assert total == len(liked)


@settings(deadline=None, max_examples=20)
@given(LOGS)
def test_leave_one_out_shares_no_history_with_training(events: pd.DataFrame) -> None:
    requests = find_requests(events, None, **(LIMITS | {"train_requests_per_user": 100}), unseen_positives=True)
    likes = events[events["rating"] >= 4].groupby("user")["timestamp"].apply(lambda times: sorted(times)[-2:])
    for user, t in requests["train"].table[["user", "timestamp"]].itertuples(index=False, name=None):
        assert t < min(likes[user]), "a training request of the moment of a held-out like would have its history"
    assert all(requests[split].dropped["unseen_positive"] == 0 for split in ("validation", "test"))


def test_candidates_of_all_times() -> None:
    log = [
        ("u", "a", 5.0, 1),
        ("u", "b", 5.0, 2),
        ("u", "c", 5.0, 3),
        *(("v", f"later{n}", 5.0, 9 + n) for n in range(5)),
    ]
    sampler = NegativeSampler(pd.DataFrame(log, columns=["user", "item", "rating", "timestamp"]), 4.0, seed=0)
    assert sampler.available_for_evaluation("u", 3) == 0
    assert set(sampler.evaluation("u", 3, 5, None)) == {f"later{n}" for n in range(5)}
    with pytest.raises(UserError, match=r"user 'u': 6 negatives are asked for, but only 5 items are in the log"):
        sampler.evaluation("u", 3, 6, None)
    with pytest.raises(UserError, match=r"rank items that nobody had taken yet; set data.split=leave_one_out"):
        load_config([], ["data.evaluation_candidates=all"])


@settings(deadline=None, max_examples=20)
@given(LOGS, st.integers(1, 5))
def test_the_k_core_is_the_largest_dense_part(events: pd.DataFrame, k: int) -> None:
    def core_of(events: pd.DataFrame) -> pd.DataFrame:
        with Database() as database:
            database.show("events", events)
            database.run("CREATE TABLE log AS SELECT * FROM events")
            log = Log(database, pd.DataFrame({"item": events["item"].unique()}), "log", [])
            try:
                log.keep_core(k)
            except UserError:
                return events.head(0)
            assert set(log.items["item"]) == set(log.share(0)["item"])
            return log.share(0)

    core = core_of(events)
    kept = events.merge(core, on=["user", "item"], suffixes=("", "_kept"))[events.columns]
    assert len(kept) == len(core)
    if len(core):
        assert min(core["user"].value_counts().min(), core["item"].value_counts().min()) >= k
    left_out = pd.concat([events, kept]).drop_duplicates(["user", "item"], keep=False)
    for index in left_out.sample(
        frac=1, random_state=0
    ).index:  # no removed event could have stayed with the core alone
        tried = pd.concat([kept, left_out.loc[[index]]])
        assert min(tried["user"].value_counts().min(), tried["item"].value_counts().min()) < k
    assert len(core_of(core)) == len(core)


def test_cuts_are_moments_of_the_log() -> None:
    assert time_cuts(np.array([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110]), 0.8, 0.9) == (90, 100)
