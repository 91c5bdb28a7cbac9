"""A model asked directly for scores and rankings, against the rows that evaluation scores."""

import gc
import json
import shutil
import weakref

import numpy as np
import pandas as pd
import pytest
from peft import LoraConfig, get_peft_model
from test_evaluation_ranking import HISTORY, TITLES, folder, log_probs  # noqa: F401
from transformers import AutoModelForCausalLM

from dmpo_dist.config import ModelConfig, TemplateConfig
from dmpo_dist.data.template import make_template
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.backbone import find_model, load_tokenizer, write_stamp
from dmpo_dist.modeling.ranking_model import RankingModel

CONFIG = ModelConfig(max_length=128)


def test_rank_and_score(folder):  # noqa: F811
    model = RankingModel.load(str(folder / "adapter"), CONFIG)
    expected, _ = log_probs(folder / "adapter", TITLES)
    np.testing.assert_allclose(model.score(list(HISTORY), list(TITLES)), expected, rtol=1e-5)
    order = np.argsort(-expected, kind="stable")
    ranked = model.rank(HISTORY, TITLES)
    assert [one.title for one in ranked] == [TITLES[i] for i in order]
    np.testing.assert_allclose([one.score for one in ranked], expected[order], rtol=1e-5)
    best = model.rank(HISTORY, TITLES, top=2)  # found by a search
    assert [one.title for one in best] == [one.title for one in ranked[:2]]
    np.testing.assert_allclose([one.score for one in best], expected[order][:2], rtol=1e-5)
    by_mean = model.rank(HISTORY, TITLES, length_normalize=True)
    assert model.rank(HISTORY, TITLES, top=2, length_normalize=True) == by_mean[:2]
    assert model.rank(HISTORY, []) == model.rank(HISTORY, [], top=2) == []


def test_the_base_of_an_adapter_shares_its_weights(folder):  # noqa: F811
    model = RankingModel.load(str(folder / "adapter"), CONFIG)
    base = model.reference(model.source.base)
    assert base.load_weights() is model.load_weights()
    expected, _ = log_probs(folder / "base", TITLES)
    np.testing.assert_allclose(base.score(HISTORY, TITLES), expected, rtol=1e-5)
    other = model.reference(str(folder / "other"))
    np.testing.assert_allclose(other.score(HISTORY, TITLES), log_probs(folder / "other", TITLES)[0], rtol=1e-5)


def test_a_reference_loaded_by_itself_must_have_the_same_tokenizer(folder, world):  # noqa: F811
    model = RankingModel.load(str(folder / "adapter"), CONFIG)
    other = RankingModel.load(str(folder / "other"), CONFIG)
    expected = model.score(HISTORY, TITLES) - other.score(HISTORY, TITLES)
    np.testing.assert_allclose(model.score(HISTORY, TITLES, reference=other), expected, rtol=1e-5, atol=1e-5)
    stranger = RankingModel.load(str(world.model), CONFIG)
    with pytest.raises(UserError, match="has another tokenizer than .*adapter, so their log-probs cannot be compared"):
        model.rank(HISTORY, TITLES, reference=stranger)


def test_a_base_that_its_adapter_changes_is_read_by_itself(folder, tmp_path):  # noqa: F811
    """Without its adapter, a model that PiSSA began is what is left of the base."""
    shape = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="pissa")
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), shape).save_pretrained(tmp_path)
    model = RankingModel.load(str(tmp_path), CONFIG)
    base = model.reference(model.source.base)
    assert base.load_weights() is not model.load_weights()
    np.testing.assert_allclose(base.score(HISTORY, TITLES), log_probs(folder / "base", TITLES)[0], rtol=1e-5)


def test_weights_go_with_the_model(folder):  # noqa: F811
    """Without a collection of cycles, or two models would be in memory where one was meant."""
    gc.disable()
    try:
        model = RankingModel.load(str(folder / "adapter"), CONFIG)
        model.rank(HISTORY, TITLES)
        weights = weakref.ref(model.load_weights())
        del model
        assert weights() is None
    finally:
        gc.enable()


