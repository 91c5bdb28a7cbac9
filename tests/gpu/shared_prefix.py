"""Our compiled DMPO step against the same step by ``prefix_grouper``, the package with which verl shares prompts.

To be run where a GPU is lent, in one call; ``test_shared_prefix.py`` holds its arithmetic against ours on the CPU:

    pip install --no-deps prefix_grouper==0.0.1.post1
    PYTHONPATH=.:tests:tests/gpu python tests/gpu/shared_prefix.py --json shared_prefix.json

All variants have the same weights, adapters and token ids, and take the same step: reference forward with adapters off,
policy forward, DMPO, backward, AdamW on the adapters. One is in memory at a time, and before it is timed it must give
the log-probs of ours. ``prefix_grouper`` runs uncompiled, as verl runs it; ``prefix_grouper compiled`` has its decoder
layers compiled as ours are.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from statistics import median
from typing import Any

import torch
from mfu import NEGATIVES, PROMPT, RESPONSE, options, run
from prefix_grouper import AttentionForward, PrefixGrouper
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface

from dmpo_dist.batching.synthetic import random_groups
from dmpo_dist.bench.implementations import (
    LORA_RANK,
    LayoutImplementation,
    ModelSpec,
    fill_adapters,
    make_base,
    make_lora,
    make_optimizer,
)
from dmpo_dist.bench.timing import timed
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.modeling.compile import compile_layers
from dmpo_dist.modeling.heads import backbone_of, output_head
from dmpo_dist.objectives.dmpo import Dmpo
from dmpo_dist.objectives.groups import Groups
from dmpo_dist.planning.flops import shape_of, shared_work, step_flops

ATTENTION = "prefix_grouper_by_sdpa"
MOST_NATS = {"cpu": 1e-4, "cuda": 1.5}
"""Device -> how far the log-prob of a response may lie from ours; bf16 on a GPU, fp32 on a CPU."""


@dataclass(frozen=True)
class SharedBatch:
    """Preference groups as ``prefix_grouper`` takes them: one row a group, its prompt and all its responses.

    Attributes:
        grouper: which tokens of a row are the prompt, and which are which response.
        input_ids, position_ids: (G, T) int64; the positions of every response continue those of the prompt.
        response_ids: (R, L) int64, padded on the right.
        scored: (R, L) bool.
        groups: what the objective is told.
        even: whether all prompts have one length and all responses have one length, so that nothing is padded.
    """

    grouper: PrefixGrouper
    input_ids: Tensor
    position_ids: Tensor
    response_ids: Tensor
    scored: Tensor
    groups: Groups
    even: bool


def batch_of(groups: Sequence[TokenGroup], device: str) -> SharedBatch:
    """``groups`` on ``device``. Lengths are read on the CPU, where verl waits for the device: this is in its favour."""
    sizes = [len(group.branches) for group in groups]
    branches = list(chain.from_iterable(group.branches for group in groups))
    prompts, prompt_mask = _padded([group.prefix for group in groups])
    responses, response_mask = _padded(branches)
    grouper = PrefixGrouper.from_ungrouped_masks(prompt_mask, response_mask, sizes, device=device)
    positions, _ = _padded([_positions(group) for group in groups])
    first = torch.tensor(list(chain.from_iterable(group.scored_from for group in groups)))[:, None]
    scored = response_mask & (torch.arange(responses.shape[1]) >= first)
    response_ids = responses.to(device)
    return SharedBatch(
        grouper=grouper,
        input_ids=grouper.concat_input(prompts.to(device), prompt_mask, response_ids, response_mask),
        position_ids=positions.to(device),
        response_ids=response_ids,
        scored=scored.to(device),
        groups=Groups(
            group_id=torch.arange(len(groups)).repeat_interleave(torch.tensor(sizes)).to(device),
            is_positive=torch.tensor([i == 0 for size in sizes for i in range(size)]).to(device),
            lengths=scored.sum(1).to(device),
            count=len(groups),
        ),
        even=bool(prompt_mask.all() and response_mask.all()),
    )


def _positions(group: TokenGroup) -> list[int]:
    """The position of each token of the group's row."""
    start = len(group.prefix)
    return [*range(start), *chain.from_iterable(range(start, start + len(branch)) for branch in group.branches)]


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(N, longest) int64 padded with 0 on the right, and bool: which of them are tokens."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


