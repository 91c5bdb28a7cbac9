"""Attention over a ``PrefixLayout``: every branch sees its group's prompt and itself.

Three exact backends, registered with transformers; the layout rides as a forward keyword to every layer:

``two_part``  no mask. Part 1, causal attention of every prompt and every branch by itself; part 2, all branch tokens
    of a group to its prompt. The parts are merged by log-sum-exp. Backward calls the flash backward once per part
    with the *merged* output and log-sum-exp, which is exact (P = exp(S - lse), D = rowsum(dO * O)) and needs no
    gradient of the log-sum-exp; it is the identity ring attention rests on. The kernels are in ``flash.py``.
``flex``      a compiled kernel that skips unseen blocks of a mask, for windows and soft-capping on CUDA.
``sdpa``      a dense (T, T) mask per window length: the oracle, and the backend for sliding windows on the CPU.

Which of them a model can use where, and which have been proven there, is in ``routing.py``. Calls without a layout
(ordinary rows, generation) go to the model's own kind of attention with its own masks.
"""

from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from dmpo_dist.batching.layout import PrefixLayout
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.flash import CpuFlash, CudaFlash, Flash, PlainAttention

TWO_PART, FLEX, DENSE = "dmpo_two_part", "dmpo_flex", "dmpo_sdpa"

RECOMPILE_LIMIT = 64
"""How often flex attention may compile: for each mask, soft-cap, head width, type and pass there is a kernel."""

FLEX_OPTIONS: Any = {"FORCE_USE_FLEX_ATTENTION": True}
"""For rows below 128 tokens flex attention would turn to its decoding kernel, which finds no configuration for them."""


def no_mask(device: torch.device) -> Tensor:
    """A 4-D mask that transformers passes through as it is, so that it builds no T x T mask of its own."""
    return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)


def register() -> None:
    """Make the backends known to transformers; ordinary rows keep ordinary masks."""
    backends = (
        (TWO_PART, two_part_attention, sdpa_mask),
        (DENSE, dense_attention, sdpa_mask),
        (FLEX, flex_layout_attention, eager_mask),  # added to soft-capped logits
    )
    for name, function, mask in backends:
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, mask)


def two_part_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: PrefixLayout | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function in transformers' form: q (1, H, T, D), k and v (1, H_kv, T, D) -> (1, T, H, D).

    On CUDA fast in bf16 and fp16 only, see ``flash.varlen_obstacle``.

    Raises:
        ValueError: an option of the layer that this backend would leave out, as in the other two.
    """
    if layout is None:
        return ordinary_attention(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **kwargs,
        )  # fmt: skip
    refuse_unknown(dropout, attention_mask, kwargs, "softcap")
    window = _window_that_cuts(layout, sliding_window)
    if window is not None:
        raise ValueError(f"two_part cannot cut a window of {window} out of {layout.longest} positions")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if issubclass(flash_for(query), CpuFlash):
        key, value = repeated(query, key, value)
    out = two_part(query, key, value, flash_for(query)(layout, scale))
    return out.transpose(1, 2).contiguous(), None


def flex_layout_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: PrefixLayout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The same function by flex attention, which also soft-caps the logits; on the CPU uncompiled and forward only.

    Raises:
        torch._dynamo.exc.FailOnRecompileLimitHit: more than ``RECOMPILE_LIMIT`` kernels; there is no quiet eager run.
    """
    if layout is None and softcap is None:
        return ordinary_attention(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **kwargs,
        )  # fmt: skip
    refuse_unknown(dropout, None if layout is None else attention_mask, kwargs)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if layout is None:
        assert softcap is not None
        assert attention_mask is not None
        _require_no_layout(query, attention_mask)
        return _soft_capped(query, *repeated(query, key, value), attention_mask, scale, softcap), None
    out = flex_for(query)(
        query, key, value, score_mod=_soft_cap(softcap), scale=scale, enable_gqa=query.shape[1] != key.shape[1],
        block_mask=layout.block_mask(_window_that_cuts(layout, sliding_window)), kernel_options=FLEX_OPTIONS,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def dense_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: PrefixLayout | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The same function by a dense mask; shapes as in ``two_part_attention``."""
    if layout is None:
        return ordinary_attention(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **kwargs,
        )  # fmt: skip
    refuse_unknown(dropout, attention_mask, kwargs, "softcap")
    mask = layout.mask(_window_that_cuts(layout, sliding_window))
    key, value = repeated(query, key, value)
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def two_part(query: Tensor, key: Tensor, value: Tensor, flash: Any) -> Tensor:
    """Both parts, merged: q (1, H, T, D), k and v (1, H_kv, T, D) -> (1, H, T, D); ``flash`` is a ``Flash``."""
    return _TwoPart.apply(query, key, value, flash)


def flash_for(query: Tensor) -> type[Flash]:
    """The kernels of ``two_part`` for this device and type. CUDA meets fp32 where a model is checked in it."""
    if not query.is_cuda:
        return CpuFlash
    return CudaFlash if query.dtype in (torch.bfloat16, torch.float16) else PlainAttention


def flex_for(query: Tensor) -> Any:
    """Flex attention on the device of ``query``: compiled on CUDA."""
    return compiled_flex() if query.is_cuda else flex_attention


@cache
def compiled_flex(backend: Any = "inductor") -> Any:
    """Flex attention whose kernels serve layouts of any length; past the limit it raises instead of running eagerly."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    torch._dynamo.config.specialize_float = True  # a soft-cap that is a tensor cannot be differentiated through
    return torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=backend)


