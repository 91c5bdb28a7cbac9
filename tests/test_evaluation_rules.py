"""Scoring rules against plain arithmetic on separately scored texts, and choices that see validation alone."""

import io
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM
from worlds import CONTEXT, SHAPE

from dmpo_dist.artifacts.evaluation import Evaluation, RuleChoice
from dmpo_dist.commands.evaluate import evaluate
from dmpo_dist.config import RunConfig, TemplateConfig
from dmpo_dist.data.requests import RankingRequest
from dmpo_dist.data.template import Template
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation import rules
from dmpo_dist.evaluation.metrics import ranking_metrics
from dmpo_dist.evaluation.ranking import Ranker, load_ranking_model
from dmpo_dist.modeling.backbone import find_model, make_scratch_model, write_stamp
from dmpo_dist.modeling.scoring_rule import require_prior

ALL = ["sum", "mean", "prior", "reference"]
SETTINGS = {"bootstrap_samples": 100, "order_requests": 0, "baselines": ["random"]}


@pytest.fixture(scope="module")
def project(world, tmp_path_factory):
    """The world's data, and two models of one tokenizer, the second of which says it started from the first."""
    folder, data = tmp_path_factory.mktemp("rules"), world.data
    (folder / "data").symlink_to(data.path)
    for seed, name in enumerate(("start", "model")):
        make_scratch_model(folder / name, SHAPE, world.titles, CONTEXT, seed)
    write_stamp(folder / "start", TemplateConfig(), stage="untuned")
    write_stamp(folder / "model", TemplateConfig(), stage="train", start=str(folder / "start"))
    return folder, data


def config(folder, ranking=None, **evaluation):
    settings = {"data": {"path": folder / "data"}, "model": {"max_length": 256}, "ranking": ranking or {}}
    return RunConfig.model_validate(settings | {"evaluation": SETTINGS | evaluation})


