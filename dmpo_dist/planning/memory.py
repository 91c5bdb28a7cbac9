"""Bytes of one rank, term by term, in the three phases of a step; each term is what DeepSpeed 0.19 allocates.

``micro_batch``  forward and backward of a row, gradients of the rows before it already there.
``reduce``       gradients averaged over the ranks, activations gone.
``step``         the optimizer.

The peak is the largest phase. Symbols: b bytes of a weight, P all parameters, T trainable, Q frozen in nf4,
p one parameter, N ranks, S = T / N a shard, a bytes kept for a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dmpo_dist.planning.model import Sizes
from dmpo_dist.planning.trace import Trace

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
PHASES = ("micro_batch", "reduce", "step")
STATIC = frozenset(PHASES)
FRAMEWORK = {"cuda": 3 * 2**29, "cpu": 3 * 2**28}
"""Assumed bytes of a rank before any tensor: CUDA context, libraries and NCCL's buffers; or interpreter and libraries."""
FLATTENED = 500_000_000
"""Gradients that stage 0 copies together for one all-reduce."""
NF4_BLOCK, SCALE_BLOCK = 64, 256


@dataclass(frozen=True)
class Term:
    """Some bytes, how they come about, and when they are there.

    Attributes:
        name: what they hold.
        formula: in symbols.
        numbers: the same in numbers.
        bytes: the result.
        phases: of ``PHASES``.
    """

    name: str
    formula: str
    numbers: str
    bytes: int
    phases: frozenset[str] = STATIC


