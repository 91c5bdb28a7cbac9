"""Free generation against a plain loop over arg-maxima."""

import json

import pytest
import torch

from dmpo_dist.config import ModelConfig, ScratchModel, TemplateConfig
from dmpo_dist.data.template import make_template
from dmpo_dist.evaluation.generation import generate_freely, valid_ratio
from dmpo_dist.modeling.backbone import find_model, load_for_scoring, load_tokenizer, make_scratch_model


@pytest.mark.parametrize("terminator", ["{eos}", "\n"])
def test_free_generation_is_greedy_whatever_the_folder_asks_for(tmp_path, terminator):
    scratch = ScratchModel(hidden_size=16, layers=1, heads=2, intermediate_size=24, vocab_size=290)
    make_scratch_model(tmp_path, scratch, ["Heat", "Alien", "The Thing"], 128, 0)
    asks = {"do_sample": True, "temperature": 50.0, "num_beams": 3, "repetition_penalty": 9.0, "min_new_tokens": 11,
            "suppress_tokens": list(range(100, 280)), "num_return_sequences": 2}  # fmt: skip
    (tmp_path / "generation_config.json").write_text(json.dumps(asks))
    tokenizer = load_tokenizer(find_model(str(tmp_path)))
    template = make_template(TemplateConfig(terminator=terminator), tokenizer)
    model = load_for_scoring(str(tmp_path), ModelConfig(max_length=128))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0)  # away from ties
    own = model.generation_config
    prompts = [template.render(history).text for history in (("Heat",), ("The Thing", "Alien"), ())]
    expected = [greedy(model, tokenizer, template, prompt, 9) for prompt in prompts]
    assert generate_freely(model, tokenizer, template, prompts, 9, batch_size=2) == expected
    assert len(set(expected)) > 1
    assert model.generation_config is own
    assert own.do_sample, "the folder's wish was read, and put aside"


@torch.no_grad()
def greedy(model, tokenizer, template, prompt, count):
    """One token at a time, without a cache."""
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = list(start)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        text = tokenizer.decode(ids)[len(tokenizer.decode(start)) :]
        if template.terminator in text:
            break
    return text.split(template.terminator)[0]


def test_valid_is_letter_by_letter():
    tokenizer = type("Tokenizer", (), {"eos_token": "</s>", "bos_token": "<s>", "chat_template": None})()
    template = make_template(TemplateConfig(response="Next: {title}"), tokenizer)
    generated = ["Next: Heat", "Next: Heat ", "Next: heat", "Heat", "Next: Up"]
    responses = [template.render_response(title) for title in ("Heat", "Up")]
    assert valid_ratio(generated, responses, template.terminator) == 0.4
    assert valid_ratio(["Next: Heat"], [template.complete("Heat</s>", templated=False)], template.terminator) == 1
