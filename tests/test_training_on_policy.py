"""Negatives that the model finds itself: valid, seeded, the same on any number of ranks and after a resume."""

import json
import math
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_model
from tokenizers import normalizers
from worlds import SHAPE, World, prepared

from dmpo_dist.batching.plan import Schedule
from dmpo_dist.batching.trie import TitleTrie
from dmpo_dist.config import OnPolicyConfig, TemplateConfig
from dmpo_dist.config.load import config_of
from dmpo_dist.data.template import make_template
from dmpo_dist.data.tokenization import GroupTokenizer
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.backbone import find_model, load_tokenizer
from dmpo_dist.modeling.logprobs import LogProbModel
from dmpo_dist.modeling.scoring import node_log_probs
from dmpo_dist.modeling.trie_attention import use_trie_attention
from dmpo_dist.modeling.trie_search import Beam, BeamRequest, beam_searches
from dmpo_dist.training.catalogue import CatalogueGroups
from dmpo_dist.training.job import Job
from dmpo_dist.training.on_policy import Drawn, OnPolicy, draw, require_on_policy, rewards_of

CPU = torch.device("cpu")
BATCH, K = 12, 3


@pytest.fixture(scope="module")
def encode(world: World) -> GroupTokenizer:
    tokenizer = load_tokenizer(find_model(str(world.model)))
    return GroupTokenizer(tokenizer, make_template(TemplateConfig(), tokenizer), 128)


@pytest.fixture(scope="module")
def catalogue(world: World, encode: GroupTokenizer) -> CatalogueGroups:
    return CatalogueGroups(world.data, encode)


@pytest.fixture(scope="module")
def forward():
    model = tiny_model("llama", vocab=SHAPE.vocab_size).eval()
    use_trie_attention(model)
    return LogProbModel(model)


def on_policy(catalogue, forward, settings, seed=0, rewards=None):
    @contextmanager
    def searching():
        yield lambda requests: beam_searches(forward, requests, settings.beams, CPU)

    schedule = Schedule(len(catalogue.rows), BATCH, 0)
    return OnPolicy(settings, catalogue, schedule, K, seed, searching, rewards, lambda text: None)


def without_case(world, twins: bool) -> CatalogueGroups:
    """For a tokenizer that knows no case, without a log, so that every title may be drawn.

    Args:
        twins: give every title another one that differs in case alone.
    """
    tokenizer = load_tokenizer(find_model(str(world.model)))
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    items = world.data.items
    again = items.assign(item=items["item"] + " again", title=items["title"].str.swapcase())
    data = replace(world.data, items=pd.concat([items, again] if twins else [items]), interactions=None)
    return CatalogueGroups(data, GroupTokenizer(tokenizer, make_template(TemplateConfig(), tokenizer), 128))


def taken_before(data, row):
    """Titles of what the user had taken by the time of ``row``, from the log alone."""
    log = data.interactions.merge(data.items, on="item")
    return set(log[(log["user"] == row.user) & (log["timestamp"] <= row.timestamp)]["title"])


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("split", ["time", "leave_one_out"])
def test_every_negative_is_a_title_that_the_user_had_not_taken(world, encode, forward, split, tmp_path):
    data = world.data if split == "time" else prepared(tmp_path / "data", split=split)
    catalogue = CatalogueGroups(data, encode)
    made = on_policy(catalogue, forward, OnPolicyConfig(every=4, beams=12, top=6))
    made.begin(0, 4)
    first_taken = data.interactions.merge(data.items, on="item").groupby("title")["timestamp"].min()
    of_user = data.interactions.merge(data.items, on="item").groupby("user")["title"].agg(set)
    for (epoch, index), drawn in made.drawn.items():
        row = catalogue.rows[index]
        titles = {catalogue.titles[column] for column in drawn.titles}
        assert len(titles) == len(drawn.titles) == K
        assert not titles & {row.positive, *row.history, *taken_before(data, row)}
        assert all(first_taken[title] < row.timestamp for title in titles)
        if split == "leave_one_out":
            assert not titles & of_user[row.user], "a held-out like is no negative"
        group = made.group(index, epoch)
        assert group.branches[0] == catalogue.whole(index).branches[0]
        by_title = dict(zip(catalogue.titles, catalogue.whole(index).branches[1:], strict=True))
        assert list(group.branches[1:]) == [by_title[catalogue.titles[column]] for column in drawn.titles]


