"""How much of a GPU's peak our compiled step reaches with rows of 8 to 40 groups, by two ways of a branch's own
attention.

To be run where a GPU is lent, in one call; it has not run on one yet, its arithmetic has
(``test_stacked_branches.py``):

    PYTHONPATH=.:tests:tests/gpu python tests/gpu/mfu.py --json mfu.json

A branch of 11 tokens fills a tile of 128 in the flash kernel. ``StackedBranches`` runs all branches as one batch of
small products instead. If it is faster here, it belongs into ``dmpo_dist/modeling/flash.py`` in the place of
``CudaFlash.own``.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from itertools import accumulate, chain
from statistics import median
from typing import Any, ClassVar

import torch
from torch import Tensor

from dmpo_dist.batching.layout import PrefixLayout
from dmpo_dist.batching.synthetic import random_groups
from dmpo_dist.bench.implementations import BENCH_MODEL, LORA_RANK, LayoutImplementation, ModelSpec
from dmpo_dist.bench.timing import measure_peak
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.modeling import attention
from dmpo_dist.modeling.flash import CudaFlash, Gradients, varlen_backward, varlen_forward
from dmpo_dist.planning.flops import shape_of, shared_work, step_flops

LLAMA3_8B = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14336, "max_position_embeddings": 8192,
    "rope_theta": 500000.0, "vocab_size": 128256, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
PROMPT, RESPONSE, NEGATIVES = 512, 12, 7
TIMED_STEPS = 3


class Stack:
    """Where the branches of a layout lie in a batch of S branches of R tokens, R a multiple of 8 as the products like
    it.

    Attributes:
        index: (S, R) row positions, the last one repeated as padding.
        padding: (S, R) bool.
        slot: (T_b,) the place of each branch token among S * R.
    """

    def __init__(self, layout: PrefixLayout) -> None:
        lengths = list(chain.from_iterable(layout.branch_lengths))
        starts = [0, *accumulate(lengths)][:-1]
        width = -(-max(lengths) // 8) * 8
        device = layout.input_ids.device
        size, start = (torch.tensor(x)[:, None] for x in (lengths, starts))
        place = torch.arange(width)
        self.index = (layout.prefix_tokens + start + place.minimum(size - 1)).to(device, non_blocking=True)
        self.padding = (place >= size).to(device, non_blocking=True)
        slots = [row * width + t for row, length in enumerate(lengths) for t in range(length)]
        self.slot = torch.tensor(slots).to(device, non_blocking=True)

    def gather(self, x: Tensor, kv_heads: int) -> Tensor:
        """(1, H, T, D) -> (H_kv * S, H / H_kv * R, D): the query heads of a key head stand beneath each other."""
        count, width = self.index.shape
        heads = torch.arange(x.shape[1], device=x.device).view(kv_heads, 1, -1, 1)
        return x[0][heads, self.index[:, None]].view(kv_heads * count, -1, x.shape[3])

    def scatter(self, x: Tensor, heads: int, kv_heads: int) -> Tensor:
        """The way back: -> (1, H, T_b, D), without the padding."""
        count, width = self.index.shape
        by_head = x.view(kv_heads, count, heads // kv_heads, width, -1).transpose(1, 2)
        return by_head.reshape(1, heads, count * width, -1)[:, :, self.slot]


class StackedBranches(CudaFlash):
    """``CudaFlash`` whose branches meet themselves in small products instead of flash attention's tiles."""

    made: ClassVar[tuple[PrefixLayout, Stack] | None] = None
    """Of the layout in use: all layers and passes share it."""

    def own(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = varlen_forward(q, k, v, *self._prompts, True, self.scale)  # the branches' rows are left open
        if self.layout.longest_run:
            heads, kv_heads, first = q.shape[1], k.shape[1], self.layout.prefix_tokens
            q_, k_, v_ = (self._stack.gather(x, kv_heads) for x in (q, k, v))
            scores = self._scores(q_, k_)
            branch_lse = scores.logsumexp(-1, keepdim=True)
            branch_out = torch.bmm((scores - branch_lse).exp().to(v.dtype), v_)
            out[:, :, first:] = self._stack.scatter(branch_out, heads, kv_heads)
            lse[:, :, first:] = self._stack.scatter(branch_lse, heads, kv_heads)[..., 0]
        return out, lse

    def own_backward(self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        totals = varlen_backward(d_out, q, k, v, out, lse, *self._prompts, True, self.scale)
        if self.layout.longest_run:
            heads, kv_heads, first = q.shape[1], k.shape[1], self.layout.prefix_tokens
            q_, k_, v_, out_, d_out_ = (self._stack.gather(x, kv_heads) for x in (q, k, v, out, d_out))
            lse_ = self._stack.gather(lse[..., None], kv_heads)
            padding = self._stack.padding.repeat(kv_heads, heads // kv_heads)[..., None]
            p = (self._scores(q_, k_) - lse_.masked_fill(padding, torch.inf)).exp()
            delta = (d_out_.to(lse.dtype) * out_).sum(-1, keepdim=True)
            ds = (p * (_wide_product(d_out_, v_.transpose(1, 2)) - delta) * self.scale).to(q.dtype)
            parts = (ds @ k_, ds.transpose(1, 2) @ q_, p.to(v.dtype).transpose(1, 2) @ d_out_)
            for total, part in zip(totals, parts, strict=True):
                total[:, :, first:] = self._stack.scatter(part, total.shape[1], kv_heads)
        return totals

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        """(B, H / H_kv * R, R) scaled logits, fp32 or wider, -inf where a token does not look."""
        width = k.shape[1]
        hidden = torch.ones(width, width, dtype=torch.bool, device=q.device).triu(1).repeat(q.shape[1] // width, 1)
        return (_wide_product(q, k.transpose(1, 2)) * self.scale).masked_fill(hidden, -torch.inf)

    @property
    def _stack(self) -> Stack:
        made = StackedBranches.made
        if made is None or made[0] is not self.layout:
            StackedBranches.made = made = self.layout, Stack(self.layout)
        return made[1]

    @property
    def _prompts(self) -> tuple[Tensor, Tensor, int, int]:
        at, longest = self.layout.prefix_offsets, self.layout.longest_prefix
        return at, at, longest, longest


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Batched product that keeps the fp32 sums of half precision."""
    return torch.bmm(a, b, out_dtype=torch.float32) if a.dtype in (torch.bfloat16, torch.float16) else torch.bmm(a, b)


def measure(spec: ModelSpec, sizes: list[int], peak: float) -> Iterator[dict[str, Any]]:
    """First how far the two ways of the branches lie apart; then for each number of groups in a row the milliseconds a
    group, MFU and peak of each, None where the row does not fit."""
    ours = LayoutImplementation(spec, True, PROMPT + RESPONSE)
    groups = random_groups(max(sizes), PROMPT, RESPONSE, NEGATIVES, spec.config["vocab_size"])
    ways: dict[str, Callable[[Tensor], Any]] = {"flash": attention.flash_for, "stacked": attention.flash_for}
    if spec.device == "cuda":
        ways["stacked"] = lambda query: StackedBranches
    yield _difference(ours, groups[:2], ways)
    flops = step_flops(shape_of(spec.transformers_config, LORA_RANK), shared_work(PROMPT, RESPONSE, NEGATIVES))
    for size in sizes:
        result: dict[str, Any] = {"groups": size}
        for name, way in ways.items():
            attention.flash_for = way
            implementation = ours.with_rows(size, size)
            try:
                seconds, gib = _timed(implementation, groups[:size], spec.device)
            except torch.OutOfMemoryError:
                result[name] = None
                continue
            result[name] = {
                "ms_per_group": 1000 * seconds / size,
                "mfu": flops * size / seconds / peak,
                "peak_gib": gib,
            }
        yield result


def _difference(
    ours: LayoutImplementation, groups: list[TokenGroup], ways: dict[str, Callable[[Tensor], Any]]
) -> dict[str, Any]:
    """Nats between the log-probs, and the relative error of the adapters' gradients of one against the other."""
    log_probs, gradients = [], []
    for way in ways.values():
        attention.flash_for = way
        log_probs.append(ours.log_probs(groups[0]))
        ours._loss(groups).backward()
        trained = [p.grad for p in ours._model.parameters() if p.grad is not None]
        gradients.append(torch.cat([gradient.flatten().float() for gradient in trained]))
        ours._optimizer.zero_grad()
    error = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    return {"nats": (log_probs[0] - log_probs[1]).abs().max().item(), "gradient_error": error.item()}


def _timed(implementation: LayoutImplementation, groups: list[TokenGroup], device: str) -> tuple[float, float | None]:
    """Median seconds of a step after one that allocates and compiles, and the peak in GiB."""
    implementation.step(groups)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(TIMED_STEPS):
        start = _now(device)
        implementation.step(groups)
        seconds.append(_now(device) - start)
    return median(seconds), torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu tries the script on a small model"
    )
    parser.add_argument("--groups", type=int, nargs="+", default=[8, 16, 24, 32, 40], help="groups in a row")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--json", help="also write the result to this file")
    arguments = parser.parse_args()
    cuda = arguments.device == "cuda"
    config = LLAMA3_8B if cuda else {**BENCH_MODEL, "vocab_size": 512}
    dtype = "bfloat16" if cuda else "float32"
    peak = measure_peak(arguments.device, dtype)
    result = {"torch": torch.__version__, "peak": peak, "compiled": not arguments.eager, "rows": []}
    for row in measure(
        ModelSpec(config, arguments.device, dtype, not arguments.eager), arguments.groups, peak["value"]
    ):
        result["rows"].append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        if arguments.json:
            with open(arguments.json, "w", encoding="utf-8") as file:
                json.dump(result, file, indent=2)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