class NotShareableError(UserError):
    """Layers that cannot compute responses behind a shared prompt, which only shows when they run."""

    found: ClassVar[str]
    """What a shared prompt does with them, to follow the model's name."""


class OwnMaskError(NotShareableError):
    """A layer has put a mask of its own in the place of ``no_mask``."""

    found = "leaves out a mask that its layers add to attention"


class LostLayoutError(NotShareableError):
    """A layer has handed ``no_mask`` down, and not the layout it stands for (Nemotron drops keyword arguments)."""

    found = "does not reach attention, as its layers drop the layout"


def ordinary_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' own SDPA, for calls without a layout.

    Raises:
        LostLayoutError: the call was to have one.
    """
    _require_no_layout(query, mask)
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


def _require_no_layout(query: Tensor, mask: Tensor | None) -> None:
    """A mask of one element for several tokens is ``no_mask``, which comes with a layout; raises LostLayoutError."""
    if mask is not None and mask.numel() == 1 and query.shape[2] > 1:
        raise LostLayoutError(
            "the model's layers drop the layout of shared prompts before it reaches attention, so responses would not "
            'see their prompts; set model.attention=unshared, or attention="unshared" in Python'
        )


def refuse_unknown(dropout: float, mask: Tensor | None, kwargs: dict[str, Any], *also: str) -> None:
    """What would be silently wrong here; ``modeling/routing.py`` keeps such models away as far as it knows them.

    Raises:
        OwnMaskError: a layer adds its own mask (Doge does), which only shows when it runs.
        ValueError: any other thing.
    """
    for name in ("s_aux", "position_bias", *also):
        if kwargs.get(name) is not None:
            raise ValueError(f"attention over a shared prompt does not know {name}")
    if dropout:
        raise ValueError("attention over a shared prompt needs dropout 0")
    if mask is not None and mask.numel() > 1:
        raise OwnMaskError(
            "the model's layers add a mask of their own to attention, which responses behind a shared prompt would not "
            "see; set model.attention=unshared"
        )


def _window_that_cuts(layout: PrefixLayout, window: int | None) -> int | None:
    return window if window is not None and layout.longest > window else None


def repeated(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values once for each query head."""
    repeats = query.shape[1] // key.shape[1]
    return key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)


@cache
def _soft_cap(cap: float | None) -> Any:
    """A ``score_mod``; one object for each cap, so that layers share a kernel."""
    if cap is None:
        return None

    def capped(score: Tensor, _batch: Tensor, _head: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


def _soft_capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, cap: float) -> Tensor:
    """Ordinary rows by an additive mask: (B, H, L, D) -> (B, L, H, D)."""
    scores = q @ k.transpose(2, 3) * scale
    scores = cap * torch.tanh(scores / cap) + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2).contiguous()


class _TwoPart(torch.autograd.Function):
    """q (1, H, T, D), k and v (1, H_kv, T, D) -> (1, H, T, D); see the module's docstring."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, flash: Flash) -> Tensor:
        # Part 1: every prompt and every branch sees itself, causally. out (1, H, T, D), lse (1, H, T)
        out, lse = flash.own(q, k, v)
        if flash.layout.longest_run:  # 0 where all responses are one token long: a last token is only a target
            prompts, branches = _halves(flash.layout)
            # Part 2: every branch token sees the whole prompt of its group. (1, H, T_b, D), (1, H, T_b)
            far_out, far_lse = flash.far(q[:, :, branches], k[:, :, prompts], v[:, :, prompts])
            # Each part is a softmax over its own keys. exp(lse) is its denominator, so the softmax over both kinds of
            # keys is their mean with weights exp(lse_i) / (exp(lse_1) + exp(lse_2)).
            own_lse = lse[:, :, branches].clone()
            lse[:, :, branches] = merged = torch.logaddexp(own_lse, far_lse)
            own, far = (own_lse - merged).exp()[..., None], (far_lse - merged).exp()[..., None]
            out[:, :, branches] = (own * out[:, :, branches] + far * far_out).to(out.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.flash = flash
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyrefly: ignore
        q, k, v, out, lse = ctx.saved_tensors
        # With the merged lse a part's kernel recomputes P = exp(S - lse), its share of the whole softmax, and with the
        # merged out D = rowsum(d_out * out) is that of the whole row. Both are what the gradient of the joint softmax
        # asks for, and gradients of disjoint sets of keys add up; no gradient of an lse is needed.
        dq, dk, dv = ctx.flash.own_backward(d_out, q, k, v, out, lse)
        if ctx.flash.layout.longest_run:
            prompts, branches = _halves(ctx.flash.layout)
            # part 2 has queries in the branches and keys in the prompts alone
            of_queries, of_keys = (x[:, :, branches] for x in (d_out, q)), (x[:, :, prompts] for x in (k, v))
            far = ctx.flash.far_backward(*of_queries, *of_keys, out[:, :, branches], lse[:, :, branches])
            for total, rows, gradient in zip((dq, dk, dv), (branches, prompts, prompts), far, strict=True):
                total[:, :, rows] += gradient
        return dq, dk, dv, None


def _halves(layout: PrefixLayout) -> tuple[slice, slice]:
    """The rows of all prompts and those of all branches."""
    return slice(layout.prefix_tokens), slice(layout.prefix_tokens, None)
