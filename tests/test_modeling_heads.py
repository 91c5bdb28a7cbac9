"""Heads that scale, soft-cap, have a bias or tie their weights, against each family's own logits."""

from dataclasses import replace

import pytest
import torch
from conftest import random_groups
from oracle import assert_equal_to_oracle, oracle
from peft import LoraConfig, get_peft_model

from dmpo_dist.batching.layout import prefix_layout
from dmpo_dist.errors import UserError
from dmpo_dist.modeling import logprobs
from dmpo_dist.modeling.heads import LogitTransform
from dmpo_dist.modeling.logprobs import LogProbHead, LogProbModel

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": 97, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
MLA = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}

FAMILIES = [
    ("llama", {"tie_word_embeddings": True}, LogitTransform(), "two_part"),
    ("gpt2", GPT, LogitTransform(), "two_part"),
    ("phi", {}, LogitTransform(), "two_part"),
    ("gptj", {**GPT, "rotary_dim": 4, "n_positions": 128}, LogitTransform(), "unshared"),
    ("gemma2", {"head_dim": 8, "final_logit_softcapping": 3.0}, LogitTransform(1.0, 3.0), "unshared"),
    ("gemma3_text", {"head_dim": 8, "final_logit_softcapping": 3.0}, LogitTransform(1.0, 3.0), "two_part"),
    ("recurrent_gemma", {"logits_soft_cap": 3.0, "lru_width": 32}, LogitTransform(1.0, 3.0), "unshared"),
    ("cohere", {"logit_scale": 0.25}, LogitTransform(0.25), "two_part"),
    ("cohere2", {"logit_scale": 0.25}, LogitTransform(0.25), "two_part"),
    ("granite", {"logits_scaling": 4.0}, LogitTransform(0.25), "two_part"),
    ("minicpm3", {"dim_model_base": 8, **MLA}, LogitTransform(0.25), "sdpa"),
    ("hyperclovax", {"logits_scaling": 4.0}, LogitTransform(4.0), "two_part"),
    ("falcon_h1", {"lm_head_multiplier": 0.25, "head_dim": 8, **MAMBA}, LogitTransform(0.25), "unshared"),
]
WITH_BIAS = {"phi", "gptj"}


def family(name, **options):
    """A random model of a family by its name in transformers."""
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **SMALL | options)
    for key, value in vars(config).items():
        if "dropout" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


@pytest.mark.parametrize("chunk", [2**24, 3 * 97], ids=["whole", "chunks"])
@pytest.mark.parametrize(("name", "options", "transform", "backend"), FAMILIES, ids=[f[0] for f in FAMILIES])
def test_each_family_keeps_its_own_logits(monkeypatch, name, options, transform, backend, chunk):
    monkeypatch.setitem(logprobs.MAX_CHUNK_LOGITS, "cpu", chunk)
    model = family(name, **options)
    head = LogProbModel(model).head
    assert head.transform == transform
    assert (head.bias is not None) == (name in WITH_BIAS)
    assert_equal_to_oracle(model, random_groups(2, seed=3, prompt=8), backend, 1e-5, 1e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("roberta", {"is_decoder": True}),  # a dense layer and a norm before the head
        ("modernbert-decoder", {"cls_token_id": 1, "sep_token_id": 2}),
        ("llama", {"logits_scaling": 4.0}),  # says what it does not do
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "logit_scale": 3.0}),
    ],
)
def test_a_head_that_does_otherwise_is_refused_by_name(name, options):
    with pytest.raises(UserError, match=f"^{name}: its logits differ"):
        LogProbModel(family(name, **options))


def test_an_adapter_on_the_head_is_refused():
    """Its weight alone would be used, without the adapter."""
    model = get_peft_model(family("llama"), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(UserError, match="model.lora.target_modules"):
        LogProbModel(model)


def test_the_oracle_sees_the_transform():
    """What the tests above rest on: a scale moves the oracle's log-probs."""
    groups = random_groups(2, seed=3, prompt=8)
    plain, scaled = (oracle(family("granite", logits_scaling=scale), groups) for scale in (1.0, 4.0))
    assert (plain - scaled).abs().min() > 0.01


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.5, 4.0)], ids=["plain", "scaled, capped"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_keep_their_logits_wide(monkeypatch, dtype, transform):
    """Against fp64 arithmetic on the same rounded numbers: log-probs lose nothing to the type of the operands, and
    gradients only what their own type cannot hold."""
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(32, 500, dtype=dtype)
    head.weight.data = (3 * torch.randn(500, 32, generator=generator)).to(dtype)
    head.bias.data = torch.randn(500, generator=generator).to(dtype)
    hidden = torch.randn(12, 32, generator=generator).to(dtype).requires_grad_()
    layout = prefix_layout(random_groups(1, seed=1, vocab=500))
    layout = replace(layout.targets, predict_index=layout.targets.predict_index % 12)
    monkeypatch.setitem(logprobs.MAX_CHUNK_LOGITS, "cpu", 4 * 500)
    seen = LogProbHead(head, transform)(hidden, layout)
    gradients = torch.autograd.grad(seen.sum(), [hidden, head.weight, head.bias])
    wide, weight, bias = (t.detach().double().requires_grad_() for t in (hidden, head.weight, head.bias))
    logits = transform.logits(wide[layout.predict_index], weight, bias)
    expected = layout.summed(logits.log_softmax(-1)[layout.target_row, layout.target_ids])
    assert seen.dtype == torch.float32
    torch.testing.assert_close(seen.double(), expected, rtol=1e-6, atol=1e-5)
    for gradient, of_wide in zip(gradients, torch.autograd.grad(expected.sum(), [wide, weight, bias]), strict=True):
        # rows that several positions predict are added up in their own type
        torch.testing.assert_close(gradient.double(), of_wide, rtol=torch.finfo(dtype).eps, atol=1e-3)
