"""Ranks among the whole catalogue by hand: candidates from the log, scores from one response at a time."""

import io
import shutil
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from dmpo_dist.commands.catalogue_parts import PER_PART, CatalogueRanker, rank_catalogue
from dmpo_dist.commands.evaluate import evaluate, preflight
from dmpo_dist.commands.scored_parts import PARTS
from dmpo_dist.config import DataConfig, RunConfig, TemplateConfig, config_of
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.fitting_log import of_same_users
from dmpo_dist.evaluation.metrics import CATALOGUE_METRICS, catalogue_metrics
from dmpo_dist.evaluation.ranking import load_ranking_model
from dmpo_dist.evaluation.report import evaluate_scores
from dmpo_dist.evaluation.tables import catalogue_table, markdown
from dmpo_dist.evaluation.whole_catalogue import CANDIDATES_AT_ONCE, WholeCatalogue, summary
from dmpo_dist.modeling.backbone import write_stamp
from dmpo_dist.modeling.token_scorer import TokenScorer
from dmpo_dist.modeling.trie_search import best_of
from dmpo_dist.report.evaluated import results
from dmpo_dist.report.gather import Material

CONSOLE = Console(file=io.StringIO(), width=100)
NAMES = ("random", "popularity", "item_knn")
CONFIG = RunConfig.model_validate({"model": {"max_length": 256}, "evaluation": {"bootstrap_samples": 100}})


def candidates(data, row):
    """Item and title of the positive, then of all that the log does not show with the user before the request."""
    log = data.interactions
    taken = set(log[(log["user"] == row["user"]) & (log["timestamp"] < row["timestamp"])]["item"])
    titles = dict(zip(data.items["item"], data.items["title"], strict=True))
    left = [item for item in titles if item not in taken and item != row["positive_item"]]
    return [row["positive_item"], *left], [row["positive"], *(titles[item] for item in left)]


def assert_equal(seen, expected):
    assert seen.keys() == expected.keys()
    for metric, values in expected.items():
        np.testing.assert_allclose(seen[metric], values, atol=1e-12, err_msg=metric)


def test_a_model(world, tmp_path):
    data, model = world.data, str(world.model)
    loaded = load_ranking_model(model, CONFIG)
    groups = [loaded.token_group(row["history"], candidates(data, row)[1], row["user"]) for row in data.test]
    expected = catalogue_metrics(loaded.score_groups(groups))
    ranked = rank_catalogue("m", model, WholeCatalogue(data), data, CONFIG, [None], tmp_path, CONSOLE)
    assert ranked.keys() == {None}
    assert_equal(ranked[None].metrics, expected)


def test_what_was_taken_is_among_the_candidates_where_it_may_be_recommended_again(world, tmp_path):
    """Also to the model; and where positives repeat, a note says that their rivals of the history are left out."""
    data, model = world.data, str(world.model)
    allowed = config_of({**CONFIG.model_dump(), "ranking.exclude_history": False})
    rows = [data.items["title"].tolist()] * len(data.test)
    loaded = load_ranking_model(model, CONFIG)
    asked = zip(data.test, rows, strict=True)
    groups = [
        loaded.token_group(r["history"], [r["positive"], *(t for t in titles if t != r["positive"])])
        for r, titles in asked
    ]
    whole = WholeCatalogue(data, exclude_history=False)
    ranked = rank_catalogue("m", model, whole, data, allowed, [None], tmp_path, CONSOLE)
    assert_equal(ranked[None].metrics, catalogue_metrics(loaded.score_groups(groups)))
    assert whole.repeated == 0
    first = data.test[0]
    again = data.test.map(lambda row: row | {"positive_item": first["history_items"][0]}).select([0])
    assert WholeCatalogue(replace(data, test=again)).repeated == 1