@pytest.mark.usefixtures("one_rank")
def test_negatives_are_drawn_among_the_titles_that_the_model_ranks_first(catalogue, forward):
    """With as many beams as titles, ranks are those of the whole catalogue scored title by title."""
    settings = OnPolicyConfig(every=2, beams=len(catalogue.titles), top=5, skip=2)
    made = on_policy(catalogue, forward, settings)
    made.begin(0, 2)
    for (_, index), drawn in made.drawn.items():
        whole = catalogue.whole(index)
        scores = _scores(forward, whole.prefix, catalogue.trie(whole))
        allowed = catalogue.eligible(index)
        allowed[catalogue.positive(index)] = True
        order = [int(column) for column in np.argsort(-scores, kind="stable") if allowed[column]]
        assert drawn.target == 1 + order.index(catalogue.positive(index))
        others = [column for column in order if column != catalogue.positive(index)]
        assert set(drawn.titles) <= set(others[2:7])
        assert drawn.ranks == [1 + order.index(column) for column in drawn.titles] == sorted(drawn.ranks)


def _scores(forward, prefix, trie: TitleTrie) -> np.ndarray:
    return trie.log_probs(node_log_probs(forward, prefix, trie, 4096, CPU))


def test_a_search_finds_none_but_the_allowed_and_gives_each_request_its_own(forward):
    """Requests in one row are as each alone, and a narrow search loses no beam to titles that are not allowed."""
    rng = np.random.default_rng(0)
    titles = [[*rng.integers(3, 9, size=rng.integers(1, 5)).tolist(), 2] for _ in range(40)]
    trie = TitleTrie.of(titles, [0] * 40)
    requests = []
    for length in (1, 7, 30):
        allowed = rng.random(40) < 0.4
        requests.append(BeamRequest(rng.integers(3, 300, size=length).tolist(), trie, allowed))
    together = beam_searches(forward, requests, 8, CPU)
    for request, found in zip(requests, together, strict=True):
        (alone,) = beam_searches(forward, [request], 8, CPU)
        assert [beam.title for beam in alone] == [beam.title for beam in found]
        assert len(found) == min(8, request.allowed.sum())
        assert all(request.allowed[beam.title] for beam in found)
        scores = _scores(forward, request.prefix, trie)
        np.testing.assert_allclose([b.log_prob for b in found], scores[[b.title for b in found]], rtol=1e-5)
        (everything,) = beam_searches(forward, [request], 40, CPU)
        best = sorted(np.flatnonzero(request.allowed), key=lambda title: (-scores[title], title))
        np.testing.assert_allclose([b.log_prob for b in everything], scores[best], rtol=1e-5)


@pytest.mark.usefixtures("one_rank")
def test_titles_that_the_tokenizer_reads_alike_are_one(world, forward):
    """To a catalogue in which every title has a twin of another case, one without case does what it did without."""
    made = []
    for twins in (False, True):
        catalogue = without_case(world, twins)
        settings = OnPolicyConfig(every=2, beams=len(world.titles), top=6)
        made.append(on_policy(catalogue, forward, settings, rewards=lambda target, ranks: tuple(ranks)))
        made[-1].begin(0, 2)
    alone, beside_twins = made
    assert alone.drawn == beside_twins.drawn
    for epoch, index in alone.drawn:
        group = beside_twins.group(index, epoch)
        assert group == alone.group(index, epoch)
        assert len(set(map(tuple, group.branches))) == 1 + K


