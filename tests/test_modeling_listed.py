"""Models whose prompts list the candidates: scores against separately written rows, and what is refused."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from dmpo_dist.commands.evaluate import preflight as evaluate_preflight
from dmpo_dist.commands.rank import Asked
from dmpo_dist.commands.rank import preflight as rank_preflight
from dmpo_dist.config import ModelConfig, RunConfig, ScratchModel, TemplateConfig
from dmpo_dist.data.candidates import list_order
from dmpo_dist.data.prepare import prepare
from dmpo_dist.data.requests import RankingRequest
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation import generated
from dmpo_dist.evaluation.order import order_spread
from dmpo_dist.evaluation.ranking import Ranker, load_ranking_model
from dmpo_dist.evaluation.rules import ruled_scores
from dmpo_dist.explanation.explainer import Explainer
from dmpo_dist.explanation.questions import Question
from dmpo_dist.modeling.backbone import (
    find_model,
    load_for_scoring,
    load_tokenizer,
    make_scratch_model,
    write_stamp,
)
from dmpo_dist.modeling.ranking_model import RankingModel
from dmpo_dist.records.log import make_console

TITLES = ("Heat", "Alien", "Alien 3", "The Thing", "The Fly", "Up")
HISTORY = ("Tron", "Solaris", "Brazil")
LISTING = TemplateConfig(request="From:\n{candidates}Next:\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("listed")
    scratch = ScratchModel(hidden_size=16, layers=2, heads=2, intermediate_size=24, vocab_size=300)
    make_scratch_model(folder / "base", scratch, list(TITLES), 256, 0)
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), lora).save_pretrained(folder / "adapter")
    write_stamp(folder / "adapter", LISTING, stage="train", start=str(folder / "base"))
    return folder


def config(**evaluation):
    return RunConfig.model_validate({"model": {"max_length": 256}, "seed": 3, "evaluation": evaluation})


def plain(folder, history, user, timestamp, draw):
    """(R,) log-probs of response and end, a row of its own for each title."""
    model = load_for_scoring(str(folder / "adapter"), ModelConfig(max_length=256))
    tokenizer = load_tokenizer(find_model(str(folder / "adapter")))
    listed = "".join(f"- {title}\n" for title in list_order(TITLES, 3, user, timestamp, draw))
    items = "".join(f"- {title}\n" for title in history)
    prompt = f"<s>A user liked these titles, oldest first:\n{items}From:\n{listed}Next:\n"
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    scores = []
    for title in TITLES:
        ids = tokenizer(prompt + title + "</s>", add_special_tokens=False)["input_ids"]
        assert ids[: len(before)] == before
        with torch.no_grad():
            log_probs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        scores.append(sum(log_probs[at - 1, ids[at]].item() for at in range(len(before), len(ids))))
    return np.array(scores)


def test_scores_are_those_of_rows_of_their_own_whatever_order_candidates_come_in(folder):
    model = RankingModel.load(str(folder / "adapter"), ModelConfig(max_length=256), seed=3)
    expected = plain(folder, HISTORY, "", 0, 0)
    np.testing.assert_allclose(model.score(HISTORY, TITLES), expected, rtol=1e-4)
    np.testing.assert_allclose(model.score(HISTORY, TITLES[::-1]), expected[::-1], rtol=1e-4)
    assert {one.title for one in model.rank(HISTORY, TITLES)} == set(TITLES)


def test_scores_are_averaged_over_orders(folder):
    expected = np.mean([plain(folder, HISTORY, "u", 0, draw) for draw in range(3)], axis=0)
    ranker = Ranker(str(folder / "adapter"), config(candidate_orders=3), None, 3)
    request = RankingRequest("u", HISTORY, TITLES)
    np.testing.assert_allclose(ranker.scores(request, np.array(TITLES, dtype=object)), expected, rtol=1e-4)
    assert not np.allclose(expected, plain(folder, HISTORY, "u", 0, 0), rtol=1e-4)


def test_a_prior_is_that_of_the_same_list_without_a_history(folder):
    """In the other rules too, every part is the mean over the same orders."""
    ranker = Ranker(str(folder / "adapter"), config(candidate_orders=2), None, 3)
    settings = config(candidate_orders=2)
    ranking = settings.ranking.model_copy(update={"prior_weight": 0.5})
    with_prior = Ranker(str(folder / "adapter"), settings.model_copy(update={"ranking": ranking}), None, 3)
    request, titles = RankingRequest("u", HISTORY, TITLES), np.array(TITLES, dtype=object)
    prior = np.mean([plain(folder, (), "u", 0, draw) for draw in range(2)], axis=0)
    expected = ranker.scores(request, titles) - 0.5 * prior
    np.testing.assert_allclose(with_prior.scores(request, titles), expected, rtol=1e-4)


def test_all_rules_by_lists(folder, data):
    settings = config(candidate_orders=2, token_budget=512, rules=["sum", "mean", "prior", "reference"])
    model = load_ranking_model(str(folder / "adapter"), settings)
    few = dataclasses.replace(data, test=data.test.select(range(4)), validation=data.validation.select(range(3)))
    scores = model.score_rows(few.test)
    ruled = ruled_scores(model, scores, few, settings)
    weight = ruled.choice.prior_weight
    base = model.reference(str(folder / "base"))
    emptied = few.test.map(lambda row: row | {"history": [], "history_items": []})
    for index, (prior, reference) in enumerate(zip(model.score_rows(emptied), base.score_rows(few.test), strict=True)):
        found = {rule: by_rule[index] for rule, by_rule in ruled.by_rule.items()}
        np.testing.assert_allclose(found["sum"], scores[index])
        np.testing.assert_allclose(found["prior"], scores[index] - weight * prior, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found["reference"], scores[index] - reference, rtol=1e-4, atol=1e-4)


def test_an_explanation_lists_all_candidates_for_every_history(folder):
    settings = config(candidate_orders=2)
    explainer = Explainer(str(folder / "adapter"), settings, str(folder / "base"), None, "log_prob", 0)
    asked = Question("u", HISTORY, HISTORY, TITLES, TITLES, 4, timestamp=9)
    explainer.load([asked])
    subject = explainer.subject(asked)
    answer = explainer.answer(subject, explainer.words([subject])[0], top=2, budget=10)

    def mean(history):
        return np.mean([plain(folder, history, "u", 9, draw) for draw in range(2)], axis=0)

    without = [HISTORY[:i] + HISTORY[i + 1 :] for i in range(3)]
    expected = [mean(HISTORY)[4] - mean(history)[4] for history in without]
    np.testing.assert_allclose(answer.contributions, expected, rtol=1e-3, atol=1e-4)
    assert "".join(answer.words.pieces).startswith(TITLES[4])


def test_hits_by_generation_are_texts_equal_to_the_positive(folder, data, monkeypatch):
    """With a model that writes the first title of every list."""
    model = RankingModel.load(str(folder / "adapter"), ModelConfig(max_length=256), seed=3)
    rows, scores = data.test, [np.arange(6.0) for _ in range(len(data.test))]
    firsts = [list_order((r["positive"], *r["negatives"]), 3, r["user"], r["timestamp"], 0)[0] for r in rows]
    seen = []

    def write(causal_lm, tokenizer, template, prompts, tokens):
        seen.extend(prompts)
        assert tokens > max(len(tokenizer(f"{title}</s>", add_special_tokens=False)["input_ids"]) for title in firsts)
        texts = [prompt.split("From:\n- ")[1].split("\n")[0] for prompt in prompts]
        return [*texts[:-1], "No such title"]

    monkeypatch.setattr(generated, "generate_freely", write)
    figures = generated.generated_figures(model, rows, scores, len(rows), 0)
    hits = [first == positive for first, positive in zip(firsts, rows["positive"], strict=True)]
    assert figures.hr == pytest.approx(sum(hits[:-1]) / len(rows))
    assert figures.valid == pytest.approx(1 - 1 / len(rows))
    assert figures.by_log_prob == 0
    monkeypatch.undo()
    free = generated.generated_figures(model, rows, scores, 3, 0)
    assert 0 <= free.hr <= free.valid <= 1


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    source = {"simulator": {"users": 40, "items": 40, "events_per_user": 12}}
    settings = {"source": source, "negatives_per_group": 5, "evaluation_negatives": 5, "max_history": 3}
    run = RunConfig.model_validate({"data": settings})
    return prepare(run.data, 0, tmp_path_factory.mktemp("data") / "data", echo=lambda _: None)


def test_candidates_in_another_order_make_the_same_prompt(folder, data):
    model = RankingModel.load(str(folder / "adapter"), ModelConfig(max_length=256), token_budget=512)
    rows = data.test.select(range(6))
    spread = order_spread(model.score_rows, rows, model.score_rows(rows), 6, 0)
    assert spread["candidates"]["max_difference"] < 1e-4


def test_a_whole_catalogue_and_finished_prompts_are_refused(folder, data, tmp_path):
    requests = tmp_path / "requests.parquet"
    pd.DataFrame({"user": ["u"], "history": [list(HISTORY)]}).to_parquet(requests)
    adapter, settings = str(folder / "adapter"), config()
    with pytest.raises(UserError, match="a whole catalogue has no room: give each user of .* a column 'candidates'"):
        rank_preflight(adapter, Asked(requests, None, data.path), 3, tmp_path / "out.parquet", settings)
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"path": data.path})})
    with pytest.raises(UserError, match="a whole catalogue has no room: leave --catalogue out"):
        evaluate_preflight({"dmpo": adapter}, settings, make_console(), catalogue=True)
    short = settings.model_copy(update={"model": ModelConfig(max_length=40)})
    with pytest.raises(UserError, match=r"lists 6 candidates, and its longest response take \d+ tokens, more than"):
        evaluate_preflight({"dmpo": adapter}, short, make_console())
    pd.DataFrame({"user": ["u"], "history": [list(HISTORY)], "candidates": [list(TITLES)]}).to_parquet(requests)
    with pytest.raises(UserError, match=r"user 'u': .* lists 6 candidates, and its longest response take \d+ tokens"):
        rank_preflight(adapter, Asked(requests, None, None, keep_unknown=True), 3, tmp_path / "out.parquet", short)
    with pytest.raises(UserError, match=r"3 titles or ids of histories are not in the catalogue: 'Tron'"):
        rank_preflight(adapter, Asked(requests, None, None), 3, tmp_path / "out.parquet", settings)  # of data.path
    rows = tmp_path / "rows.jsonl"
    lines = [f'{{"prompt": "p{n}", "chosen": "c", "rejected": "r"}}\n' for n in range(80)]
    rows.write_text("".join(lines))
    source = RunConfig.model_validate({"data": {"source": {"kind": "preferences", "path": str(rows)}}}).data
    prepare(source, 0, tmp_path / "trl", echo=lambda _: None)
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"path": tmp_path / "trl"})})
    with pytest.raises(UserError, match="trl holds finished prompts, to which no list can be added"):
        evaluate_preflight({"dmpo": adapter}, settings, make_console())
