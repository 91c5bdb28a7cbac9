"""The public log-prob function against one plain forward pass per response, values and gradients in float64."""

from itertools import chain

import pytest
import torch
from conftest import tiny_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, NemotronConfig

from dmpo_dist.config import ScratchModel
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.backbone import make_scratch_model
from dmpo_dist.modeling.shared_prompt import shared_prompt_log_probs

PROMPTS = ["Liked: Alien, Blade Runner\nNext: ", "Liked: Cars\nNext: "]
RESPONSES = [["Dune", "Dune Part Two", "Up"], ["Ratatouille"]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scratch")
    make_scratch_model(
        folder, ScratchModel(hidden_size=16, vocab_size=300), [*PROMPTS, *chain(*RESPONSES)], 128, seed=0
    )
    return AutoTokenizer.from_pretrained(folder)


def one_by_one(model, tokenizer, prompt, response):
    """The response's log-prob by a forward pass over its own row, in transformers alone."""
    text = tokenizer.bos_token + prompt
    before = tokenizer(text, add_special_tokens=False).input_ids
    ids = torch.tensor([tokenizer(text + response + tokenizer.eos_token, add_special_tokens=False).input_ids])
    log_probs = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    return log_probs[len(before) - 1 :].sum()


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gemma2"])
@pytest.mark.parametrize("adapter", [False, True])
def test_values_and_gradients_are_those_of_separate_rows(kind, adapter, tokenizer):
    model = tiny_model(kind, vocab=len(tokenizer), attn_implementation="eager").double().eval()
    if adapter:
        model = get_peft_model(
            model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        ).double()
    expected = [[one_by_one(model, tokenizer, p, r) for r in rs] for p, rs in zip(PROMPTS, RESPONSES, strict=True)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = torch.autograd.grad(torch.stack(list(chain(*expected))) @ weights, trained, allow_unused=True)

    found = shared_prompt_log_probs(model, tokenizer, PROMPTS, RESPONSES)
    assert [len(part) for part in found] == [3, 1]
    torch.testing.assert_close(torch.cat(found), torch.stack(list(chain(*expected))))
    gradients = torch.autograd.grad(torch.cat(found) @ weights, trained, allow_unused=True)
    for gradient, want in zip(gradients, wanted, strict=True):
        if want is not None:
            torch.testing.assert_close(gradient, want, atol=1e-5, rtol=1e-4)  # transformers rotates in fp32


def test_a_begin_token_is_never_doubled_and_the_end_can_be_chosen(tokenizer):
    model = tiny_model("llama", vocab=len(tokenizer)).double().eval()
    given = [tokenizer.bos_token + prompt for prompt in PROMPTS]
    with torch.no_grad():
        plain = shared_prompt_log_probs(model, tokenizer, PROMPTS, RESPONSES)
        begun = shared_prompt_log_probs(model, tokenizer, given, RESPONSES)
        lines = shared_prompt_log_probs(model, tokenizer, PROMPTS, RESPONSES, end="\n")
        ended = [[r + "\n" for r in rs] for rs in RESPONSES]
        longer = shared_prompt_log_probs(model, tokenizer, PROMPTS, ended)
    assert all(torch.equal(a, b) for a, b in zip(plain, begun, strict=True))
    assert all((a > b).all() for a, b in zip(lines, longer, strict=True))  # the same tokens, then an end token


@torch.no_grad()
def test_layers_that_drop_the_layout_are_noticed(tokenizer):
    """There is no self-check here: each response would be scored without its prompt, and be off by nats."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 48, "head_dim": 8}  # fmt: skip
    model = AutoModelForCausalLM.from_config(NemotronConfig(vocab_size=len(tokenizer), **shape)).eval()
    for attention in ("auto", "sdpa"):
        with pytest.raises(UserError, match="layers drop the layout .*unshared"):
            shared_prompt_log_probs(model, tokenizer, PROMPTS, RESPONSES, attention=attention)
    seen = shared_prompt_log_probs(model, tokenizer, PROMPTS, RESPONSES, attention="unshared")
    expected = [one_by_one(model, tokenizer, p, r) for p, rs in zip(PROMPTS, RESPONSES, strict=True) for r in rs]
    torch.testing.assert_close(torch.cat(seen), torch.stack(expected))


def test_an_adapter_that_works_around_the_model_is_refused(tokenizer):
    """Log-probs go past the forward pass of PEFT, which puts its tokens before the prompt: they were the base's."""
    model = get_peft_model(
        tiny_model("llama", vocab=len(tokenizer)), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    with pytest.raises(UserError, match=r"type PROMPT_TUNING .* such as LoRA"):
        shared_prompt_log_probs(model, tokenizer, PROMPTS, RESPONSES)


def test_what_cannot_be_scored_is_refused(tokenizer):
    model = tiny_model("llama", vocab=len(tokenizer))
    with pytest.raises(ValueError, match="2 prompts and 1 lists"):
        shared_prompt_log_probs(model, tokenizer, PROMPTS, RESPONSES[:1])
    with pytest.raises(ValueError, match="non-empty"):
        shared_prompt_log_probs(model, tokenizer, PROMPTS, [["Dune"], []])
    for prompts, responses in ((PROMPTS, ["Dune", "Up"]), ("No", RESPONSES)):
        with pytest.raises(ValueError, match="give prompts as a list, and for each of them a list"):
            shared_prompt_log_probs(model, tokenizer, prompts, responses)
    with pytest.raises(UserError, match="256"):
        shared_prompt_log_probs(model, tokenizer, ["so long " * 200], [["Dune"]])
