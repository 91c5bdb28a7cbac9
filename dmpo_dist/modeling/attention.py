"""Attention over a ``PrefixLayout``: every branch sees its group's prompt and itself.

Two exact backends, registered with transformers; the layout rides as a forward keyword to every layer:

``two_part``  no mask. Part 1, causal attention of every prompt and every branch by itself; part 2, all branch tokens
    of a group to its prompt. The parts are merged by log-sum-exp. Backward calls the flash backward once per part
    with the *merged* output and log-sum-exp, which is exact (P = exp(S - lse), D = rowsum(dO * O)) and needs no
    gradient of the log-sum-exp; it is the identity ring attention rests on.
``sdpa``      a dense (T, T) mask per window length: the oracle, and the backend for sliding windows on the CPU.

Calls without a layout (ordinary rows, generation) go to transformers' own SDPA with its own masks.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dmpo_dist.batching.layout import PrefixLayout

TWO_PART, DENSE = "dmpo_two_part", "dmpo_sdpa"


def no_mask(device: torch.device) -> Tensor:
    """A 4-D mask that transformers passes through as it is, so that it builds no T x T mask of its own."""
    return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)


def register() -> None:
    """Make both backends known to transformers; ordinary rows keep ordinary masks."""
    for name, function in ((TWO_PART, two_part_attention), (DENSE, dense_attention)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask)


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
    """Attention function in transformers' form: q (1, H, T, D), k and v (1, H_kv, T, D) -> (1, T, H, D)."""
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **kwargs,
        )  # fmt: skip
    _refuse(dropout, kwargs)
    if sliding_window is not None and layout.longest > sliding_window:
        raise ValueError(f"two_part cannot cut a window of {sliding_window} out of {layout.longest} positions")
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return _TwoPart.apply(query, key, value, layout, scale).transpose(1, 2).contiguous(), None


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
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **kwargs,
        )  # fmt: skip
    _refuse(dropout, kwargs)
    window = sliding_window if sliding_window is not None and layout.longest > sliding_window else None
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    out = scaled_dot_product_attention(query, key, value, attn_mask=layout.mask(window), scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def _refuse(dropout: float, kwargs: dict[str, Any]) -> None:
    """What would be silently wrong here; ``modeling/routing.py`` keeps such models away."""
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(f"attention over a shared prompt does not know {name}")
    if dropout:
        raise ValueError("attention over a shared prompt needs dropout 0")


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class _TwoPart(torch.autograd.Function):
    """q, k, v (1, H, T, D) -> (1, H, T, D) on the CPU; see the module's docstring."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, scale: float) -> Tensor:
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        lse = q.new_zeros(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
        for prompt, _ in layout.spans:
            out[:, :, prompt], lse[:, :, prompt] = _flash(
                q[:, :, prompt], k[:, :, prompt], v[:, :, prompt], 0.0, True, scale=scale
            )
        if layout.branch_index.numel():
            at = layout.branch_index[layout.branch_valid]  # (C,) every branch token of the row
            own_out, own_lse = _flash(*(_stack(x, layout) for x in (q, k, v)), 0.0, True, scale=scale)
            out[:, :, at], lse[:, :, at] = _flatten(own_out, layout), _flatten(own_lse, layout)
        for prompt, branches in layout.spans:
            if branches.start == branches.stop:
                continue
            far_out, far_lse = _flash(q[:, :, branches], k[:, :, prompt], v[:, :, prompt], 0.0, False, scale=scale)
            own_lse = lse[:, :, branches].clone()
            lse[:, :, branches] = merged = torch.logaddexp(own_lse, far_lse)
            own, far = (own_lse - merged).exp()[..., None], (far_lse - merged).exp()[..., None]
            out[:, :, branches] = (own * out[:, :, branches] + far * far_out).to(out.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # pyrefly: ignore
        q, k, v, out, lse = ctx.saved_tensors
        layout, scale = ctx.layout, ctx.scale
        d_out = d_out.contiguous()
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for prompt, branches in layout.spans:
            for queries, causal in ((prompt, True), (branches, False)):
                if queries.start == queries.stop:
                    continue
                part = _flash_backward(
                    d_out[:, :, queries], q[:, :, queries], k[:, :, prompt], v[:, :, prompt],
                    out[:, :, queries], lse[:, :, queries], 0.0, causal, scale=scale,
                )  # fmt: skip
                dq[:, :, queries] += part[0]
                dk[:, :, prompt] += part[1]
                dv[:, :, prompt] += part[2]
        if layout.branch_index.numel():
            at = layout.branch_index[layout.branch_valid]
            padding = ~layout.branch_valid[:, None]
            # padded queries: no gradient comes in, and P = exp(S - inf) = 0 keeps them from overflowing
            stacked_d_out = _stack(d_out, layout).masked_fill(padding[..., None], 0.0)
            stacked_lse = _stack(lse[..., None], layout)[..., 0].masked_fill(padding, torch.inf)
            q_, k_, v_, out_ = (_stack(x, layout) for x in (q, k, v, out))
            part = _flash_backward(stacked_d_out, q_, k_, v_, out_, stacked_lse, 0.0, True, scale=scale)
            for total, gradient in zip((dq, dk, dv), part, strict=True):
                total[:, :, at] += _flatten(gradient, layout)
        return dq, dk, dv, None, None


def _stack(x: Tensor, layout: PrefixLayout) -> Tensor:
    """(1, H, T, D) -> (S, H, R, D): each branch a row, padded on the right, which causal attention never looks at."""
    return x[0][:, layout.branch_index].transpose(0, 1).contiguous()


def _flatten(x: Tensor, layout: PrefixLayout) -> Tensor:
    """(S, H, R, ...) -> (1, H, C, ...) without the padding."""
    return x.transpose(1, 2)[layout.branch_valid].transpose(0, 1)[None]
