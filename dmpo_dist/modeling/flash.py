"""The two parts of attention over a ``PrefixLayout`` by flash kernels, on the CPU and on CUDA.

``own``  causal attention of every prompt and every branch to itself.
``far``  attention of all branch tokens of a group to its prompt, without a mask.

``CpuFlash``, ``CudaFlash`` and ``PlainAttention`` have the same four methods. Everywhere q is (1, H, T, D), k and v are
(1, H_kv, T, D), the log-sum-exp is (1, H, T), at least fp32; ``far`` takes the branches' T_b rows of q and the prompts'
T_p rows of k and v. The backward methods take the output and log-sum-exp of *both* parts merged, and give (dq, dk, dv).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dmpo_dist.batching.layout import PrefixLayout

Gradients = tuple[Tensor, Tensor, Tensor]

_cpu_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_cuda_forward = torch.ops.aten._flash_attention_forward.default
_cuda_backward = torch.ops.aten._flash_attention_backward.default


def plain_forward(
    q: Tensor, k: Tensor, v: Tensor, dropout: float, causal: bool, *, scale: float
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T scale) v and the log-sum-exp (B, H, T_q) of (B, H, T_q, D) and (B, H, T_k, D); ``dropout`` is 0."""
    scores = _scores(q, k, causal, scale)
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(v.dtype) @ v, lse