def log_prob(model, history, title):
    """By one plain forward of prompt and response; and the number of tokens that are scored."""
    template = model.template
    before = model.tokenizer(template.render(tuple(history)).text, add_special_tokens=False)["input_ids"]
    text = template.render(tuple(history)).text + template.render_response(title)
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    first = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(before))
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(model.source.path)
        log_probs = plain(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(log_probs[i - 1, ids[i]].item() for i in range(first, len(ids))), len(ids) - first


def test_every_face_ranks_by_the_same_rule(project):
    """Plain forwards, ``RankingModel``, ``dmpo rank`` and ``dmpo evaluate`` on one request."""
    folder, data = project
    model, start = (load_ranking_model(str(folder / name), config(folder)) for name in ("model", "start"))
    row = data.test[0]
    history, titles = tuple(row["history"]), (row["positive"], *row["negatives"])
    own, lengths = np.array([log_prob(model, history, title) for title in titles]).T
    prior = np.array([log_prob(model, (), title)[0] for title in titles])
    other = np.array([log_prob(start, history, title)[0] for title in titles])
    expected = {"sum": own, "mean": own / lengths, "prior": own - 0.5 * prior, "reference": own - other}
    asked = {
        "sum": ({}, {}),
        "mean": ({"length_normalize": True}, {"length_normalize": True}),
        "prior": ({"prior_weight": 0.5}, {"prior_weight": 0.5}),
        "reference": ({"reference": model.reference(str(folder / "start"))}, {"reference": "start"}),
    }
    found = rules.ruled_scores(model, model.score_rows(data.test), data, config(folder, rules=ALL, prior_weights=[0.5]))
    assert list(found.by_rule) == ALL
    for rule, scores in expected.items():
        of_model, of_ranking = asked[rule]
        ranker = Ranker(str(folder / "model"), config(folder, of_ranking), None, 20)
        faces = [
            model.score(history, titles, **of_model),
            ranker.scores(RankingRequest("u", history, titles), np.array(titles, dtype=object)),
            found.by_rule[rule][0],
        ]
        for face in faces:
            np.testing.assert_allclose(face, scores, rtol=1e-4, atol=1e-4, err_msg=rule)
    differences = [np.abs(a - b).max() for a, b in pairwise(expected.values())]
    assert min(differences) > 0.01, "what the tests above rest on"


def test_a_catalogue_is_ranked_by_the_rule_and_by_nothing_else(project):
    folder, _ = project
    every = {"length_normalize": True, "prior_weight": 0.3, "popularity_weight": 0.1, "reference": "start"}
    corrections = {"sum": [], "mean": ["length_normalize"], "prior": ["prior_weight"], "reference": ["reference"]}
    for rule, expected in corrections.items():
        choice = RuleChoice(rule=rule, prior_weight=0.7)
        ranking = rules.with_rule(config(folder, every, rules=ALL), choice).ranking
        assert ranking.corrections == expected
        assert ranking.prior_weight == (0.7 if rule == "prior" else 0)
    assert {*rules.with_rule(config(folder, every), None).ranking.corrections} == {*every}


def test_the_prior_is_scored_once_a_title(project, monkeypatch):
    folder, data = project
    model = load_ranking_model(str(folder / "model"), config(folder))
    scored = []
    score = model.score_catalogue
    monkeypatch.setattr(model, "score_catalogue", lambda group: scored.append(len(group.branches)) or score(group))
    settings = config(folder, rule="prior")
    rules.ruled_scores(model, model.score_rows(data.test), data, settings)
    titles = {
        title for rows in (data.test, data.validation) for row in rows for title in (row["positive"], *row["negatives"])
    }
    assert scored == [len(titles)]


@pytest.mark.slow
def test_the_choice_is_by_validation_and_used_everywhere(project):
    folder, data = project
    models = {"zero": str(folder / "start"), "dmpo": str(folder / "model")}
    settings = config(folder, rule="auto", rules=ALL, prior_weights=[0.25, 1])
    console = Console(file=io.StringIO(), width=100)
    evaluate(models, settings, folder / "auto", console, catalogue=True)
    found = Evaluation.read(folder / "auto")
    assert list(found.rules.models["zero"]) == ["sum", "mean", "prior"], "it has no start"
    for name, path in models.items():
        choice = found.rules.chosen[name]
        model = load_ranking_model(path, settings)
        by_sum = ranking_metrics(model.score_rows(data.validation))["ndcg@10"].mean()
        assert choice.validation["sum"] == pytest.approx(by_sum)
        label = f"prior {choice.prior_weight:g}" if choice.rule == "prior" else choice.rule
        assert choice.validation[label] == max(choice.validation.values())
        assert found.models[name] == found.rules.models[name][choice.rule]
        assert f"{name} by {choice.rule}" in " ".join(console.file.getvalue().split())
    # nothing but the rule differs from an evaluation that knows of no rules, whose numbers stand in the row sum
    evaluate(models, config(folder), folder / "plain", console)
    plain = Evaluation.read(folder / "plain")
    assert plain.rules is None
    assert all(plain.models[name] == found.rules.models[name]["sum"] for name in models)
    assert "## Scoring rules" in (folder / "auto/evaluation.md").read_text()
    # the whole catalogue goes by the chosen rule too
    forced = config(folder, rule="prior", prior_weights=[1])
    evaluate({"dmpo": models["dmpo"]}, forced, folder / "forced", console, catalogue=True)
    evaluate({"dmpo": models["dmpo"]}, config(folder, {"prior_weight": 1}), folder / "ranked", console, catalogue=True)
    one, other = (Evaluation.read(folder / name).catalogue.models["dmpo"] for name in ("forced", "ranked"))
    assert one == other


def test_rules_that_cannot_be(project, tmp_path):
    folder, data = project
    console = Console(file=io.StringIO())

    def refused(match, name="model", **settings):
        with pytest.raises(UserError, match=match):
            evaluate({"m": str(folder / name)}, config(folder, **settings), tmp_path / "out", console)
        assert not (tmp_path / "out").exists()

    refused("does not say what it was started from", "start", rule="reference")
    refused("none of evaluation.rules applies; add sum", "start", rule="auto", rules=["reference"])
    no_prompt = Template("", "", "{title}, ", "", "", "{title}", "<end>", item_ends=False)
    with pytest.raises(UserError, match="leaves no prompt where there is no history"):
        require_prior(no_prompt, "m")
    empty = replace(data, validation=data.validation.select([]))
    sources = {
        "m": (find_model(str(folder / "model")), load_ranking_model(str(folder / "model"), config(folder)).template)
    }
    rules.check_rules(sources, config(folder, rule="prior", prior_weights=[0.5]), empty)
    with pytest.raises(UserError, match="chosen on validation requests, and .* holds none"):
        rules.check_rules(sources, config(folder, rule="prior"), empty)
