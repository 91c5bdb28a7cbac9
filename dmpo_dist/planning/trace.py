"""The memory that forward and backward of one row allocate, found by running the real module on the meta device.

On the meta device operations allocate tensors without computing anything, and a dispatch mode adds up the storages that
are alive. So the figures follow from the modules themselves, for any decoder, with adapters and checkpointing, and no
formula for each architecture is needed. Only attention kernels, which do not take meta tensors, are replaced by
functions that allocate and keep the same tensors.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface

from dmpo_dist.batching.layout import Layout, PrefixLayout
from dmpo_dist.modeling.attention import repeated, two_part

NAME = "dmpo_plan"

Kernel = Literal["cpu", "varlen", "masked"]
"""cpu: the CPU's flash kernels, which repeat the keys of grouped queries; varlen: CUDA's variable-length kernels;
masked: a kernel with a dense mask."""


@dataclass(frozen=True)
class Trace:
    """Bytes of the tensors that one row allocates, without the parameters.

    Attributes:
        saved: bytes at the end of the forward pass, which are kept for the backward pass.
        peak: the most bytes at any time.
    """

    saved: int
    peak: int


def trace_row(module: nn.Module, layout: Layout, kernel: Kernel, keep_gradients: bool) -> Trace:
    """Run ``module`` (a ``LogProbModel`` on the meta device, its attention set to ``NAME``) on ``layout``.

    Args:
        module: in training mode; its parameters are not counted.
        layout: on the meta device.
        kernel: the attention kernel to stand in for.
        keep_gradients: whether gradients stay once they are made, as when a bucket collects them; else each is freed at
            once, as when it is added to one that exists.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    hooks = [] if keep_gradients else [p.register_post_accumulate_grad_hook(_drop) for p in trainable]
    meter = _Meter([*module.parameters(), *module.buffers(), *_tensors(layout)])
    try:
        with _attention(kernel), meter:
            log_probs = module(layout)
            saved = meter.alive
            log_probs.sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trainable:
            parameter.grad = None
    return Trace(saved, meter.peak)


def register() -> None:
    """Register the stand-in for attention in transformers; it needs no mask."""
    AttentionInterface.register(NAME, _stand_in)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


class _Meter(TorchDispatchMode):
    """Adds up the sizes of the storages that operations allocate and that are not freed yet."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self._sizes = {t.untyped_storage()._cdata: 0 for t in known}
        self._known = known  # a reference, so that no new storage gets the address of one of these
        self.alive = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        if storage._cdata in self._sizes:
            return
        # A view shares its storage, so it is counted once; the finalizer runs when the last tensor of it is gone.
        self._sizes[storage._cdata] = storage.nbytes()
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, storage._cdata)

    def _free(self, address: int) -> None:
        self.alive -= self._sizes.pop(address)


_kernel: list[Kernel] = []


@contextmanager
def _attention(kernel: Kernel) -> Iterator[None]:
    _kernel.append(kernel)
    try:
        yield
    finally:
        _kernel.pop()


def _stand_in(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    layout: PrefixLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in transformers' interface: q (B, H, T, D), k and v (B, H_kv, T, D) -> (B, T, H, D)."""
    if _kernel[-1] != "varlen":
        key, value = repeated(query, key, value)
    if layout is not None and _kernel[-1] != "masked":
        out = two_part(query, key, value, _NoKernel(layout))
    else:
        out = _Masked.apply(query, key, value)
    return out.transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class _NoKernel:
    """The interface of ``modeling.flash``; its methods return empty tensors of the right shapes."""

    layout: PrefixLayout

    def own(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)

    far = own

    def own_backward(self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    far_backward = own_backward


class _Masked(torch.autograd.Function):
    """A kernel that keeps a dense additive mask (B, 1, T, T) for the backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = q.new_empty(q.shape[0], 1, q.shape[2], k.shape[2])
        out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse, mask)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, ...]:  # pyrefly: ignore
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def _tensors(layout: Any) -> list[Tensor]:
    """All tensors of a layout and of its targets."""
    found = []
    for value in vars(layout).values():
        if isinstance(value, Tensor):
            found.append(value)
        elif hasattr(value, "predict_index"):
            found += _tensors(value)
    return found