def test_what_is_found_before_weights_are_read(folder):  # noqa: F811
    other = TemplateConfig(preamble="Likes: ")
    with pytest.raises(UserError, match=r"trained with another template \(template.preamble differ"):
        RankingModel.load(str(folder / "adapter"), CONFIG, other)
    model = RankingModel.load(str(folder / "adapter"), ModelConfig(max_length=32))
    with pytest.raises(UserError, match="special token '</s>'"):
        model.score(HISTORY, ["Heat</s>"])
    with pytest.raises(UserError, match="more than model.max_length=32"):
        model.score(HISTORY, TITLES)


def test_titles_are_given_as_a_list_of_texts(folder):  # noqa: F811
    """A single text is a list of letters to Python, each of which would be ranked."""
    model = RankingModel.load(str(folder / "adapter"), CONFIG)
    expected = model.rank(HISTORY, TITLES)
    assert model.rank(np.array(HISTORY), pd.Series(TITLES, index=range(7, 7 + len(TITLES)))) == expected
    assert model.rank(iter(HISTORY), iter(TITLES), top=2)[0].title == expected[0].title
    typed = [f" {title.replace('e', '&#101;')}" for title in TITLES]  # as web pages and catalogues write them
    assert [s for _, s in model.rank(HISTORY, typed)] == [s for _, s in expected]
    assert [typed[TITLES.index(title)] for title, _ in expected[:2]] == [
        t for t, _ in model.rank(HISTORY, typed, top=2)
    ]
    bad = [
        (("Heat", TITLES), "history='Heat': is no list of titles; give history="),
        ((HISTORY, "Heat"), "candidates='Heat': is no list of titles"),
        ((HISTORY, None), "candidates=None: is no list"),
        ((["Heat", float("nan")], TITLES), r"history\[1\] is nan, which is no title"),
        ((HISTORY, ["Heat", " "]), r"candidates\[1\] is ' '"),
        ((HISTORY, [949]), r"candidates\[0\] is 949"),
    ]
    for arguments, words in bad:
        for ask in (model.rank, model.score):
            with pytest.raises(UserError, match=words):
                ask(*arguments)
    for top in (0, -1):
        with pytest.raises(UserError, match=f"top={top}: give the number of titles"):
            model.rank(HISTORY, TITLES, top)


def test_fields_of_the_user_are_given_and_hold_no_special_token(folder):  # noqa: F811
    template = TemplateConfig(preamble="Aged {age} they liked:\n")
    model = RankingModel.load(str(folder / "base"), CONFIG, template)
    young, old = (model.score(HISTORY, TITLES, user={"age": age}) for age in ("9", 99))
    assert (young != old).all()
    for user in (None, {"ages": "9"}):
        with pytest.raises(UserError, match=r"prompts show \{age\} of the user; give user="):
            model.score(HISTORY, TITLES, user=user)
    with pytest.raises(UserError, match="'9</s>' of an item or user contains the special token"):
        model.score(HISTORY, TITLES, user={"age": "9</s>"})


def test_a_tokenizer_that_renders_other_prompts_than_in_training_is_refused(folder, tmp_path):  # noqa: F811
    """What was rendered stands in the stamp; a stamp of earlier versions has none of it and loads."""
    shutil.copytree(folder / "base", tmp_path / "model")
    tokenizer = load_tokenizer(find_model(str(folder / "base")))
    rendered = make_template(TemplateConfig(), tokenizer).rendered()
    path = str(tmp_path / "model")
    for known in ({}, {"rendered": rendered}):
        write_stamp(tmp_path / "model", TemplateConfig(), stage="sft", **known)
        assert RankingModel.load(path, CONFIG).template.opening == "<s>"
    tokenizer.bos_token = "<pad>"
    tokenizer.save_pretrained(path)
    with pytest.raises(UserError, match="trained with '<s>' as the opening of its prompts, .*'<pad>' .* restore"):
        RankingModel.load(path, CONFIG)
    older = {"template": {"preamble": "Liked:\n"}, "stage": "sft", "max_length": 64}
    (tmp_path / "model" / "dmpo.json").write_text(json.dumps(older))
    assert RankingModel.load(path, CONFIG).template.preamble == "Liked:\n"
    assert RankingModel.load(path).encode.max_length == 64, "that of its training"
    assert RankingModel.load(str(folder / "other")).encode.max_length == 128, "its context"
