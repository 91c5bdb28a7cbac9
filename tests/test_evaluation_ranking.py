"""A user's ranking against plain arithmetic on separately scored titles, and what decides it besides the model."""

import shutil
from functools import cache

import numpy as np
import pytest
from pydantic import ValidationError
from worlds import CONTEXT, make_three_models

from dmpo_dist.artifacts.stamp import ModelStamp
from dmpo_dist.config import ModelConfig, RankingConfig, RunConfig, ScratchModel, TemplateConfig, config_of
from dmpo_dist.data.requests import Catalogue, RankingRequest
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.inputs import given_texts
from dmpo_dist.evaluation.ranking import (
    Ranker,
    check_beams,
    load_ranking_model,
    ranking_notes,
    reference_of,
    require_no_beams,
)
from dmpo_dist.modeling.backbone import ModelSource, find_model, make_scratch_model, unlike_training, with_length_of
from dmpo_dist.modeling.scoring_rule import scored_lengths

TITLES = ("Heat", "Alien", "Alien 3", "Aliens", "The Thing", "The Fly", "The Fly (1958)", "Up")
COUNTS = np.array([9, 0, 3, 1, 80, 2, 0, 5])
CATALOGUE = Catalogue(TITLES, COUNTS)
HISTORY = ("Alien", "The Fly", "Tron")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_three_models(folder, TITLES)
    return folder


def config(**ranking):
    return RunConfig.model_validate({"model": {"max_length": 128}, "ranking": ranking})


@cache
def ranking_model(model):
    return load_ranking_model(str(model), config())


def log_probs(model, titles):
    """By the layouts that training and evaluation use, and the numbers of scored tokens."""
    loaded = ranking_model(model)
    group = loaded.token_group(HISTORY, titles)
    return loaded.score_groups([group])[0], scored_lengths(group)


def ranked(model, request, top=20, **ranking):
    out = Ranker(str(model), config(**ranking), CATALOGUE, top)(request)
    assert out.user == request.user
    assert out.scores == sorted(out.scores, reverse=True)
    return dict(zip(out.titles, out.scores, strict=True))


WHOLE = RankingRequest("u", HISTORY, None)


def test_the_whole_catalogue_without_the_history(folder):
    scores, _ = log_probs(folder / "adapter", TITLES)
    expected = {title: score for title, score in zip(TITLES, scores, strict=True) if title not in HISTORY}
    assert ranked(folder / "adapter", WHOLE) == pytest.approx(expected, rel=1e-5)
    with_history = ranked(folder / "adapter", WHOLE, exclude_history=False)
    assert with_history == pytest.approx(dict(zip(TITLES, scores, strict=True)), rel=1e-5)
    best = ranked(folder / "adapter", WHOLE, top=2)
    assert list(best) == sorted(expected, key=expected.__getitem__, reverse=True)[:2]


def test_beams_are_as_good_as_they_are_many(folder):
    exact = ranked(folder / "adapter", WHOLE)
    assert ranked(folder / "adapter", WHOLE, beams=len(TITLES)) == pytest.approx(exact, rel=1e-5)
    (narrow,) = ranked(folder / "adapter", WHOLE, beams=1)
    assert narrow in exact


def test_beams_that_cannot_be():
    check_beams(RankingConfig(), 8, 20)
    check_beams(RankingConfig(beams=8), 8, 20)
    with pytest.raises(UserError, match="ranking.beams=9: the catalogue has 8 titles; lower it"):
        check_beams(RankingConfig(beams=9), 8, 3)
    with pytest.raises(UserError, match="finds 4 titles at most, and --top asks for 5"):
        check_beams(RankingConfig(beams=4), 8, 5)
    with pytest.raises(UserError, match="ranking.beams=4: dmpo serve ranks exactly; leave it out"):
        require_no_beams(RankingConfig(beams=4), "dmpo serve")
    with pytest.raises(ValidationError, match="without length_normalize, popularity_weight; leave out one of the two"):
        RankingConfig(beams=4, length_normalize=True, popularity_weight=0.1)


def test_given_candidates_are_ranked_as_they_are(folder):
    few = ("Up", "Alien", "Heat")
    scores, _ = log_probs(folder / "adapter", few)
    expected = dict(zip(few, scores, strict=True))
    assert ranked(folder / "adapter", RankingRequest("u", HISTORY, few)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("reference", "model"), [("base", "base"), ("start", "other"), (None, None)])
