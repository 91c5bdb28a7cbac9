"""The FLOP model: the FLOPs that a training step on one preference group needs.

The convention is the same for all implementations:

- A matrix product of (m, k) and (k, n) has 2 m k n FLOPs. Only matrix products are counted.
- Attention is causal: a query meets the keys up to its own position. Each (query, key) pair takes two products of
  ``head_dim`` numbers in each head.
- A step is a reference forward without adapters, a policy forward with LoRA, and the policy's backward.
- Under LoRA the base weights get no gradient, so their backward is the gradient of their input alone (1 x forward). The
  backward of the adapters is 2 x forward, and so is that of attention (four products for each pair).
- Recomputation (in flash attention, or in a head that works in chunks) is not counted, as it is not part of the result.

The gradients of the first layer's input to query, key and value are counted though nobody needs them. They are 1 to 2 %
of a small model's step, for all implementations alike.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """The matrix products of a decoder with a gated MLP.

    Attributes:
        hidden, layers, heads, kv_heads, head_dim, intermediate, vocab: as in the model's configuration.
        lora_rank: rank of the adapters on every linear layer except the head.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    lora_rank: int

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of a layer's linear modules: q, k, v, o, gate, up, down."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        inner = [(self.hidden, queries), (self.hidden, keys), (self.hidden, keys), (queries, self.hidden)]
        mlp = [(self.hidden, self.intermediate)] * 2 + [(self.intermediate, self.hidden)]
        return inner + mlp


@dataclass(frozen=True)
class Work:
    """The work of a pass: tokens through the layers, (query, key) pairs in attention, rows through the head."""

    tokens: int
    pairs: int
    head_rows: int


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs of one pass, by part."""

    linear: int
    adapters: int
    attention: int
    head: int


def shape_of(config: Any, lora_rank: int) -> Shape:
    """The shape of a transformers configuration.

    Raises:
        ValueError: a mixture of experts, or a configuration without the usual fields, which would be counted wrongly.
    """
    if getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
        raise ValueError(f"{config.model_type} is a mixture of experts")
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    for name in needed:
        if not isinstance(getattr(config, name, None), int):
            raise ValueError(f"{config.model_type} has no {name}")
    heads = config.num_attention_heads
    return Shape(
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        intermediate=config.intermediate_size,
        vocab=config.vocab_size,
        lora_rank=lora_rank,
    )


def forward_flops(shape: Shape, work: Work) -> Flops:
    """Forward FLOPs of ``work``; those of LoRA are in ``adapters``."""
    per_token = sum(n * m for n, m in shape.linears)
    per_token_adapters = sum(shape.lora_rank * (n + m) for n, m in shape.linears)
    return Flops(
        linear=2 * shape.layers * per_token * work.tokens,
        adapters=2 * shape.layers * per_token_adapters * work.tokens,
        attention=4 * shape.layers * shape.heads * shape.head_dim * work.pairs,
        head=2 * shape.hidden * shape.vocab * work.head_rows,
    )


def step_flops(shape: Shape, work: Work, reference: bool = True) -> int:
    """FLOPs of reference forward, policy forward and policy backward under LoRA; see the module's convention.

    With ``lora_rank`` 0 all weights are trained, and their backward is 2 x forward.

    Args:
        reference: False leaves the reference's forward out.
    """
    f = forward_flops(shape, work)
    plain = f.linear + f.attention + f.head
    policy = plain + f.adapters
    base = 1 if shape.lora_rank else 2
    backward = base * (f.linear + f.head) + 2 * f.adapters + 2 * f.attention
    return (plain if reference else 0) + policy + backward


def shared_work(prompt: int, response: int, negatives: int) -> Work:
    """The work of one group whose prompt runs once.

    The last token of a response is only a target; the prompt's last hidden state predicts every response's first token.
    """
    rows, body = negatives + 1, response - 1
    return Work(
        tokens=prompt + rows * body,
        pairs=_triangle(prompt) + rows * (body * prompt + _triangle(body)),
        head_rows=1 + rows * body,
    )


def unshared_work(prompt: int, response: int, negatives: int) -> Work:
    """The work of one group as K+1 separate rows without their last tokens; the head runs on predicting positions."""
    rows, length = negatives + 1, prompt + response - 1
    return Work(tokens=rows * length, pairs=rows * _triangle(length), head_rows=rows * response)


def pairs_work(prompt: int, response: int, negatives: int, head_everywhere: bool = False) -> Work:
    """The work of one group as K pairs of full rows, as TRL's DPOTrainer runs it.

    Args:
        prompt, response, negatives: tokens and K.
        head_everywhere: whether the head runs on all positions of a row but the last. TRL 1.16's fused head does that
            without Triton, as on a CPU; with Triton it runs on the completion's positions alone.
    """
    rows, length = 2 * negatives, prompt + response
    scored = length - 1 if head_everywhere else response
    return Work(tokens=rows * length, pairs=rows * _triangle(length), head_rows=rows * scored)


def _triangle(n: int) -> int:
    return n * (n + 1) // 2