@pytest.mark.usefixtures("one_rank")
def test_stored_negatives_that_read_like_the_titles_drawn_do_not_fill_up(world, forward):
    catalogue = without_case(world, twins=True)
    row = catalogue.rows[0]
    first, second = row.negatives[:2]
    stored = (row.positive.swapcase(), first.swapcase(), second, *row.negatives[2:])
    catalogue.rows = [replace(row, negatives=stored)]
    made = OnPolicy(OnPolicyConfig(), catalogue, Schedule(1, 1, 0), 2, 0, None, None, print)
    group = made._as_trained((0, 0), Drawn([catalogue.column(first)], [1], 0), catalogue.whole(0))
    by_title = dict(zip(catalogue.titles, catalogue.whole(0).branches[1:], strict=True))
    assert list(group.branches) == [by_title[title] for title in (row.positive, first, second)]


@pytest.mark.usefixtures("one_rank")
def test_a_draw_depends_on_seed_request_and_step_alone(catalogue, forward):
    settings = OnPolicyConfig(every=2, beams=20, top=12)
    first, again, other, later = (on_policy(catalogue, forward, settings, seed) for seed in (0, 0, 1, 0))
    for made, start in ((first, 0), (again, 0), (other, 0), (later, 2)):
        made.begin(start, start + 2)
    assert first.drawn == again.drawn
    assert first.drawn != other.drawn
    later.begin(0, 2)
    assert later.drawn == first.drawn, "nothing is left over from the steps before"
    steps = len(first.drawn) // BATCH
    everything = on_policy(catalogue, forward, OnPolicyConfig(every=steps * 2, beams=20, top=12))
    everything.begin(0, 2)
    assert everything.drawn == first.drawn


@pytest.mark.usefixtures("one_rank")
def test_a_stretch_that_was_cut_goes_on_with_what_was_drawn(catalogue, forward):
    settings = OnPolicyConfig(every=4, beams=12, top=6)
    made = on_policy(catalogue, forward, settings)
    assert list(made.stretches(3, 13)) == [(3, 4), (4, 8), (8, 12), (12, 13)]
    made.begin(0, 4)
    assert made.state(4) == [], "the next steps are drawn anew"
    said = []
    resumed = on_policy(catalogue, None, settings)  # without a model: it cannot search
    resumed.say = said.append
    resumed.restore([list(entry) for entry in made.state(3)])
    resumed.begin(3, 4)
    for pair in resumed.drawn:
        assert resumed.drawn[pair] == made.drawn[pair]
        assert resumed.group(pair[1], pair[0]) == made.group(pair[1], pair[0])
    assert len(resumed.drawn) == len(made.schedule.groups(3))
    assert made.figures["target_found"] > 0
    assert not resumed.figures, "these are some of the groups that were searched"
    assert not said


@pytest.mark.usefixtures("one_rank")
def test_stored_negatives_fill_up(catalogue, forward):
    made = on_policy(catalogue, forward, OnPolicyConfig(every=1, beams=4, top=1))
    made.begin(0, 1)
    for (epoch, index), drawn in made.drawn.items():
        assert len(drawn.titles) == 1
        branches = made.group(index, epoch).branches
        whole = catalogue.whole(index)
        stored = [whole.branches[1 + catalogue.column(title)] for title in catalogue.rows[index].negatives]
        assert len(branches) == 1 + K
        assert all(branch in stored for branch in branches[2:])


def test_a_draw_leaves_out_the_positive_and_skips_the_first():
    found = [Beam(title, -float(title)) for title in range(10)]
    counts = Counter()
    for seed in range(300):
        drawn = draw(found, 4, skip=2, top=4, count=2, rng=np.random.default_rng(seed))
        assert drawn.target == 5
        assert drawn.ranks == [title + 1 for title in drawn.titles]
        counts.update(drawn.titles)
    assert set(counts) == {2, 3, 5, 6}
    assert max(counts.values()) < 1.4 * min(counts.values()), "each is as likely"
    assert draw(found, 77, 0, 9, 20, np.random.default_rng(0)) == Drawn([*range(9)], [*range(1, 10)], 0)


