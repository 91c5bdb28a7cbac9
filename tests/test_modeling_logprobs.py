"""The fused forward against an oracle that shares no code with it: one full row per response through plain logits."""

import copy

import pytest
import torch
from conftest import random_groups, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from dmpo_dist.batching.layout import prefix_layout, rows_layout
from dmpo_dist.errors import UserError
from dmpo_dist.modeling import logprobs
from dmpo_dist.modeling.attention import DENSE, TWO_PART, register
from dmpo_dist.modeling.logprobs import LogProbModel, unwrap_peft
from dmpo_dist.modeling.routing import choose_backend, native_attention

register()
IMPLEMENTATION = {"two_part": TWO_PART, "sdpa": DENSE}


def oracle(model, groups):
    """Log-probs of every response, each by its own unpadded row and a log-softmax over all logits."""
    unwrap_peft(model).set_attn_implementation(native_attention(unwrap_peft(model)))
    out = []
    for group in groups:
        for branch, start in zip(group.branches, group.scored_from, strict=True):
            row = torch.tensor([group.prefix + list(branch)])
            log_probs = model(input_ids=row, use_cache=False).logits[0].log_softmax(-1)
            first = len(group.prefix) + start
            out.append(log_probs[torch.arange(first - 1, row.shape[1] - 1), row[0, first:]].sum())
    return torch.stack(out)


def fused(model, groups, backend):
    wrapped = LogProbModel(model)
    language_model = unwrap_peft(model)
    if backend == "unshared":
        language_model.set_attn_implementation(native_attention(language_model))
        return wrapped(rows_layout(groups))
    language_model.set_attn_implementation(IMPLEMENTATION[backend])
    return wrapped(prefix_layout(groups))


def gradients(model, log_probs):
    model.zero_grad(set_to_none=True)
    (log_probs * torch.linspace(-1, 1, len(log_probs), dtype=log_probs.dtype)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_to_oracle(model, groups, backend, log_prob_error, gradient_error):
    expected = oracle(model, groups)
    expected_gradients = gradients(model, expected)
    seen = fused(model, groups, backend)
    seen_gradients = gradients(model, seen)
    assert ((seen - expected).norm() / expected.norm()).item() < log_prob_error
    assert seen_gradients.keys() == expected_gradients.keys()
    total = torch.stack([g.norm() for g in expected_gradients.values()]).norm()
    for name, gradient in expected_gradients.items():
        error = (seen_gradients[name] - gradient).norm() / max(gradient.norm(), 1e-3 * total)
        assert error.item() < gradient_error, name


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
    monkeypatch.setattr(logprobs, "MAX_CHUNK_LOGITS", 3 * 97)
    model = tiny_model("gemma3", tie_word_embeddings=tied, **extra)
    assert_equal_to_oracle(model, groups, "two_part", 1e-6, 1e-5)


def test_granite_style_logit_scale(groups):
    """A head without soft-capping but with a bias and a logit scale, on GPT-2."""
    model = tiny_model("llama")
    model.config.logits_scaling = 4.0
    expected = fused(model, groups, "unshared")
    assert torch.allclose(fused(model, groups, "two_part"), expected, rtol=1e-5)
    assert (expected > fused(tiny_model("llama"), groups, "unshared")).float().mean() > 0.5  # flatter


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
    unwrap_peft(peft).set_attn_implementation(TWO_PART)
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


ROUTES = [
    ("llama", {}, "cpu", "two_part"),
    ("llama", {}, "cuda", "sdpa"),
    ("mistral", {"window": 16}, "cpu", "sdpa"),
    ("mistral", {"window": 512}, "cpu", "two_part"),
    ("gemma3", {"window": 16}, "cpu", "sdpa"),
    ("gemma2", {}, "cpu", "unshared"),
    ("gpt_oss", {}, "cpu", "unshared"),
    ("mamba2", {}, "cpu", "unshared"),
    ("llama", {"attention_dropout": 0.1}, "cpu", "unshared"),
]


@pytest.mark.parametrize(("kind", "options", "device", "backend"), ROUTES)
def test_routing(kind, options, device, backend):
    assert choose_backend(tiny_model(kind, **options), device, 256).backend == backend


@pytest.mark.parametrize(("kind", "asked"), [("gemma2", "two_part"), ("mamba2", "sdpa"), ("gpt_oss", "two_part")])
def test_a_wrong_backend_is_refused(kind, asked):
    with pytest.raises(UserError, match="would be wrong for this model"):
        choose_backend(tiny_model(kind), "cpu", 256, asked)


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
def test_unshared_models_match_the_oracle(kind, groups):
    model = tiny_model(kind)
    assert torch.allclose(fused(model, groups, "unshared"), oracle(model, groups), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("backend", ["sdpa", "unshared"])
def test_gpu_parity(kind, backend, groups):
    """fp32 on the GPU against the oracle on the CPU."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = tiny_model(kind)
    expected = oracle(model, groups)
    model.cuda()
    language_model = unwrap_peft(model)
    name = native_attention(language_model) if backend == "unshared" else IMPLEMENTATION[backend]
    language_model.set_attn_implementation(name)
    layout = rows_layout(groups) if backend == "unshared" else prefix_layout(groups)
    seen = LogProbModel(model)(layout.to("cuda")).cpu()
    assert ((seen - expected).norm() / expected.norm()).item() < 1e-5