def test_reference_length_and_popularity(folder, reference, model):
    scores, lengths = log_probs(folder / "adapter", TITLES)
    if model:
        scores = scores - log_probs(folder / model, TITLES)[0]
    expected = dict(zip(TITLES, scores / lengths - 0.3 * np.log1p(COUNTS), strict=True))
    options = {"reference": reference, "length_normalize": True, "popularity_weight": 0.3, "exclude_history": False}
    seen = ranked(folder / "adapter", WHOLE, **options)
    assert seen == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_references_that_cannot_be(folder, tmp_path):
    whole = find_model(str(folder / "base"))
    with pytest.raises(UserError, match="ranking.reference=base: .*whole model without a base"):
        reference_of(whole, "base")
    with pytest.raises(UserError, match="does not say what it was started from"):
        reference_of(whole, "start")
    for option, name in (("ranking.reference=", r"ranking\.reference"), ("--reference ", "--reference")):
        with pytest.raises(UserError, match=f"nosuch: there is no such model folder; correct {name} to a model folder"):
            reference_of(whole, "nosuch", option)
    scratch = ScratchModel(hidden_size=16, layers=1, heads=2, intermediate_size=24, vocab_size=280)
    make_scratch_model(tmp_path / "tokens", scratch, ["quite other words"], 128, 0)
    with pytest.raises(UserError, match="has another tokenizer"):
        Ranker(str(folder / "base"), config(reference=str(tmp_path / "tokens")), CATALOGUE, 1)


def test_a_rule_that_only_an_evaluation_has_a_use_for_is_named(world, tmp_path):
    """``dmpo recommend ... evaluation.rule=mean`` ranked by the sum without a word."""
    rules = {"mean": "give ranking.length_normalize=true", "auto": "give one of ranking.length_normalize=true, "}
    for rule, words in rules.items():
        (note,) = ranking_notes(str(world.model), config_of({"evaluation.rule": rule}))
        assert note.startswith(f"evaluation.rule={rule} has no effect here")
        assert words in note
    assert ranking_notes(str(world.model), config_of({})) == []
    shutil.copytree(world.model, tmp_path / "run" / "model")
    with pytest.raises(UserError, match=r"run: holds neither .*; a run's model is in .*run/model"):
        ranking_notes(str(tmp_path / "run"), config_of({}))


def test_a_model_keeps_the_length_it_was_trained_with(world, tmp_path):
    def trained(name, max_length):
        folder = shutil.copytree(world.adapter, tmp_path / name)
        ModelStamp(max_length=max_length).write(folder)
        return find_model(str(folder))

    short, long, beyond, unknown = trained("s", 100), trained("l", 200), trained("b", 9999), trained("u", None)

    def length(sources, **model):
        return with_length_of(sources, RunConfig.model_validate({"model": model})).model.max_length

    assert [length([one]) for one in (short, long, unknown)] == [100, 200, CONTEXT]
    assert length([short, unknown, long]) == 200
    assert length([beyond]) == CONTEXT, "of a base with a shorter context"
    assert length([short], max_length=32) == 32
    assert length([]) == 512

    stamp = ModelStamp(template=TemplateConfig(), max_length=100, quantization="nf4")
    [of_base, of_length] = unlike_training(ModelSource("m", "b", True, stamp), ModelConfig(max_length=32))
    assert of_base == "model.quantization=nf4, and is used with none here; give model.quantization=nf4 to keep to it"
    assert of_length == "model.max_length=100, and is used with 32 here; give model.max_length=100 to keep to it"
    assert not unlike_training(ModelSource("m", "b", True, ModelStamp()), ModelConfig()), "a model that is not ours"


def test_prompts_show_the_fields_of_the_catalogue_whether_it_is_a_file_or_prepared_data(world, tmp_path):
    """Of a folder they were not read: those that training had left were shown, and new items had none."""
    template = TemplateConfig(item="{title} ({item})\n")
    file = tmp_path / "items.csv"
    world.data.items.to_csv(file, index=False)
    settings = RunConfig(template=template, model=ModelConfig(max_length=CONTEXT))
    fields = {title: {"item": item} for title, item in world.data.items[["title", "item"]].itertuples(index=False)}
    for catalogue in (file, world.folder / "data"):
        model = load_ranking_model(str(world.model), settings, given_texts(template, catalogue, None))
        assert model.encode.texts.items == fields
    assert given_texts(TemplateConfig(), world.folder / "data", None) is None