@dataclass(frozen=True)
class Zero:
    """What a DeepSpeed configuration says of memory; sizes in elements.

    Attributes:
        stage: 0 to 3.
        offload_optimizer, offload_param: whether these lie in host memory.
        bucket: of gradients that are reduced together; ``buckets`` of them.
        live: parameters that stage 3 keeps gathered at most, with those fetched ahead.
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

        def offloads(what: str) -> bool:
            return (zero.get(what) or {}).get("device", "none") != "none"

        overlap = zero.get("overlap_comm", stage == 3)
        return cls(
            stage=stage,
            offload_optimizer=offloads("offload_optimizer"),
            offload_param=offloads("offload_param"),
            bucket=int(zero.get("reduce_bucket_size", 5e8)),
            buckets=2 if overlap and stage in (1, 2) else 1,
            live=int(zero.get("stage3_max_live_parameters", 1e9) + zero.get("stage3_prefetch_bucket_size", 5e7)),
        )


@dataclass(frozen=True)
class Rank:
    """All that decides a rank's memory.

    Attributes:
        sizes: of the model.
        zero: how it is partitioned.
        world_size: N.
        width: b, bytes of a weight.
        nf4, double_quantization: how the frozen linear layers are stored.
        reference_copy: a second, frozen model.
        cuda: GPU or CPU.
        trace: of one row.
        tokens: of that row.
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
        """S, trainable parameters whose optimizer state a rank holds."""
        return -(-self.sizes.trainable // self._parts)

    @property
    def _parts(self) -> int:
        return 1 if self.zero.stage == 0 else self.world_size

    def device_terms(self) -> list[Term]:
        """What lies in the memory of the GPU, or of a CPU rank."""
        return [*self._weights(), *self._optimizer(), *self._gradients(), *self._activations(), self._framework()]

    def host_terms(self, ranks: int) -> list[Term]:
        """What a node with ``ranks`` GPUs holds in host memory while training, and while loading."""
        zero, t, s = self.zero, self.sizes.trainable, self.shard
        terms = [_term("processes", "ranks x base", ranks, FRAMEWORK["cpu"])]
        if zero.offload_optimizer:
            terms.append(
                _term("optimizer, offloaded", "ranks x (4S weights + 8S moments + 4S gradients)", ranks, 16, s)
            )
            terms.append(_term("gradients, offloaded", "ranks x bS", ranks, self.width, s))
        if zero.offload_param:
            terms.append(
                _term("weights, offloaded", "ranks x bP / N", ranks, -(-self._weight_bytes() // self.world_size))
            )
            if self.reference_copy:
                terms.append(
                    _term("reference, offloaded", "ranks x bP / N", ranks, -(-self._weight_bytes() // self.world_size))
                )
        parts = self.world_size if zero.stage == 3 and not self.nf4 else 1
        share = -(-(self.sizes.total - t) // parts) + -(-t // parts)
        terms.append(
            _term(
                "loading, before weights move to the GPU",
                "ranks x bP" + (" / N" if parts > 1 else ""),
                ranks,
                self.width,
                share,
            )
        )
        return terms

    def _weight_bytes(self) -> int:
        return self.width * (self.sizes.total - self._packed) + self._packed_bytes

    @property
    def _packed(self) -> int:
        """Q."""
        return self.sizes.linear if self.nf4 else 0

    @property
    def _packed_bytes(self) -> int:
        """4 bits a weight and a scale a block: in fp32, or in 8 bits with a scale of their own a block of 256."""
        blocks = self._packed // NF4_BLOCK
        return self._packed // 2 + (blocks + 4 * blocks // SCALE_BLOCK if self.double_quantization else 4 * blocks)

    def _weights(self) -> list[Term]:
        b, total, n = self.width, self.sizes.total, self.world_size
        terms = []
        partitioned = self.zero.stage == 3
        if not (partitioned and self.zero.offload_param):
            plain = total - self._packed
            packed = (
                f" + {_count(self._packed)} x {8 * self._packed_bytes / max(1, self._packed):.2f} bits"
                if self.nf4
                else ""
            )
            over = f" / {n}" if partitioned else ""
            formula = ("b(P - Q) + nf4(Q)" if self.nf4 else "bP") + (" / N" if partitioned else "")
            numbers = f"({b} x {_count(plain)}{packed}){over}"
            held = self._weight_bytes()
            terms.append(Term("weights", formula, numbers, -(-held // n) if partitioned else held))
        if partitioned and (n > 1 or self.zero.offload_param):  # alone a rank has all weights at hand
            live = min(total, max(self.zero.live, self.sizes.largest))
            terms.append(
                Term(
                    "weights gathered by ZeRO-3",
                    "b min(P, max(live, p))",
                    f"{b} x {_count(live)}",
                    b * live,
                    frozenset(PHASES[:1]),
                )
            )
        if self.nf4:
            largest = self.sizes.largest_linear
            terms.append(
                Term(
                    "largest layer, dequantized",
                    "b max(Q)",
                    f"{b} x {_count(largest)}",
                    b * largest,
                    frozenset(PHASES[:1]),
                )
            )
        if self.reference_copy and not (partitioned and self.zero.offload_param):
            over, parts = (f" / {n}", n) if partitioned else ("", 1)
            terms.append(
                Term(
                    "frozen reference",
                    "bP" + (" / N" if parts > 1 else ""),
                    f"{b} x {_count(total)}{over}",
                    -(-b * total // parts),
                )
            )
        return terms

    def _optimizer(self) -> list[Term]:
        s, stage, b = self.shard, self.zero.stage, self.width
        shard = "T" if stage == 0 else "S"
        if self.zero.offload_optimizer:
            # the shard comes and goes through buffers of the largest parameter
            return [_term("offload buffers", "b max(p)", b, self.sizes.largest_trained)]
        terms = [_term("AdamW's two moments", f"8{shard}", 8, s)]
        if stage or b != 4:  # ZeRO keeps its own even of fp32 weights
            terms.insert(0, _term("fp32 weights", f"4{shard}", 4, s))
        # AdamW on the CPU makes two tensors of a parameter's size at a time, on CUDA one for all parameters
        if stage == 0 and b == 4:
            if self.cuda:
                work = [_term("AdamW's working set", "4T", 4, s)]
            else:
                work = [_term("AdamW's working set", "8 max(p)", 8, self.sizes.largest_trained)]
        else:
            own, temporary = 4 * s, (4 if self.cuda else 8) * s
            flatten = (0 if stage == 3 else 2 * b * s) + (4 * s if b != 4 else 0)
            size = max(own + temporary, flatten)
            formula = f"max({'4 + 4' if self.cuda else '4 + 8'}, flattening) {shard}"
            work = [
                Term("fp32 gradients and AdamW's working set", formula, f"{size / max(1, s):.0f} x {_count(s)}", size)
            ]
        return terms + [Term(w.name, w.formula, w.numbers, w.bytes, frozenset(("step",))) for w in work]

    def _gradients(self) -> list[Term]:
        b, t, s, stage, bucket = self.width, self.sizes.trainable, self.shard, self.zero.stage, self.zero.bucket
        early, reduce = frozenset(PHASES[:2]), frozenset(("reduce",))
        if stage == 0:
            return [
                _term("gradients", "bT", b, t),
                _term(
                    "gradients copied together for the all-reduce",
                    "b min(T, bucket)",
                    b,
                    min(t, FLATTENED),
                    phases=reduce,
                ),
            ]
        held = min(t, bucket)
        terms = []
        if not self.zero.offload_optimizer:
            terms.append(_term("gradients, this rank's part", "bS", b, s, phases=STATIC if stage == 3 else early))
        if self.cuda:
            when = STATIC if stage == 3 else early
            terms.append(_term("gradient bucket", "b x buckets x bucket", b, self.zero.buckets, bucket, phases=when))
        else:  # pages nobody writes to take no memory; those of a bucket are counted in the trace as they fill
            terms.append(
                _term(
                    "gradient bucket, as far as it fills",
                    "b min(T, bucket)",
                    b,
                    held,
                    phases=STATIC if stage == 3 else reduce,
                )
            )
        terms.append(
            _term(
                "bucket flattened for the collective",
                "b min(T, bucket)",
                b,
                held,
                phases=reduce if t <= bucket else early,
            )
        )
        return terms

    def _activations(self) -> list[Term]:
        trace, tokens = self.trace, self.tokens
        each = trace.saved / tokens
        first = frozenset(PHASES[:1])
        return [
            Term(
                "activations kept for the backward pass",
                "a x tokens",
                f"{each / 1024:.1f} KiB x {tokens}",
                trace.saved,
                first,
            ),
            Term(
                "working set of the pass, log-prob chunk included",
                "peak - kept",
                "traced",
                trace.peak - trace.saved,
                first,
            ),
        ]

    def _framework(self) -> Term:
        size = FRAMEWORK["cuda" if self.cuda else "cpu"]
        return Term("framework", "assumed", f"{size / 2**30:.2f} GiB", size)


def phase_bytes(terms: Sequence[Term]) -> dict[str, int]:
    """Bytes in each phase."""
    return {phase: sum(t.bytes for t in terms if phase in t.phases) for phase in PHASES}


def peak_bytes(terms: Sequence[Term]) -> int:
    """Bytes of the largest phase."""
    return max(phase_bytes(terms).values())


def _term(name: str, formula: str, *factors: int, phases: frozenset[str] = STATIC) -> Term:
    """The product of ``factors``."""
    size = 1
    for factor in factors:
        size *= factor
    return Term(name, formula, " x ".join(_count(f) for f in factors), size, phases)


def _count(n: float) -> str:
    """A number as people read it: 8.03 G."""
    for unit, name in ((1e9, "G"), (1e6, "M")):
        if n >= unit:
            return f"{n / unit:.2f} {name}"
    return f"{n:,.0f}"
