"""The attention backends against a dense mask and against separate rows.

The CUDA kernels themselves need a GPU (tests/gpu). What surrounds them, packing, offsets, merging and the gradients
of grouped heads, runs here: the two aten operators are replaced by the plain arithmetic that they document.
"""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import random_groups, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_equal_to_oracle, fused, gradients, oracle, relative_error
from peft import LoraConfig, get_peft_model
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounter

from dmpo_dist.batching.layout import prefix_layout, rows_layout
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.modeling import attention, flash
from dmpo_dist.modeling.attention import dense_attention, flex_layout_attention, two_part_attention
from dmpo_dist.modeling.flash import CpuFlash, CudaFlash, PlainAttention, varlen_forward
from dmpo_dist.modeling.logprobs import LogProbModel


class PlainVarlen:
    """aten's variable-length flash forward and backward on CUDA, by their schemas, in plain arithmetic."""

    def __init__(self):
        self.calls = {"forward": 0, "backward": 0}

    def forward(self, *args, **kwargs):
        self.calls["forward"] += 1
        at = self._bound(torch.ops.aten._flash_attention_forward.default, args, kwargs)
        assert at["return_debug_mask"] is False
        q, v = at["query"], at["value"]
        out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])
        for queries, keys, scores in self._runs(at):
            lse[:, queries] = scores.logsumexp(-1)
            out[queries] = (scores.softmax(-1) @ self._grouped(q, v)[keys].transpose(0, 1)).transpose(0, 1)
        return out, lse, torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)

    def backward(self, *args, **kwargs):
        self.calls["backward"] += 1
        at = self._bound(torch.ops.aten._flash_attention_backward.default, args, kwargs)
        q, k, v, out, lse, d_out = (at[n] for n in ("query", "key", "value", "out", "logsumexp", "grad_out"))
        assert d_out.shape == out.shape == q.shape
        assert lse.shape == (q.shape[1], q.shape[0])
        assert lse.is_contiguous(), "the kernel takes its strides for granted"
        assert at["rng_state"].dtype == torch.uint64
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for queries, keys, scores in self._runs(at):
            p = (scores - lse[:, queries, None]).exp()  # (H, q, k)
            do = d_out[queries].transpose(0, 1)
            dp = do @ self._grouped(q, v)[keys].permute(1, 2, 0)
            ds = p * (dp - (do * out[queries].transpose(0, 1)).sum(-1, keepdim=True)) * at["scale"]
            dq[queries] = (ds @ self._grouped(q, k)[keys].transpose(0, 1)).transpose(0, 1)
            shape = (k.shape[1], q.shape[1] // k.shape[1], -1, k.shape[2])  # (H_kv, heads of the group, k, D)
            dk[keys] += (ds.transpose(1, 2) @ q[queries].transpose(0, 1)).view(shape).sum(1).transpose(0, 1)
            dv[keys] += (p.transpose(1, 2) @ do).view(shape).sum(1).transpose(0, 1)
        return dq, dk, dv

    @staticmethod
    def _bound(operator, args, kwargs):
        names = [argument.name for argument in operator._schema.arguments if not argument.kwarg_only]
        assert len(args) == len(names)
        at = dict(zip(names, args, strict=True)) | kwargs
        for name, longest in (("cum_seq_q", "max_q"), ("cum_seq_k", "max_k")):
            offsets = at[name]
            assert offsets.dtype == torch.int32
            assert offsets.is_contiguous()
            assert at[longest] >= offsets.diff().max()
        assert at["max_q"] > 1, "the kernel would fold heads for decoding, which fails on empty runs"
        assert at["cum_seq_q"].shape == at["cum_seq_k"].shape
        assert at["cum_seq_q"][-1] == at["query"].shape[0]
        assert at["cum_seq_k"][-1] == at["key"].shape[0]
        assert all(at[name].stride(-1) == 1 for name in ("query", "key", "value"))
        assert at["dropout_p"] == 0.0
        return at

    def _runs(self, at):
        q, k = at["query"], self._grouped(at["query"], at["key"])
        offsets = zip(*(at[name].tolist() for name in ("cum_seq_q", "cum_seq_k")), strict=True)
        for (q0, k0), (q1, k1) in pairwise(offsets):
            queries, keys = slice(q0, q1), slice(k0, k1)
            scores = q[queries].transpose(0, 1) @ k[keys].permute(1, 2, 0) * at["scale"]
            if at["is_causal"]:
                assert q1 - q0 == k1 - k0
                scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
            yield queries, keys, scores

    @staticmethod
    def _grouped(q, x):
        return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


@pytest.fixture
def cuda_on_cpu(monkeypatch):
    plain = PlainVarlen()
    monkeypatch.setattr(flash, "_cuda_forward", plain.forward)
    monkeypatch.setattr(flash, "_cuda_backward", plain.backward)
    monkeypatch.setattr(attention, "flash_for", lambda query: CudaFlash)
    return plain


def attend(function, layout, dtype=torch.float64, **options):
    """Output and gradients of an attention function, 4 query heads on 2 of keys, laid out as projections leave them."""
    torch.manual_seed(0)
    tensors = [torch.randn(1, layout.physical_tokens, heads, 8, dtype=dtype, requires_grad=True) for heads in (4, 2, 2)]
    out, _ = function(torch.nn.Module(), *(x.transpose(1, 2) for x in tensors), None, layout=layout, **options)
    (out * torch.randn_like(out)).sum().backward()
    return [out.detach(), *(x.grad for x in tensors)]


ONE_TOKEN = TokenGroup([5, 6, 7], ([8], [9]), (0, 0))
EDGES = {
    "no branch has a token": [ONE_TOKEN],
    "a group without branch tokens between others": [*random_groups(1, seed=1), ONE_TOKEN, *random_groups(2, seed=2)],
    "runs of one token": [TokenGroup([5, 6], ([7, 8], [9]), (0, 0)), ONE_TOKEN],
    "segments of one token": [TokenGroup([5], ([7, 8], [9]), (0, 0))],
}


@pytest.mark.parametrize("groups", EDGES.values(), ids=EDGES)
@pytest.mark.parametrize("kernels", [CpuFlash, CudaFlash, PlainAttention])
def test_two_parts_are_one_softmax_at_the_edges(cuda_on_cpu, monkeypatch, kernels, groups):
    monkeypatch.setattr(attention, "flash_for", lambda query: kernels)
    layout = prefix_layout(groups)
    for seen, expected in zip(attend(two_part_attention, layout), attend(dense_attention, layout), strict=True):
        torch.testing.assert_close(seen, expected, rtol=1e-12, atol=1e-12)


@given(seed=st.integers(0, 10_000), count=st.integers(1, 5), scale=st.sampled_from([None, 0.3, 4.0]))
@settings(max_examples=40, deadline=None)
def test_two_parts_are_one_softmax(seed, count, scale):
    """Output and gradients of q, k and v in fp64, by the CPU kernels, around the CUDA ones, and by plain products."""
    layout = prefix_layout(random_groups(count, seed=seed))
    expected = attend(dense_attention, layout, scaling=scale)
    plain = PlainVarlen()
    for kernels in (CpuFlash, CudaFlash, PlainAttention):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flash, "_cuda_forward", plain.forward)
            patch.setattr(flash, "_cuda_backward", plain.backward)
            patch.setattr(attention, "flash_for", lambda query, kernels=kernels: kernels)
            for seen, right in zip(attend(two_part_attention, layout, scaling=scale), expected, strict=True):
                torch.testing.assert_close(seen, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_models_around_the_cuda_kernels(cuda_on_cpu, kind, groups):
    """Log-probs and gradients of whole models with adapters and recomputed activations; two calls a layer and pass."""
    model = get_peft_model(tiny_model(kind), LoraConfig(r=4, target_modules="all-linear"))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal_to_oracle(model.train(), groups, "two_part", 1e-6, 1e-5)
    assert cuda_on_cpu.calls == {"forward": 8, "backward": 4}  # 2 layers, forward and recompute


@pytest.mark.parametrize(
    ("cuda", "dtype", "kernels"),
    [
        (True, torch.bfloat16, CudaFlash),
        (True, torch.float16, CudaFlash),
        (True, torch.float32, PlainAttention),  # as a model checked in fp32 asks for
        (False, torch.bfloat16, CpuFlash),
    ],
)
def test_every_type_has_kernels_on_every_device(cuda, dtype, kernels):
    assert attention.flash_for(SimpleNamespace(is_cuda=cuda, dtype=dtype)) is kernels


def test_the_cuda_operators_give_the_shapes_we_take():
    """By torch's own shape functions: out as q, lse (heads, tokens)."""
    q, k = torch.empty(1, 4, 10, 8, device="meta"), torch.empty(1, 2, 10, 8, device="meta")
    offsets = torch.zeros(3, dtype=torch.int32, device="meta")
    out, lse = varlen_forward(q, k, k, offsets, offsets, 6, 6, True, 1.0)
    assert out.shape == q.shape
    assert lse.shape == (1, 4, 10)
    assert lse.dtype == torch.float32
    gradients = flash.varlen_backward(out, q, k, k, out, lse, offsets, offsets, 6, 6, True, 1.0)
    assert [g.shape for g in gradients] == [q.shape, k.shape, k.shape]


FLEX = [
    ("llama", {}),
    ("mistral", {"window": 5}),
    ("gemma3", {"window": 5}),
    ("gemma2", {"window": 5, "attn_logit_softcapping": 2.0}),
]


@pytest.mark.parametrize(("kind", "options"), FLEX)
@torch.no_grad()
def test_flex_forward(kind, options, groups):
    """Windows by position and soft-capping, uncompiled; there is no backward pass on the CPU."""
    model = tiny_model(kind, **options)
    assert relative_error(fused(model, groups, "flex"), oracle(model, groups)) < 1e-6


@torch.no_grad()
def test_flex_compiles_once_for_layouts_of_any_length(monkeypatch):
    """Each batch has another length and another mask; one kernel for rows of one block, one for all longer ones."""
    counter = CompileCounter()
    monkeypatch.setattr(attention, "flex_for", lambda query: attention.compiled_flex(counter))
    frames = []
    for seed, count in ((0, 1), (1, 5), (2, 8), (3, 12), (4, 2)):
        layout = prefix_layout(random_groups(count, seed=seed, prompt=60, response=20))
        for window in (7, 9):
            q, kv = (torch.randn(1, heads, layout.physical_tokens, 16) for heads in (4, 2))
            seen, right = (
                function(torch.nn.Module(), q, kv, kv, None, layout=layout, sliding_window=window)[0]
                for function in (flex_layout_attention, dense_attention)
            )
            torch.testing.assert_close(seen, right, rtol=1e-5, atol=1e-5)
        frames.append(counter.frame_count)
    assert frames[1:] == [2, 2, 2, 2]
    with torch._dynamo.config.patch(recompile_limit=2), pytest.raises(FailOnRecompileLimitHit):
        flex_layout_attention(torch.nn.Module(), q, kv, kv, None, layout=layout, softcap=2.0)


def test_flex_soft_caps_ordinary_rows_too(groups):
    """What the check at a run's start compares with; gradients as well, by plain operations."""
    model = tiny_model("gemma2", window=5, attn_logit_softcapping=2.0)
    expected = oracle(model, groups)
    right = gradients(model, expected)
    model.set_attn_implementation(attention.FLEX)
    seen = LogProbModel(model)(rows_layout(groups))
    assert relative_error(seen, expected) < 1e-6
    for name, gradient in gradients(model, seen).items():
        torch.testing.assert_close(gradient, right[name], rtol=1e-3, atol=1e-4 * right[name].abs().max().item())


@pytest.mark.parametrize("function", [two_part_attention, dense_attention, flex_layout_attention])
@pytest.mark.parametrize("option", [{"s_aux": torch.zeros(4)}, {"dropout": 0.1}, {"position_bias": torch.zeros(1)}])
def test_what_would_be_left_out_is_refused(function, option, groups):
    with pytest.raises(ValueError, match="attention over a shared prompt"):
        attend(function, prefix_layout(groups), **option)


@pytest.mark.parametrize(("function", "option"), [
    (two_part_attention, {"softcap": 2.0}),
    (dense_attention, {"softcap": 2.0}),
    (two_part_attention, {"sliding_window": 5}),
])  # fmt: skip
def test_what_only_flex_or_a_mask_can_do_is_refused(function, option, groups):
    with pytest.raises(ValueError, match="softcap|cannot cut a window of 5"):
        attend(function, prefix_layout(groups), **option)
