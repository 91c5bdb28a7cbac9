"""The log-prob head in half precision on a CPU: a block of the vocabulary at a time, for all rows together.

A CPU has no product of half-precision matrices that accumulates and returns fp32, so weights are widened before it. The
head of a large vocabulary is its largest matrix, and to widen it for every few rows costs more than the products do.
Here each block of it is widened once per call.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dmpo_dist.modeling.heads import LogitTransform


class BlockedLogProbs(torch.autograd.Function):
    """log softmax(transform.logits(rows))[target_row, target_ids] with fp32 logits, ``block`` ids at a time.

    Forward keeps the (M,) log-sum-exp; backward computes each block's logits again.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, target_row: Tensor, target_ids: Tensor,
        transform: LogitTransform, block: int,
    ) -> Tensor:  # fmt: skip
        # rows (M, H), weight (V, H), target_row and target_ids (N,); N >= M: branches share the row of a prompt's end
        wide = rows.float()
        lse = wide.new_full((len(rows),), -torch.inf)
        picked = wide.new_empty(len(target_ids))
        for start, part, part_bias in _blocks(weight, bias, block):
            with _products_of_bf16(rows.dtype):
                logits = transform.logits(wide, part, part_bias)  # (M, block), all that is held of them
            lse = torch.logaddexp(lse, logits.logsumexp(-1))
            local, inside = within(target_ids, start, len(part))
            picked = torch.where(inside, logits[target_row, local], picked)  # (N,); each target is in one block
        ctx.save_for_backward(rows, weight, bias, target_row, target_ids, lse)
        ctx.transform, ctx.block = transform, block
        return picked - lse[target_row]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore
        rows, weight, bias, target_row, target_ids, lse = ctx.saved_tensors
        wants_rows, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        wide = rows.float()
        d_rows = torch.zeros_like(wide) if wants_rows else None
        d_weight = torch.empty_like(weight) if wants_weight else None
        d_bias = torch.empty_like(bias) if bias is not None and wants_bias else None
        # (M,) upstream gradients of all targets that a row predicts: softmax is subtracted once for their sum
        per_row = lse.new_zeros(len(rows)).index_add_(0, target_row, upstream)
        for start, part, part_bias in _blocks(weight, bias, ctx.block):
            with _products_of_bf16(rows.dtype):
                logits = ctx.transform.logits(wide, part, part_bias)
            local, inside = within(target_ids, start, len(part))
            gradient = product_gradient(
                logits, lse, per_row, (target_row, local), torch.where(inside, upstream, 0.0), ctx.transform
            )
            if d_bias is not None:
                d_bias[start : start + len(part)] = gradient.sum(0)
            if d_weight is not None:
                d_weight[start : start + len(part)] = gradient.T @ wide
            if d_rows is not None:
                with _products_of_bf16(rows.dtype):
                    d_rows.addmm_(gradient, part)
        return (None if d_rows is None else d_rows.to(rows.dtype), d_weight, d_bias, *(None,) * 4)


def product_gradient(
    logits: Tensor,
    lse: Tensor,
    per_row: Tensor,
    targets: tuple[Tensor, Tensor],
    upstream: Tensor,
    transform: LogitTransform,
) -> Tensor:
    """The gradient of the targets' log-probs by ``rows @ weight.T + bias``, in place of ``logits``.

    Args:
        logits: (M, B) of some rows and ids, as ``transform`` gives them; overwritten.
        lse: (M,) their log-sum-exp over the whole vocabulary.
        per_row: (M,) upstream gradients of all targets of a row.
        targets: (N,) rows and (N,) columns of the targets in ``logits``.
        upstream: (N,) their gradients, 0 for targets that are not in ``logits``.
    """
    # tanh' = 1 - tanh^2, from the capped logits before they are overwritten
    slope = 1 - (logits / transform.softcap).square() if transform.softcap else None
    # d log p / d logits = onehot - softmax: first -softmax * per_row in place, then the onehots are added
    gradient = logits.sub_(lse[:, None]).exp_().mul_(-per_row[:, None])  # (M, B)
    gradient.index_put_(targets, upstream, accumulate=True)
    if slope is not None:
        gradient *= slope
    if transform.scale != 1.0:
        gradient *= transform.scale
    return gradient


def within(index: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """For the part of ``size`` from ``start``: (N,) each index in it, clamped, and (N,) bool if it is in.

    A mask instead of the few targets inside: to ask the device how many there are would make the host wait.
    """
    local = index - start
    return local.clamp(0, size - 1), (local >= 0) & (local < size)


@contextmanager
def _products_of_bf16(dtype: torch.dtype) -> Iterator[None]:
    """Lets oneDNN multiply fp32 matrices as bf16 with fp32 sums and results, where ``dtype`` is bf16.

    Exact for what was widened from bf16. It rounds a gradient by logits to bf16, as the product on a GPU does. With
    torch 2.13 it is 1.1 times as fast on a processor with AVX512_BF16; oneDNN has kernels of its own for AMX.
    """
    matmul: Any = torch.backends.mkldnn.matmul  # pyrefly: ignore
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16" if dtype == torch.bfloat16 else before
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _blocks(weight: Tensor, bias: Tensor | None, block: int) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """First id, fp32 weights and bias of each block."""
    for start in range(0, len(weight), block):
        part = slice(start, start + block)
        yield start, weight[part].float(), None if bias is None else bias[part]
