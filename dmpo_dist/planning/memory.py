"""Memory of one rank, term by term, in the three phases of a step, as DeepSpeed 0.19 allocates it.

``micro_batch``  forward and backward of a row, while gradients of earlier rows are held.
``reduce``       gradients are averaged over the ranks; activations are freed.
``step``         the optimizer updates the weights.

The peak is that of the largest phase. Symbols in formulas: b bytes of a weight; P number of all parameters, T of
trainable ones, Q of those frozen in nf4, p of one parameter tensor; N ranks; S = T / N, a rank's shard; a bytes of
activations kept for a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from dmpo_dist.planning.model import Sizes
from dmpo_dist.planning.trace import Trace

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
PHASES = ("micro_batch", "reduce", "step")
ROW, REDUCE, STEP = (frozenset((phase,)) for phase in PHASES)
STATIC = frozenset(PHASES)
FRAMEWORK = {"cuda": 3 * 2**29, "cpu": 3 * 2**28}
"""Assumed bytes of a rank without tensors: CUDA context, libraries and NCCL's buffers, or interpreter and libraries."""
FLATTENED = 500_000_000
"""Most elements of gradients that stage 0 copies into one buffer for an all-reduce."""
NF4_BLOCK, SCALE_BLOCK = 64, 256


@dataclass(frozen=True)
class Term:
    """Memory of one kind, how it is computed, and the phases in which it is held.

    Attributes:
        name: what the memory holds.
        formula: its size in symbols.
        numbers: the formula with numbers.
        bytes: the result.
        phases: those of ``PHASES`` in which it is held.
    """

    name: str
    formula: str
    numbers: str
    bytes: int
    phases: frozenset[str] = STATIC


@dataclass(frozen=True)
class Zero:
    """The settings of a DeepSpeed configuration that decide about memory; sizes in elements.

    Attributes:
        stage: 0 to 3.
        offload_optimizer, offload_param: whether optimizer state and parameters are in host memory.
        bucket: size of a bucket of gradients that are reduced together.
        buckets: number of such buckets in memory.
        live: most parameters that stage 3 keeps gathered, including those fetched ahead.
    """

    stage: int
    offload_optimizer: bool
    offload_param: bool
    bucket: int
    buckets: int
    live: int

    @classmethod
    def of(cls, deepspeed: dict[str, Any]) -> "Zero":
        """From a resolved configuration."""
        zero = deepspeed["zero_optimization"]
        stage = zero["stage"]
        optimizer, param = (zero.get(key) or {} for key in ("offload_optimizer", "offload_param"))
        overlap = zero.get("overlap_comm", stage == 3)
        return cls(
            stage=stage,
            offload_optimizer=optimizer.get("device", "none") != "none",
            offload_param=param.get("device", "none") != "none",
            bucket=int(zero.get("reduce_bucket_size", 5e8)),
            buckets=2 if overlap and stage in (1, 2) else 1,
            live=int(zero.get("stage3_max_live_parameters", 1e9) + zero.get("stage3_prefetch_bucket_size", 5e7)),
        )