def test_an_interruption_costs_a_part(world, tmp_path, monkeypatch):
    """And actors, whose tasks may finish in any order, find the same."""
    whole, asked, one = WholeCatalogue(world.data), [], CatalogueRanker.rows
    arguments = ("m", str(world.model), whole, world.data, CONFIG, [None, 3])
    expected = rank_catalogue(*arguments, tmp_path / "whole", CONSOLE)
    parts = -(-len(world.data.test) // PER_PART)

    def dies_at_the_second(self, task):
        if asked:
            raise KeyboardInterrupt
        asked.append(task)
        return one(self, task)

    monkeypatch.setattr(CatalogueRanker, "rows", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        rank_catalogue(*arguments, tmp_path / "killed", CONSOLE)
    asked.clear()
    monkeypatch.setattr(CatalogueRanker, "rows", lambda self, task: asked.append(task) or one(self, task))
    assert_same(rank_catalogue(*arguments, tmp_path / "killed", CONSOLE), expected)
    assert len(asked) == 2 * parts - 1

    monkeypatch.setattr("dmpo_dist.cluster.train.ray_session", lambda _: nullcontext())
    monkeypatch.setattr(
        "dmpo_dist.cluster.actors.map_over_actors",
        lambda _, make_worker, arguments, tasks: map(make_worker(*arguments), tasks[::-1]),
    )
    two = CONFIG.model_copy(deep=True)
    two.cluster.workers = 2
    assert_same(rank_catalogue(*arguments[:4], two, [None, 3], tmp_path / "two", CONSOLE), expected)


def test_parts_of_another_template_or_log_are_not_taken(world, tmp_path):
    """Two trainings that end at their start have the same weights, whatever their templates."""
    path = shutil.copytree(world.model, tmp_path / "model")
    for preamble in ("Liked:\n", "Watched:\n", "Liked:\n"):
        write_stamp(path, TemplateConfig(preamble=preamble), stage="sft")
        rank_catalogue("m", str(path), WholeCatalogue(world.data), world.data, CONFIG, [1], tmp_path, CONSOLE)
    assert len(list((tmp_path / PARTS).iterdir())) == 2
    card = world.data.card.model_copy(update={"digests": {**world.data.card.digests, "interactions.parquet": "other"}})
    data = replace(world.data, card=card)  # whose users took other items, which are no candidates then
    rank_catalogue("m", str(path), WholeCatalogue(data), data, CONFIG, [1], tmp_path, CONSOLE)
    assert len(list((tmp_path / PARTS).iterdir())) == 3


def assert_same(seen, expected):
    assert seen.keys() == expected.keys()
    for width, ranked in expected.items():
        assert_equal(seen[width].metrics, ranked.metrics)
        assert seen[width].shown.tolist() == ranked.shown.tolist()


def test_the_search_gives_the_figures_of_the_whole_trie(world, tmp_path, monkeypatch):
    """As `dmpo evaluate --catalogue` writes them; beams as many as titles lose nothing, and few may."""

    def evaluated(folder, beams, exact=True):
        of_evaluation = {"baselines": [], "order_requests": 0, "bootstrap_samples": 100, "catalogue_beams": beams}
        of_evaluation |= {"catalogue_exact": exact}
        config = config_of({"data.path": world.data.path, "model.max_length": 256, "evaluation": of_evaluation})
        return evaluate({"sft@0": str(world.model)}, config, folder, CONSOLE, catalogue=True).catalogue

    found = evaluated(tmp_path / "search", [1, 40])
    text = (tmp_path / "search/evaluation.md").read_text()
    monkeypatch.setattr(
        TokenScorer,
        "best_titles",
        lambda self, group, top, allowed, which: best_of(self.score_many(group, which), top, allowed),
    )
    beams_alone = evaluated(tmp_path / "alone", [1], exact=False)
    assert beams_alone.models == {"sft, 1 beam": found.models["sft, 1 beam"]}
    by_whole_trie = evaluated(tmp_path / "whole", [])
    exact, one, forty = (found.models[name] for name in ("sft", "sft, 1 beam", "sft, 40 beams"))
    assert exact == forty == by_whole_trie.models["sft"]
    assert set(exact) == set(CATALOGUE_METRICS) >= {"hr@3", "ndcg@3", "hr@5", "ndcg@5"}
    assert found.coverage["sft"] == found.coverage["sft, 40 beams"] == by_whole_trie.coverage["sft"]
    assert found.gini["sft"] == by_whole_trie.gini["sft"]
    assert one["hr@20"].value == one["hr@1"].value <= exact["hr@20"].value, "it finds one title"
    assert found.coverage["sft, 1 beam"] < found.coverage["sft"]
    rows = [line.split("|")[1].strip() for line in text.partition("## The whole")[2].splitlines() if "| sft" in line]
    assert rows[:3] == ["sft", "sft, 1 beam", "sft, 40 beams"], "beside each other"


def test_beams_that_cannot_be(world):
    def refused(message, catalogue=True, **settings):
        given = {"data": {"path": world.data.path}, "model": {"max_length": 256}} | settings
        with pytest.raises(UserError, match=message):
            preflight({"sft": str(world.model)}, config_of(given), CONSOLE, catalogue=catalogue)

    refused("catalogue_beams=.8, 41.: the catalogue has 40 titles; lower it", evaluation={"catalogue_beams": [8, 41]})
    refused("add --catalogue, or leave it out", catalogue=False, evaluation={"catalogue_beams": [8]})
    refused("ranks exactly; leave it out; evaluation.catalogue_beams adds rows", ranking={"beams": 8})
    refused(
        "leave out it or ranking.prior_weight",
        evaluation={"catalogue_beams": [8]},
        ranking={"prior_weight": 0.5},
    )
    refused("leaves nothing to rank the catalogue by; set catalogue_beams", evaluation={"catalogue_exact": False})
    refused("not by rule=mean; leave out one of the two", evaluation={"catalogue_beams": [8], "rule": "mean"})


def test_popularity_knows_nothing_of_the_future(world, monkeypatch):
    data = world.data
    scores = []
    for row in data.test:
        log = data.interactions[data.interactions["timestamp"] < row["timestamp"]]
        log = log[log["rating"] >= data.card.config["rating_threshold"]]
        counts = log["item"].value_counts()
        scores.append(np.array([float(counts.get(item, 0)) for item in candidates(data, row)[0]]))
    expected = catalogue_metrics(scores)
    seen = WholeCatalogue(data).baselines(NAMES, CONFIG, data)
    assert_equal(seen["popularity"].metrics, expected)
    assert set(seen) == set(NAMES)
    few = WholeCatalogue(data).baselines(NAMES, CONFIG, of_same_users(data, DataConfig(shots=8)))
    assert few["popularity"].shown.tolist() != seen["popularity"].shown.tolist()
    assert CANDIDATES_AT_ONCE > 3 * 40
    monkeypatch.setattr("dmpo_dist.evaluation.whole_catalogue.CANDIDATES_AT_ONCE", 3 * 40)
    for name, ranked in WholeCatalogue(data).baselines(NAMES, CONFIG, data).items():
        assert_equal(ranked.metrics, seen[name].metrics)
        np.testing.assert_array_equal(ranked.shown, seen[name].shown)
    shown = summary(seen, 40, 100, 0).content()["models"]["popularity"]["hr@10"]
    assert shown["value"] == pytest.approx(expected["hr@10"].mean())
    assert shown["low"] <= shown["value"] <= shown["high"]


def test_lists_are_the_best_items_whichever_the_positive_is(world):
    data = world.data
    scores = np.zeros((len(data.test), 40))
    scores[:, 7] = 2
    scores[0, 30] = 1
    whole = WholeCatalogue(data)
    lists = whole.scored([scores[:3], scores[3:]]).shown.reshape(len(data.test), 10)
    for number, (row, shown) in enumerate(zip(data.test, lists, strict=True)):
        items = candidates(data, row)[0]
        best = sorted((whole.items.tolist().index(item) for item in items), key=lambda i: (-scores[number, i], i))
        assert shown.tolist() == best[:10]
    figures = summary({"one@0": whole.scored([scores]), "one@1": whole.scored([-scores])}, 40, 100, 0).content()
    assert list(figures["models"]) == list(figures["coverage@10"]) == list(figures["gini@10"]) == ["one"]
    console = Console(file=io.StringIO(), width=100)
    console.print(catalogue_table(summary({"sft_continued": whole.scored([scores])}, 40, 100, 0).content(), 53))
    assert "sft_continued" in console.file.getvalue(), "the longest usual name is in one piece at 100 columns"


@pytest.mark.parametrize(("without_taken", "said"), [(True, "left out"), (False, "among them")])
def test_what_users_had_taken_is_said_to_be_a_candidate_where_it_is_one(world, without_taken, said):
    whole = WholeCatalogue(world.data, without_taken)
    scores = whole.scored([np.zeros((len(world.data.test), 40))])
    found = evaluate_scores({"sft": [np.zeros(6)] * len(world.data.test)}, world.data.test, 10, 0)
    found.catalogue = summary({"sft": scores}, 40, 10, 0, without_taken)
    assert f"among all 40 items, those taken before {said};" in markdown(found.content())
    material = Material("x", {}, {"e": found}, {}, {}, {}, {}, {}, {}, [], [], [])
    tables = [block.content for block in results(material) if block.kind == "table"]
    word = "except" if without_taken else "with"
    assert f"Among all 40 items {word} those that a user had taken" in [table.caption for table in tables]