def plain_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dropout: float, causal: bool,
    *, scale: float,
) -> Gradients:  # fmt: skip
    """The gradients (dq, dk, dv) of ``plain_forward``, P = exp(S - lse) and D = rowsum(d_out * out) taken as given."""
    p = (_scores(q, k, causal, scale) - lse[..., None]).exp().to(q.dtype)
    ds = p * (d_out @ v.transpose(-1, -2) - (d_out * out).sum(-1, keepdim=True)) * scale
    return ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ d_out


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """(B, H, T_q, T_k) scaled logits, at least fp32, -inf where ``causal`` hides a key."""
    wide = q @ k.transpose(-1, -2) * scale
    wide = wide if wide.dtype == torch.float64 else wide.float()
    if causal:
        hidden = torch.ones(wide.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        wide = wide.masked_fill(hidden, -torch.inf)
    return wide


@dataclass(frozen=True)
class CpuFlash:
    """A kernel call for each prompt and each group's run of branches, one for all branches by themselves; H_kv = H."""

    layout: PrefixLayout
    scale: float
    _forward: ClassVar[Callable[..., tuple[Tensor, Tensor]]] = staticmethod(_cpu_forward)
    _backward: ClassVar[Callable[..., Gradients]] = staticmethod(_cpu_backward)

    def own(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(out, lse) of part one."""
        layout = self.layout
        out, lse = torch.zeros_like(q, memory_format=torch.contiguous_format), _empty_lse(q)
        for prompt, _ in layout.spans:
            out[:, :, prompt], lse[:, :, prompt] = self._forward(
                q[:, :, prompt], k[:, :, prompt], v[:, :, prompt], 0.0, True, scale=self.scale
            )
        if layout.branch_index.numel():
            at = layout.branch_index[layout.branch_valid]  # (T_b,) every branch token of the row
            branch_out, branch_lse = self._forward(*(_stack(x, layout) for x in (q, k, v)), 0.0, True, scale=self.scale)
            out[:, :, at], lse[:, :, at] = _flatten(branch_out, layout), _flatten(branch_lse, layout)
        return out, lse

    def far(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(out, lse) of part two."""
        out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), _empty_lse(q)
        for prompt, run in _runs(self.layout):
            out[:, :, run], lse[:, :, run] = self._forward(
                q[:, :, run], k[:, :, prompt], v[:, :, prompt], 0.0, False, scale=self.scale
            )
        return out, lse

    def own_backward(self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        """Gradients of part one."""
        layout, d_out = self.layout, d_out.contiguous()
        totals = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
        for prompt, _ in layout.spans:
            part = self._backward(*(x[:, :, prompt] for x in (d_out, q, k, v, out, lse)), 0.0, True, scale=self.scale)
            for total, gradient in zip(totals, part, strict=True):
                total[:, :, prompt] = gradient
        if layout.branch_index.numel():
            at = layout.branch_index[layout.branch_valid]
            padding = ~layout.branch_valid[:, None]
            # padded queries: no gradient comes in, and P = exp(S - inf) = 0 keeps them from overflowing
            stacked_d_out = _stack(d_out, layout).masked_fill(padding[..., None], 0.0)
            stacked_lse = _stack(lse[..., None], layout)[..., 0].masked_fill(padding, torch.inf)
            q_, k_, v_, out_ = (_stack(x, layout) for x in (q, k, v, out))
            part = self._backward(stacked_d_out, q_, k_, v_, out_, stacked_lse, 0.0, True, scale=self.scale)
            for total, gradient in zip(totals, part, strict=True):
                total[:, :, at] = _flatten(gradient, layout)
        return totals

    def far_backward(self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        """Gradients of part two."""
        d_out = d_out.contiguous()
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)  # no run, no gradient to its prompt
        for prompt, run in _runs(self.layout):
            dq[:, :, run], dk[:, :, prompt], dv[:, :, prompt] = self._backward(
                d_out[:, :, run], q[:, :, run], k[:, :, prompt], v[:, :, prompt], out[:, :, run], lse[:, :, run],
                0.0, False, scale=self.scale,
            )  # fmt: skip
        return dq, dk, dv


@dataclass(frozen=True)
class PlainAttention(CpuFlash):
    """The same by products of torch, on any device and in any type: what checks a layout in fp32 on CUDA, whose flash
    kernels take half types alone. Slow and large: a product of all queries and keys of a prompt."""

    _forward: ClassVar[Callable[..., tuple[Tensor, Tensor]]] = staticmethod(plain_forward)
    _backward: ClassVar[Callable[..., Gradients]] = staticmethod(plain_backward)


@dataclass(frozen=True)
class CudaFlash:
    """One variable-length kernel call for each part, grouped-query heads by the kernel; bf16 or fp16."""

    layout: PrefixLayout
    scale: float

    def own(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(out, lse) of part one."""
        return varlen_forward(q, k, v, *self._own, True, self.scale)

    def far(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(out, lse) of part two."""
        return varlen_forward(q, k, v, *self._far, False, self.scale)

    def own_backward(self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        """Gradients of part one."""
        return varlen_backward(d_out, q, k, v, out, lse, *self._own, True, self.scale)

    def far_backward(self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        """Gradients of part two."""
        return varlen_backward(d_out, q, k, v, out, lse, *self._far, False, self.scale)

    @property
    def _own(self) -> tuple[Tensor, Tensor, int, int]:
        at, longest = self.layout.segment_offsets, self.layout.longest_segment
        return at, at, longest, longest

    @property
    def _far(self) -> tuple[Tensor, Tensor, int, int]:
        layout = self.layout
        return layout.run_offsets, layout.prefix_offsets, layout.longest_run, layout.longest_prefix


Flash = CpuFlash | CudaFlash


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, k_offsets: Tensor, longest_q: int, longest_k: int,
    causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of each run of queries to its run of keys on CUDA.

    Args:
        q, k, v: (1, H, T_q, D) and (1, H_kv, T_k, D), any strides but 1 for the last; bf16 or fp16.
        q_offsets, k_offsets: (S + 1,) int32 on the device; a run of queries may be empty.
        longest_q, longest_k: tokens of the longest runs.
        causal: whether a run's queries see only the keys up to their own position; both runs then have one length.
        scale: of the logits.

    Returns:
        out (1, H, T_q, D) and fp32 lse (1, H, T_q).
    """
    out, lse, *_ = _cuda_forward(
        _rows(q), _rows(k), _rows(v), q_offsets, k_offsets, _not_one(longest_q), longest_k, 0.0, causal, False,
        scale=scale,
    )  # fmt: skip
    return out.transpose(0, 1)[None], lse[None]


def varlen_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, q_offsets: Tensor, k_offsets: Tensor,
    longest_q: int, longest_k: int, causal: bool, scale: float,
) -> Gradients:  # fmt: skip
    """The gradients (dq, dk, dv) of ``varlen_forward``, P = exp(S - lse) and D = rowsum(d_out * out) taken as given."""
    rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, of which there is none
    gradients = _cuda_backward(
        *(_rows(x) for x in (d_out, q, k, v, out)), lse[0].contiguous(), q_offsets, k_offsets,
        _not_one(longest_q), longest_k, 0.0, causal, rng_state, torch.empty(0, device=q.device), scale=scale,
    )  # fmt: skip
    dq, dk, dv = (gradient.transpose(0, 1)[None] for gradient in gradients)
    return dq, dk, dv


def varlen_obstacle(dtype: torch.dtype, head_dim: int) -> str | None:
    """What keeps the CUDA kernels from heads of this type and width on this machine's device."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash attention on CUDA takes bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > 256:
        return f"flash attention takes heads of up to 256 in steps of 8, not {head_dim}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "flash attention needs a device of compute capability 8.0 or more"
    return None


def _rows(x: Tensor) -> Tensor:
    """(1, H, T, D) -> (T, H, D) as the kernels take it: a view, unless the last stride is not 1."""
    x = x[0].transpose(0, 1)
    return x if x.stride(-1) == 1 else x.contiguous()


def _not_one(longest: int) -> int:
    """An upper bound is enough; at 1 the kernel decodes and fails on empty runs (flash-attention #1537)."""
    return max(2, longest)


def _runs(layout: PrefixLayout) -> list[tuple[slice, slice]]:
    """For each group with branch tokens, its prompt among the prompts and its run among the branches."""
    first = layout.prefix_tokens
    return [(p, slice(b.start - first, b.stop - first)) for p, b in layout.spans if b.start < b.stop]


def _empty_lse(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


def _stack(x: Tensor, layout: PrefixLayout) -> Tensor:
    """(1, H, T, D) -> (S, H, R, D): each branch a row, padded on the right, which causal attention never looks at."""
    return x[0][:, layout.branch_index].transpose(0, 1).contiguous()


def _flatten(x: Tensor, layout: PrefixLayout) -> Tensor:
    """(S, H, R, ...) -> (1, H, T_b, ...) without the padding."""
    return x.transpose(1, 2)[layout.branch_valid].transpose(0, 1)[None]
