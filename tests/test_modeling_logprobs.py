"""The fused forward against an oracle that shares no code with it: one full row per response through plain logits."""

import copy

import pytest
import torch
from conftest import random_groups, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_equal_to_oracle, fused
from peft import LoraConfig, get_peft_model

from dmpo_dist.batching.layout import prefix_layout
from dmpo_dist.modeling import logprobs
from dmpo_dist.modeling.logprobs import LogProbModel, unwrap_peft
from dmpo_dist.modeling.routing import use_backend


@pytest.mark.parametrize("backend", ["two_part", "sdpa", "unshared"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma3", "gpt2"])
def test_fp32_parity(kind, backend, groups):
    assert_equal_to_oracle(tiny_model(kind), groups, backend, 1e-6, 1e-5)


def test_fp64_parity_is_exact_to_rounding(groups):
    """On GPT-2, the one of these whose norms do not fall back to fp32 inside."""
    assert_equal_to_oracle(tiny_model("gpt2").double(), groups, "two_part", 1e-13, 1e-11)


@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
@pytest.mark.parametrize("backend", ["sdpa", "unshared"])
def test_short_sliding_window(kind, backend, groups):
    """A window shorter than the prompt is counted by position in each layer that has one."""
    assert_equal_to_oracle(tiny_model(kind, window=5), groups, backend, 1e-6, 1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("backend", ["two_part", "sdpa"])
def test_lora_with_gradient_checkpointing(kind, backend, groups):
    model = get_peft_model(tiny_model(kind), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert_equal_to_oracle(model, groups, backend, 1e-6, 1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("extra", [{}, {"final_logit_softcapping": 5.0}])
def test_chunked_head(monkeypatch, groups, tied, extra):
    """Many chunks of 3 rows, with soft-capping and tied weights, against the oracle's one log-softmax."""
    monkeypatch.setitem(logprobs.MAX_CHUNK_LOGITS, "cpu", 3 * 97)
    model = tiny_model("gemma3", tie_word_embeddings=tied, **extra)
    assert_equal_to_oracle(model, groups, "two_part", 1e-6, 1e-5)


@given(seed=st.integers(0, 10_000), count=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_packing_changes_nothing(seed, count):
    """A group's log-probs do not depend on what shares its row, nor on the order of groups."""
    model = tiny_model("llama").double()
    groups = random_groups(count, seed=seed)
    together = fused(model, groups, "two_part")
    alone = torch.cat([fused(model, [group], "two_part") for group in groups])
    torch.testing.assert_close(together, alone, rtol=1e-11, atol=1e-11)
    backwards = fused(model, groups[::-1], "two_part").split([len(g.branches) for g in groups[::-1]])
    torch.testing.assert_close(together, torch.cat(backwards[::-1]), rtol=1e-11, atol=1e-11)


def test_adapter_off_and_adapter_copy_are_references(groups):
    base = tiny_model("llama")
    expected = fused(copy.deepcopy(base), groups, "two_part")
    peft = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    trainable = {name for name, p in peft.named_parameters() if p.requires_grad}
    layout = prefix_layout(groups)
    use_backend(unwrap_peft(peft), "two_part")
    model = LogProbModel(peft, "adapter_off")
    assert torch.equal(model(layout, "reference"), expected)
    assert not torch.allclose(model(layout), expected)
    start = model(layout).detach()
    peft.add_adapter("reference", LoraConfig(r=4, target_modules="all-linear"))
    state = {n: p for n, p in peft.named_parameters() if ".default." in n}
    for name, parameter in peft.named_parameters():
        if ".reference." in name:
            parameter.data.copy_(state[name.replace(".reference.", ".default.")])
            parameter.requires_grad_(False)
    model = LogProbModel(peft, "adapter_copy")
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if ".default." in name:
                parameter.add_(0.1)
    assert torch.equal(model(layout, "reference"), start)
    assert {name for name, p in peft.named_parameters() if p.requires_grad} == trainable