@dataclass(frozen=True)
class Rank:
    """Everything that the memory of a rank depends on.

    Attributes:
        sizes: numbers of parameters of the model.
        zero: how the model is partitioned.
        world_size: N.
        width: b, bytes of a weight.
        nf4, double_quantization: how the frozen linear layers are stored.
        reference_copy: whether there is a second, frozen model.
        cuda: whether the rank has a GPU.
        trace: the memory of one row.
        tokens: the tokens of that row.
    """

    sizes: Sizes
    zero: Zero
    world_size: int
    width: int
    nf4: bool
    double_quantization: bool
    reference_copy: bool
    cuda: bool
    trace: Trace
    tokens: int

    @property
    def shard(self) -> int:
        """S, the number of trainable parameters whose optimizer state is on this rank."""
        return self.sizes.trainable if self.zero.stage == 0 else -(-self.sizes.trainable // self.world_size)

    def device_terms(self) -> list[Term]:
        """The terms of a GPU's memory, or of the memory of a CPU rank."""
        size = FRAMEWORK["cuda" if self.cuda else "cpu"]
        framework = Term("framework", "assumed", f"{size / 2**30:.2f} GiB", size)
        return [*self._weights(), *self._optimizer(), *self._gradients(), *self._activations(), framework]

    def host_terms(self, ranks: int) -> list[Term]:
        """The terms of a node's host memory with ``ranks`` GPUs, while training and while loading."""
        zero, t, s = self.zero, self.sizes.trainable, self.shard
        terms = [_term("processes", "ranks x base", ranks, FRAMEWORK["cpu"])]
        if zero.offload_optimizer:
            formula = "ranks x (4S weights + 8S moments + 4S gradients)"
            terms.append(_term("optimizer, offloaded", formula, ranks, 16, s))
            terms.append(_term("gradients, offloaded", "ranks x bS", ranks, self.width, s))
        if zero.offload_param:
            for name in ("weights", "reference") if self.reference_copy else ("weights",):
                terms.append(_term(f"{name}, offloaded", "ranks x bP / N", ranks, self._part_of(self._weight_bytes)))
        # Under ZeRO-3 a rank reads only its part of every tensor, except with nf4, as packed tensors are not divided.
        parts = self.world_size if zero.stage == 3 and not self.nf4 else 1
        share = -(-(self.sizes.total - t) // parts) + -(-t // parts)
        formula = "ranks x bP" + (" / N" if parts > 1 else "")
        return [*terms, _term("loading, before weights move to the GPU", formula, ranks, self.width, share)]

    def _part_of(self, size: int) -> int:
        """A rank's part of ``size`` bytes, rounded up."""
        return -(-size // self.world_size)

    @property
    def _weight_bytes(self) -> int:
        return self.width * (self.sizes.total - self._packed) + self._packed_bytes

    @property
    def _packed(self) -> int:
        """Q, the weights in nf4."""
        return self.sizes.linear if self.nf4 else 0

    @property
    def _packed_bytes(self) -> int:
        """4 bits per weight and a scale per block: in fp32, or in 8 bits with one fp32 scale for 256 blocks."""
        blocks = self._packed // NF4_BLOCK
        return self._packed // 2 + (blocks + 4 * blocks // SCALE_BLOCK if self.double_quantization else 4 * blocks)

    def _weights(self) -> list[Term]:
        b, total, n = self.width, self.sizes.total, self.world_size
        partitioned = self.zero.stage == 3
        by_n, over_n = (" / N", f" / {n}") if partitioned else ("", "")
        in_host_memory = partitioned and self.zero.offload_param
        terms = []
        if not in_host_memory:
            bits = 8 * self._packed_bytes / max(1, self._packed)
            packed = f" + {_count(self._packed)} x {bits:.2f} bits" if self.nf4 else ""
            formula = ("b(P - Q) + nf4(Q)" if self.nf4 else "bP") + by_n
            numbers = f"({b} x {_count(total - self._packed)}{packed}){over_n}"
            held = self._part_of(self._weight_bytes) if partitioned else self._weight_bytes
            terms.append(Term("weights", formula, numbers, held))
        if partitioned and (n > 1 or in_host_memory):  # a single rank has all weights already and gathers none
            live = min(total, max(self.zero.live, self.sizes.largest))
            terms.append(_term("weights gathered by ZeRO-3", "b min(P, max(live, p))", b, live, phases=ROW))
        if self.nf4:
            terms.append(_term("largest layer, dequantized", "b max(Q)", b, self.sizes.largest_linear, phases=ROW))
        if self.reference_copy and not in_host_memory:
            size = self._part_of(b * total) if partitioned else b * total
            formula = "bP" + (by_n if n > 1 else "")
            terms.append(Term("frozen reference", formula, f"{b} x {_count(total)}{over_n}", size))
        return terms

    def _optimizer(self) -> list[Term]:
        s, stage, b = self.shard, self.zero.stage, self.width
        symbol = "T" if stage == 0 else "S"
        if self.zero.offload_optimizer:
            # The shard passes through buffers of the size of the largest parameter.
            return [_term("offload buffers", "b max(p)", b, self.sizes.largest_trained)]
        moments = _term("AdamW's two moments", f"8{symbol}", 8, s)
        # AdamW on the CPU makes two temporary tensors of the size of one parameter; on CUDA it makes one of the size of
        # all parameters together.
        if stage == 0 and b == 4:
            name = "AdamW's working set"
            if self.cuda:
                return [moments, _term(name, "4T", 4, s, phases=STEP)]
            return [moments, _term(name, "8 max(p)", 8, self.sizes.largest_trained, phases=STEP)]
        # ZeRO keeps its own fp32 copy of the weights, even where the weights are fp32.
        own, temporary = 4 * s, (4 if self.cuda else 8) * s
        flatten = (0 if stage == 3 else 2 * b * s) + (4 * s if b != 4 else 0)
        size = max(own + temporary, flatten)
        formula = f"max({'4 + 4' if self.cuda else '4 + 8'}, flattening) {symbol}"
        numbers = f"{size / max(1, s):.0f} x {_count(s)}"
        working = Term("fp32 gradients and AdamW's working set", formula, numbers, size, STEP)
        return [_term("fp32 weights", f"4{symbol}", 4, s), moments, working]

    def _gradients(self) -> list[Term]:
        b, t, stage, bucket = self.width, self.sizes.trainable, self.zero.stage, self.zero.bucket
        if stage == 0:
            name = "gradients copied together for the all-reduce"
            copied = _term(name, "b min(T, bucket)", b, min(t, FLATTENED), phases=REDUCE)
            return [_term("gradients", "bT", b, t), copied]
        held, before_step = min(t, bucket), STATIC if stage == 3 else ROW | REDUCE
        terms = []
        if not self.zero.offload_optimizer:
            terms.append(_term("gradients, this rank's part", "bS", b, self.shard, phases=before_step))
        if self.cuda:
            formula = "b x buckets x bucket"
            terms.append(_term("gradient bucket", formula, b, self.zero.buckets, bucket, phases=before_step))
        else:  # on a CPU unwritten pages take no memory; under stages 1 and 2 the trace counts the bucket as it fills
            name, phases = "gradient bucket, as far as it fills", STATIC if stage == 3 else REDUCE
            terms.append(_term(name, "b min(T, bucket)", b, held, phases=phases))
        phases = REDUCE if t <= bucket else ROW | REDUCE
        return [*terms, _term("bucket flattened for the collective", "b min(T, bucket)", b, held, phases=phases)]

    def _activations(self) -> list[Term]:
        saved, working = self.trace.saved, self.trace.peak - self.trace.saved
        numbers = f"{saved / self.tokens / 1024:.1f} KiB x {self.tokens}"
        return [
            Term("activations kept for the backward pass", "a x tokens", numbers, saved, ROW),
            Term("working set of the pass, log-prob chunk included", "peak - kept", "traced", working, ROW),
        ]


def phase_bytes(terms: Sequence[Term]) -> dict[str, int]:
    """Bytes in each phase."""
    return {phase: sum(t.bytes for t in terms if phase in t.phases) for phase in PHASES}


def peak_bytes(terms: Sequence[Term]) -> int:
    """Bytes of the largest phase."""
    return max(phase_bytes(terms).values())


def _term(name: str, formula: str, *factors: int, phases: frozenset[str] = STATIC) -> Term:
    """The product of ``factors``."""
    return Term(name, formula, " x ".join(map(_count, factors)), prod(factors), phases)


def _count(n: float) -> str:
    """A number for people, such as 8.03 G."""
    for unit, name in ((1e9, "G"), (1e6, "M")):
        if n >= unit:
            return f"{n / unit:.2f} {name}"
    return f"{n:,.0f}"