def test_rewards_are_those_of_the_papers():
    drawn = draw([Beam(t, -float(t)) for t in (3, 8, 1)], 8, 0, 3, 2, np.random.default_rng(0))
    ranks = [*drawn.ranks, 4]
    assert rewards_of(drawn.target, ranks, always=False) == (1.0, -1.0, -0.5, -1 / math.log2(5))
    assert rewards_of(0, ranks, always=False) == (0.0,) * 4
    assert rewards_of(0, ranks, always=True) == rewards_of(drawn.target, ranks, always=False)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("beams", [12, 40])
def test_a_stored_negative_that_the_search_found_has_its_rank(catalogue, forward, beams):
    """Passed over by ``skip`` and ``top`` it ranked after all beams, which is for those that were not found."""
    settings = OnPolicyConfig(every=1, beams=beams, skip=1, top=1)
    made = on_policy(catalogue, forward, settings, rewards=lambda target, ranks: (float(target), *map(float, ranks)))
    made.begin(0, 1)
    found_again = 0
    for (epoch, index), drawn in made.drawn.items():
        whole, group = catalogue.whole(index), made.group(index, epoch)
        allowed = catalogue.eligible(index)
        allowed[catalogue.positive(index)] = True
        (found,) = beam_searches(forward, [BeamRequest(whole.prefix, catalogue.trie(whole), allowed)], beams, CPU)
        ranks = {tuple(whole.branches[1 + beam.title]): float(rank) for rank, beam in enumerate(found, start=1)}
        assert group.scores == (drawn.target, *(ranks.get(tuple(branch), beams + 1) for branch in group.branches[1:]))
        found_again += sum(tuple(branch) in ranks for branch in group.branches[2:])
    assert found_again
    resumed = on_policy(catalogue, None, settings, rewards=made.rewards)
    resumed.restore(json.loads(json.dumps([[*pair, *drawn] for pair, drawn in made.drawn.items()])))
    assert {pair: resumed._as_trained(pair, resumed.drawn[pair], catalogue.whole(pair[1])) for pair in made.drawn} == {
        pair: made.group(pair[1], pair[0]) for pair in made.drawn
    }


def job(data, **keys) -> Job:
    config = config_of({"train.on_policy": {}, **keys})
    return Job("preference", config.model_copy(update={"output_dir": data.path}), "none", data.path)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"train.on_policy.beams": 60}, "beams=60, but the catalogue of .* has 40 titles"),
        ({"reference.cache": "memory"}, "does not go with reference.cache"),
        ({"objective.name": "recpo"}, "does not go with objective.margin_weight"),
        ({"model.compile": True}, "does not go with model.compile"),
        ({"train.on_policy": None, "objective.name": "rank_reward"}, "set train.on_policy"),
    ],
)
def test_what_does_not_go_together_is_one_line(world, keys, words):
    with pytest.raises(UserError, match=words) as raised:
        require_on_policy(job(world.data, **keys), world.data)
    assert "\n" not in str(raised.value)


def test_ready_preferences_have_no_catalogue(world):
    with pytest.raises(UserError, match="was made from ready preferences and has none"):
        require_on_policy(job(world.data), replace(world.data, items=None))


def test_a_title_that_does_not_fit_is_named_at_the_start(world, encode):
    with pytest.raises(UserError, match="all 40 titles of the catalogue .* longest title does not fit"):
        CatalogueGroups(world.data, replace(encode, max_length=3)).stored()


def test_more_is_asked_for_than_the_search_finds():
    with pytest.raises(UserError, match="top=16 and skip=8 need 24 titles, but beams=20"):
        config_of({"train.on_policy.skip": 8})