def prefix_grouper_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float, prefix_grouper: PrefixGrouper, even: bool, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention function in transformers' form that calls the package's: q (G, H, T, D), k and v (G, H_kv, T, D) ->
    (G, T, H, D)."""
    attend = AttentionForward(partial(_attend, scale=scaling, even=even))
    return attend(prefix_grouper, query, key, value), None


def _attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, scale: float, even: bool) -> Tensor:
    """What the package calls for all prompts, then for all responses, whose keys start with those of the prompt.

    Its default, flash_attention_2, has the same alignment: the last query sees the last key.

    Args:
        q: (N, H, Q, D); k, v: (N, H_kv, K, D).
        keys: (N, K) bool, False where padded.

    Returns:
        (N, Q, H, D).
    """
    bias = causal_lower_right(q.shape[2], k.shape[2]) if even else _visible(keys, q.shape[2])
    return scaled_dot_product_attention(q, k, v, bias, scale=scale, enable_gqa=True).transpose(1, 2)


def _visible(keys: Tensor, queries: int) -> Tensor:
    """(N, K) -> (N, 1, Q, K) bool. The padding before a short prompt would see nothing and give NaN; it sees itself."""
    causal = keys.new_ones(queries, keys.shape[1]).tril(keys.shape[1] - queries)
    itself = causal.triu(keys.shape[1] - queries)
    return (causal & keys[:, None] | itself)[:, None]


class PrefixGrouperImplementation:
    """The step with prompts shared by ``prefix_grouper``, all groups of a step in one batch.

    In its favour, compared with verl 0.9: the language model's head runs on the positions that predict a response
    alone, not on those of the prompt; adapters and weights have one type, without autocast; flash attention is given
    the batch as it is, without a padding mask to take out and put in again in every layer.
    """

    def __init__(self, spec: ModelSpec) -> None:
        from peft import get_peft_model

        # disabled: a compiled layer is then two graphs around attention, as ours is
        AttentionInterface.register(ATTENTION, torch.compiler.disable(prefix_grouper_attention))
        base = make_base(spec)
        base.set_attn_implementation(ATTENTION)
        self._spec, self._model = spec, get_peft_model(base, make_lora()).train()
        self.restart()
        self._objective = Dmpo()

    def restart(self) -> None:
        """Adapters and optimizer as at the start."""
        fill_adapters(self._model, self._spec)
        self._optimizer = make_optimizer(self._model)

    def compile(self) -> None:
        """From now on with compiled decoder layers."""
        compile_layers(self._model.get_base_model())

    def step(self, groups: Sequence[TokenGroup]) -> None:
        """One optimizer step on ``groups``."""
        (self._loss(groups) / len(groups)).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _loss(self, groups: Sequence[TokenGroup]) -> Tensor:
        batch = batch_of(groups, self._spec.device)
        with torch.no_grad(), self._model.disable_adapter():
            reference = self._log_probs(batch)
        loss, _ = self._objective(self._log_probs(batch), reference, batch.groups)
        return loss

    @torch.no_grad()
    def log_probs(self, groups: Sequence[TokenGroup]) -> Tensor:
        """(R,) the policy's log-probs of all responses of ``groups``, on the CPU."""
        return self._log_probs(batch_of(groups, self._spec.device)).cpu()

    def _log_probs(self, batch: SharedBatch) -> Tensor:
        language_model = self._model.get_base_model()
        # On a GPU torch must take its flash kernels or fail: another choice would be another comparison.
        flash = self._spec.device == "cuda" and batch.even
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if flash else nullcontext():
            hidden = backbone_of(language_model)(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False,
                prefix_grouper=batch.grouper, even=batch.even,
            ).last_hidden_state  # fmt: skip
        # (R, 1 + L, H): the last state of the prompt predicts the first token of each of its responses
        _, _, hidden, _ = batch.grouper.split_output(hidden, include_prefix_last=1)
        logits = output_head(language_model)(hidden[:, :-1]).flatten(0, 1).float()  # (R * L, V)
        loss = cross_entropy(logits, batch.response_ids.flatten(), reduction="none")
        return -loss.view_as(batch.scored).masked_fill(~batch.scored, 0).sum(1)


AnyImplementation = LayoutImplementation | PrefixGrouperImplementation


