"""The engine's scores against those of each group alone, whatever shares the row, and a bounded memory of prompts."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import random_groups, tiny_model

from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.modeling import trie_attention, trie_search
from dmpo_dist.modeling.token_scorer import TokenScorer
from dmpo_dist.modeling.trie_search import best_of
from dmpo_dist.serving import engine as serving_engine
from dmpo_dist.serving.engine import Engine
from dmpo_dist.serving.prefix_cache import PrefixCache

KINDS = [
    ("llama", {}),
    ("gpt2", {}),
    ("gemma3", {"window": 7}),
    ("gemma2", {"window": 7, "attn_logit_softcapping": 2.0}),
    ("gpt_oss", {}),  # sinks: separate rows
]


class Scoring:
    """A ``RankingModel`` as far as the engine knows it."""

    def __init__(self, scorer):
        self.load_weights, self.score_row, self.score_catalogue = lambda: scorer, scorer.score_row, scorer.score_many


@pytest.fixture
def engine(request):
    made = []

    def make(scorer, budget, cache_bytes):
        made.append(Engine([Scoring(scorer)], budget, cache_bytes))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=[kind for kind, _ in KINDS])
def test_scores_do_not_depend_on_what_shares_the_row(engine, kind, options, monkeypatch):
    monkeypatch.setattr(trie_attention, "MAX_SCORES", 500)  # several slices in a part
    scorer = TokenScorer(tiny_model(kind, **options).eval(), 4096, 256)
    groups = random_groups(8, seed=3)  # among them prompts of one token
    alone = [scorer.score([group])[0] for group in groups]
    for budget, cache in ((32, 0), (4096, 10**7)):
        served = engine(scorer, budget, cache)
        futures = [served.submit(group) for group in [*groups, *groups[::-1]]]
        for future, expected in zip(futures, [*alone, *alone[::-1]], strict=True):
            np.testing.assert_allclose(future.result(60), expected, rtol=1e-6, atol=1e-5)
        again = [served.submit(group).result(60) for group in groups]
        for seen, expected in zip(again, alone, strict=True):
            np.testing.assert_allclose(seen, expected, rtol=1e-6, atol=1e-5)
        if kind == "gpt_oss":
            continue
        assert served.counts.shared_rows
        assert served.caches[0].hits >= len(groups) - 2 if cache else served.caches[0].held_bytes == 0


def catalogue(count, seed):
    """Prompts of 1 to 20 tokens before the same forty titles, some of them equal or beginnings of others."""
    rng = np.random.default_rng(seed)
    titles = [rng.integers(3, 20, rng.integers(1, 6)).tolist() for _ in range(36)]
    titles += [titles[3], titles[5], [*titles[3], 7], [*titles[8], 9, 4]]
    prompts = [rng.integers(3, 97, rng.integers(1, 21)).tolist() for _ in range(count)]
    return [TokenGroup(prompt, tuple(titles), (0,) * len(titles)) for prompt in prompts]


@pytest.mark.parametrize(
    ("kind", "options", "kept"),
    [*((*kind, 4096) for kind in KINDS), ("llama", {}, 1)],
    ids=[*(kind for kind, _ in KINDS), "impatient"],
)
def test_searches_share_rows_and_find_what_the_whole_trie_ranks_best(engine, kind, options, kept, monkeypatch):
    made = []

    class Recorded(trie_search.BestFirst):
        def __init__(self, *given):
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr(serving_engine, "BestFirst", Recorded)
    monkeypatch.setattr(serving_engine, "SEARCH_TOKENS", kept)
    monkeypatch.setattr(trie_search, "FIRST_ROUND", 3)
    scorer = TokenScorer(tiny_model(kind, **options).eval(), 4096, 256)
    groups, others = catalogue(7, seed=1), random_groups(4, seed=2)
    scores, expected = [scorer.score_many(group) for group in groups], [scorer.score([group])[0] for group in others]
    allowed = [np.random.default_rng(index).random(len(scores[index])) < 0.7 for index in range(len(groups))]
    for budget, cache in ((32, 0), (4096, 10**7)):
        served = engine(scorer, budget, cache)
        searches = [served.best(group, 1 + 6 * index, allowed[index]) for index, group in enumerate(groups)]
        whole = [served.submit(group) for group in others]
        for index, future in enumerate(searches):
            found, best = future.result(60), best_of(scores[index], 1 + 6 * index, allowed[index])
            assert [beam.title for beam in found] == [beam.title for beam in best]
            np.testing.assert_allclose([b.log_prob for b in found], [b.log_prob for b in best], rtol=1e-6, atol=1e-5)
        for future, one in zip(whole, expected, strict=True):
            np.testing.assert_allclose(future.result(60), one, rtol=1e-6, atol=1e-5)
        assert served.counts.shared_rows or kind == "gpt_oss"
    assert {search.gave_up for search in made} == ({False} if kept > 1 else {False, True}) or kind == "gpt_oss"


def test_a_row_that_fails_under_a_search_begins_it_again(engine):
    scorer = TokenScorer(tiny_model("llama").eval(), 4096, 256)
    groups = catalogue(3, seed=4)
    served, score_row, free, failed = engine(scorer, 4096, 10**7), scorer.score_row, threading.Event(), []

    def first_shared_row_fails(row):
        free.wait(60)
        log_probs = score_row(row)
        if len(row.tries) > 1 and not failed:
            failed.append(len(row.tries))
            raise ZeroDivisionError("a row that does not fit into memory, say")
        return log_probs

    served._models[0].score_row = first_shared_row_fails
    everything = np.ones(len(groups[0].branches), dtype=bool)
    searches = [served.best(group, 4, everything) for group in groups]  # the first has begun, the others share its rows
    free.set()
    for group, future in zip(groups, searches, strict=True):
        best = best_of(scorer.score_many(group), 4)
        np.testing.assert_allclose([b.log_prob for b in future.result(60)], [b.log_prob for b in best], atol=1e-5)
    assert failed
    assert served.waiting == 0


def test_equal_groups_from_many_threads(engine):
    scorer = TokenScorer(tiny_model("llama").eval(), 4096, 256)
    groups = random_groups(3, seed=9)
    expected = [scorer.score([group])[0] for group in groups]
    served = engine(scorer, 40, 10**7)

    def ask(thread):
        for turn in range(12):
            index = (thread + turn) % 3
            np.testing.assert_allclose(served.submit(groups[index]).result(60), expected[index], rtol=1e-6, atol=1e-5)
        return thread

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == list(range(8))
    assert served.counts.groups == 96


def test_a_failure_and_a_cancelled_group_leave_the_others_alone(engine):
    scorer = TokenScorer(tiny_model("llama").eval(), 4096, 256)
    groups = random_groups(5, seed=5)
    expected = [scorer.score([group])[0] for group in groups]
    served, free = engine(scorer, 4096, 10**7), threading.Event()
    score_row, poison = served._models[0].score_row, groups[2].prefix[:-1]

    def row_with_poison(row):
        free.wait(60)
        if row.input_ids[0, : len(poison)].tolist() == poison or (row.prompts[2:3] and len(row.tries) > 2):
            raise ZeroDivisionError("a row that does not fit into memory, say")
        return score_row(row)

    served._models[0].score_row = row_with_poison
    futures = [served.submit(group) for group in groups]  # the first runs alone, the others share the next row
    futures[4].cancel()
    free.set()
    with pytest.raises(ZeroDivisionError):
        futures[2].result(60)
    for index in (0, 1, 3):
        np.testing.assert_allclose(futures[index].result(60), expected[index], rtol=1e-6, atol=1e-5)
    assert futures[4].cancelled()
    np.testing.assert_allclose(served.submit(groups[4]).result(60), expected[4], rtol=1e-6, atol=1e-5)
    assert served.waiting == 0


def test_a_group_that_is_cancelled_while_its_row_fails_does_not_end_the_thread(engine):
    scorer = TokenScorer(tiny_model("llama").eval(), 4096, 256)
    group, other = random_groups(2, seed=6)
    served, running, gone = engine(scorer, 4096, 10**7), threading.Event(), threading.Event()
    score_row = served._models[0].score_row

    def failing(row):
        running.set()
        gone.wait(60)
        raise ZeroDivisionError

    served._models[0].score_row = failing
    future = served.submit(group)
    assert running.wait(60)
    future.cancel()
    future.done = lambda: False  # as it was when the engine looked, before the client went
    gone.set()
    served._thread.join(0.2)
    assert served.alive
    served._models[0].score_row = score_row
    np.testing.assert_allclose(served.submit(other).result(60), scorer.score([other])[0], rtol=1e-6, atol=1e-5)


def test_the_memory_of_prompts_stays_below_its_bound(engine):
    scorer = TokenScorer(tiny_model("llama").eval(), 4096, 256)
    served = engine(scorer, 4096, 100_000)
    for group in random_groups(60, seed=7):
        served.submit(group).result(60)
        assert 0 < served.caches[0].held_bytes <= 100_000
    kept = [size for _, size in served.caches[0]._kept.values()]
    assert sum(kept) == served.caches[0].held_bytes
    assert len(kept) < 60


def test_the_prompt_used_longest_ago_goes_first():
    import torch

    cache, layer = PrefixCache(3000), torch.nn.Identity()
    for prompt in ([1], [2], [3]):
        cache.put(prompt, {layer: (torch.zeros(125), torch.zeros(125))})  # 1,000 bytes
    assert cache.get([1]) is not None
    cache.put([4], {layer: (torch.zeros(125), torch.zeros(125))})
    assert [cache.get([n]) is not None for n in (1, 2, 3, 4)] == [True, False, True, True]
    cache.put([5], {layer: (torch.zeros(1000), torch.zeros(0))})  # larger than all
    assert (len(cache), cache.held_bytes) == (3, 3000)