@dataclass(frozen=True)
class Answer:
    """What an implementation makes of some groups: (R,) log-probs, and the gradient of all adapters, both on the
    CPU."""

    log_probs: Tensor
    gradient: Tensor

    @classmethod
    def of(cls, implementation: AnyImplementation, groups: Sequence[TokenGroup]) -> "Answer":
        """Without a step of the optimizer."""
        if isinstance(implementation, LayoutImplementation):
            log_probs = torch.cat([implementation.log_probs(group) for group in groups])
        else:
            log_probs = implementation.log_probs(groups)
        implementation._loss(groups).backward()
        trained = [p.grad for p in implementation._model.parameters() if p.grad is not None]
        gradient = torch.cat([part.flatten().float() for part in trained]).cpu()
        implementation._optimizer.zero_grad()
        return cls(log_probs, gradient)

    def difference(self, ours: "Answer") -> dict[str, float]:
        """The largest difference of a response's log-prob in nats, and the relative error of the gradient."""
        error = (self.gradient - ours.gradient).norm() / ours.gradient.norm()
        return {"nats": (self.log_probs - ours.log_probs).abs().max().item(), "gradient_error": error.item()}


def compare(spec: ModelSpec, sizes: list[int], steps: int, peak: float) -> Iterator[dict[str, Any]]:
    """For each variant first how far it lies from ours, then the times of a step by number of groups.

    Raises:
        SystemExit: log-probs that differ from ours by more than rounding.
    """
    groups = random_groups(max(sizes), PROMPT, RESPONSE, NEGATIVES, spec.config["vocab_size"])
    flops = step_flops(shape_of(spec.transformers_config, LORA_RANK), shared_work(PROMPT, RESPONSE, NEGATIVES))
    expected: Answer | None = None
    ours: dict[int, float] = {}
    for name, implementation in _variants(spec):
        answer = Answer.of(implementation, groups[:2])
        if expected is None:
            expected = answer
        else:
            difference = answer.difference(expected)
            yield {"variant": name, **difference}
            if not difference["nats"] <= MOST_NATS[spec.device]:  # NaN is refused too
                raise SystemExit(f"{name} differs from ours by {difference['nats']} nats; its times would mean nothing")
        for size in sizes:
            row = _measured(implementation, groups[:size], steps, spec.device)
            seconds = row.pop("seconds")
            if name == "ours" and seconds:
                ours[size] = seconds
                row["mfu"] = flops * size / seconds / peak
            row["times_ours"] = seconds / ours[size] if seconds and size in ours else None
            yield {"variant": name, "groups": size, **row}
        del implementation, answer  # ours must be gone before the next model is made


def _variants(spec: ModelSpec) -> Iterator[tuple[str, AnyImplementation]]:
    """The variants by name, one model at a time as long as the caller keeps none."""
    yield "ours", LayoutImplementation(spec, True, PROMPT + RESPONSE)
    torch._dynamo.reset()
    _free(spec.device)
    theirs = PrefixGrouperImplementation(spec)
    yield "prefix_grouper", theirs
    if spec.compiled:
        theirs.restart()
        theirs.compile()
        _free(spec.device)
        yield "prefix_grouper compiled", theirs


def _measured(
    implementation: AnyImplementation, groups: Sequence[TokenGroup], steps: int, device: str
) -> dict[str, Any]:
    """Median seconds of a step after one that allocates and compiles, and the peak; None where it does not fit."""
    if isinstance(implementation, LayoutImplementation):
        implementation = implementation.with_rows(len(groups), len(groups))
    run = partial(implementation.step, groups)
    try:
        warm_up = timed(run, device).seconds
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = median(timed(run, device).seconds for _ in range(steps))
    except torch.OutOfMemoryError:
        seconds = None
    if seconds is None:  # outside the handler, whose traceback holds the activations
        _free(device)
        return {"seconds": None, "ms_per_group": None}
    return {
        "seconds": seconds,
        "ms_per_group": 1000 * seconds / len(groups),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
        "warm_up_seconds": warm_up,
    }


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    parser = options(__doc__.splitlines()[0], [8, 16, 24])  # a step of so many groups, all in one batch
    parser.add_argument("--steps", type=int, default=3, help="timed steps, whose median counts")
    arguments = parser.parse_args()
    run(arguments, lambda spec, peak: compare(spec, arguments.groups, arguments.steps, peak))


if __name__ == "__main__":
    main()
