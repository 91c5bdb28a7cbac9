"""The training loop: plan, log-probs, objective, exact global mean, step."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from dmpo_dist.artifacts.files import replace_folder
from dmpo_dist.batching.layout import Layout, prefix_layout, rows_layout
from dmpo_dist.batching.plan import MicroBatch, Step
from dmpo_dist.config import StageConfig
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.errors import UserError
from dmpo_dist.objectives import Objective, sft_loss
from dmpo_dist.training.busy import Stopwatch
from dmpo_dist.training.checkpoint import load_state, save_model, save_state
from dmpo_dist.training.engine import set_learning_rate
from dmpo_dist.training.groups import Batches, ahead
from dmpo_dist.training.job import Job
from dmpo_dist.training.metrics import Meter
from dmpo_dist.training.reference import Reference
from dmpo_dist.training.runtime import Runtime
from dmpo_dist.training.validation import rank_with_all

SFT_SUMS = ("loss", "logp_positive")
PREFERENCE_SUMS = (
    "loss", "preference_loss", "initial_loss", "margin", "accuracy", "reward_accuracy", "logp_positive",
    "logp_negative", "negatives",
)  # fmt: skip
COUNTS = ("groups", "physical_tokens", "logical_tokens")


@dataclass
class Trainer:
    """Everything a rank trains with.

    Attributes:
        objective: None for SFT.
        reference: log-probs of the frozen reference; None where none is needed.
        shared: whether prompts are shared in a row.
        stage3: whether parameters are partitioned.
        phases: entered around the reference, policy, backward and optimizer part of a step; a benchmark puts its own.
    """

    job: Job
    runtime: Runtime
    device: torch.device
    engine: Any
    tokenizer: Any
    objective: Objective | None
    reference: Reference | None
    batches: Batches
    validation: list[TokenGroup]
    shared: bool
    stage3: bool
    best: dict[str, float] = field(default_factory=dict)
    phases: Callable[[str], AbstractContextManager[None]] = field(init=False)

    def __post_init__(self) -> None:
        self.stage: StageConfig = self.job.stage
        self.total_steps = total_steps(self.stage, self.batches)
        self._meter = Meter(self.device)
        self._watch = Stopwatch(self.device)
        self.phases = self._watch.phase

    def fit(self) -> None:
        """Train to the last step and leave the result in ``output/model``."""
        first = self._resume()
        if first == 0:
            self._self_check()
            self._validate(0)
        self._watch.lap()  # what came before is not training
        for index, (step, work) in enumerate(ahead(self.prepare, first, self.total_steps), start=first):
            self.train_step(index, step, work)
            done = index + 1
            if index == 0 or done % self.stage.log_every == 0 or done == self.total_steps:
                self._log(index, step)
            if done % self.stage.validate_every == 0 or done == self.total_steps:
                with self._watch.paused():
                    self._validate(done)
            if done % self.stage.checkpoint_every == 0 and done < self.total_steps:
                with self._watch.paused():
                    self._checkpoint(done)
        self._finish()

    def prepare(self, index: int) -> tuple[Step, list[tuple[MicroBatch, Layout]]]:
        """Step ``index`` and this rank's micro-batches of it, laid out; runs in a thread of its own."""
        step = self.batches.step(index)
        cuda = self.device.type == "cuda"
        layouts = ((m, self.batches.layout(m, step.epoch)) for m in step.micro_batches[self.runtime.rank])
        return step, [(m, layout.pinned() if cuda else layout) for m, layout in layouts]

    def train_step(self, index: int, step: Step, work: list[tuple[MicroBatch, Layout]]) -> None:
        """Accumulate a step's micro-batches, then update the weights once."""
        phase = self.phases
        set_learning_rate(self.engine, learning_rate(index, self.total_steps, self.stage))
        for micro_batch, host_layout in work:
            layout = host_layout.to(self.device)
            with phase("reference"), torch.no_grad():
                reference = self.reference(layout, micro_batch.groups, step.epoch) if self.reference else None
            with phase("policy"):
                loss_sum, sums = self.loss(layout, self.engine(layout), reference)
            weight = 0.0 if micro_batch.filler else self.runtime.world_size / len(step.groups)
            with phase("backward"):
                self.engine.backward(loss_sum * weight, scale_wrt_gas=False)  # exact mean over the global batch
            if not micro_batch.filler:
                counts = (layout.targets.n_groups, layout.physical_tokens, layout.logical_tokens)
                self._meter.update(sums, dict(zip(COUNTS, counts, strict=True)))
        with phase("optimizer"):
            self.engine.step()

    def loss(self, layout: Layout, log_probs: Tensor, reference: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective, or SFT's, summed over the groups of ``layout``, and the sums worth watching."""
        targets = layout.targets
        policy, history = targets.split(log_probs)
        where = (
            targets.response_lengths, targets.group_id, targets.is_positive, torch.ones_like(targets.is_positive),
            targets.n_groups, (history, targets.history_lengths),
        )  # fmt: skip
        if self.objective is None:
            return sft_loss(policy, *where)
        return self.objective(policy, reference, *where)

    def _log(self, index: int, step: Step) -> None:
        """Reduce what the meter gathered; every rank calls it, rank 0 writes."""
        names = SFT_SUMS if self.objective is None else PREFERENCE_SUMS
        elapsed, busy = self._watch.lap()
        sums, busy_of_ranks = self._meter.reduce((*names, *COUNTS), busy)
        slowest = max(busy_of_ranks)
        means = {name: sums[name] / sums["groups"] for name in names}
        norm = self.engine.get_global_grad_norm()
        self._require_finite(index, means["loss"], None if norm is None else float(norm))
        if index == 0 and self.objective is not None:
            self._check_first_loss(means)
        record = {
            "kind": "step",
            "stage": self.job.kind,
            "step": index + 1,
            "total_steps": self.total_steps,
            **{name: value for name, value in means.items() if name != "initial_loss"},
            "learning_rate": learning_rate(index, self.total_steps, self.stage),
            "grad_norm": None if norm is None else float(norm),
            "groups_per_second": sums["groups"] / elapsed,
            "tokens_per_second": sums["physical_tokens"] / elapsed,
            "reuse": sums["logical_tokens"] / sums["physical_tokens"],
            "imbalance": step.imbalance,
            "slowest_rank": busy_of_ranks.index(slowest),
            "slowest_share": slowest * len(busy_of_ranks) / sum(busy_of_ranks),
            "memory_gib": memory_gib(self.device),
        }
        if self.runtime.rank == 0:
            self.runtime.log(record)

    def _require_finite(self, index: int, loss: float, norm: float | None) -> None:
        """Stop a diverged run; under fp16 an overflowing gradient is normal, DeepSpeed skips that step."""
        bad_norm = norm is not None and not math.isfinite(norm) and self.job.config.model.dtype != "float16"
        if bad_norm or not math.isfinite(loss):
            section = self.job.kind
            what = f"gradient norm became {norm}" if math.isfinite(loss) else f"loss became {loss}"
            raise UserError(
                f"the {what} by step {index + 1}; lower {section}.learning_rate (now "
                f"{self.stage.learning_rate:g}) or {section}.max_grad_norm, or train in float32; "
                f"what was saved before stays in {self.job.output}"
            )

    def _check_first_loss(self, means: dict[str, float]) -> None:
        """While the policy is the reference, the loss has a known value; another one means they differ."""
        assert self.objective is not None
        if not self.objective.needs_reference:
            self._note(f"the first loss is not checked: {self.objective.name} is reference-free here")
            return
        if not self.job.config.train.self_check:
            return
        seen, known = means["preference_loss"], means["initial_loss"]
        tolerance = 1e-4 if self.job.config.model.dtype == "float32" else 2e-2 * max(1.0, self.objective.beta)
        if abs(seen - known) > tolerance:
            raise UserError(
                f"the first preference loss is {seen:.6f}, but must be {known:.6f} while the policy equals the "
                "reference; policy and reference are not the same network (please report this with the run's "
                "config.yaml), or set train.self_check=false to go on regardless"
            )
        self._note(f"first preference loss {seen:.6f}, as it must be ({known:.6f})")

    def _self_check(self) -> None:
        """Compare one group's shared-prompt log-probs with separate rows; all ranks run the same group."""
        if not (self.shared and self.job.config.train.self_check):
            return
        step = self.batches.step(0)
        groups = [self.batches.group(g, step.epoch) for g in step.groups[:64]]
        group = max(groups, key=lambda g: len(g.prefix))
        with torch.no_grad():
            fused = self.engine(prefix_layout([group]).to(self.device)).double()
            separate = self.engine(rows_layout([group]).to(self.device)).double()
        error = (fused - separate).abs().max().item()
        exact = self.job.config.model.dtype == "float32"
        tolerance = 1e-4 + 1e-5 * separate.abs().max().item() if exact else 0.25
        if not error <= tolerance:
            raise UserError(
                f"the shared-prompt forward differs from separate rows by {error:.2g} nats on this model; "
                "set model.attention=unshared, and please report the model type"
            )
        self._note(f"shared prompt against separate rows: {error:.1e} nats apart at most")

    def _validate(self, done: int) -> None:
        metrics = rank_with_all(
            self.engine, self.validation, self.runtime.rank, self.runtime.world_size, self.batches.token_budget,
            self.shared, self.device,
        )  # fmt: skip
        if metrics and done and self._improved(done, metrics) and self.stage.select == "best":
            self._save(self.job.output / "best", {"step": done, **metrics})
        if metrics and self.runtime.rank == 0:
            self.runtime.log({"kind": "validation", "step": done, **metrics})

    def _improved(self, done: int, metrics: dict[str, float]) -> bool:
        value = metrics[self.stage.select_metric]
        if self.best and value <= self.best["value"]:
            return False
        self.best = {"value": value, "step": done}
        return True

    def _checkpoint(self, done: int) -> None:
        state = {"step": done, "best": self.best}
        self.runtime.save(done, lambda folder: save_state(self.engine, folder, state))
        if self.runtime.rank == 0:
            self.runtime.log({"kind": "checkpoint", "step": done})

    def _resume(self) -> int:
        with self.runtime.restore() as folder:
            if folder is None:
                return 0
            state = load_state(self.engine, folder)
        self.best = state["best"]
        self._note(f"resumed from step {state['step']}")
        return state["step"]

    def _finish(self) -> None:
        """The selected weights become ``output/model``."""
        best = self.job.output / "best"
        if self.stage.select == "best" and self.best:
            if self.runtime.rank == 0 and best.exists():
                replace_folder(best, self.job.output / "model")
            dist.barrier()
            step = int(self.best["step"])
        else:
            step = self.total_steps
            self._save(self.job.output / "model", {"step": step})
        if self.runtime.rank == 0:
            self.runtime.log({"kind": "end", "selected_step": step, "model": str(self.job.output / "model")})

    def _save(self, folder: Path, facts: dict[str, Any]) -> None:
        save_model(self.engine.module, self.tokenizer, folder, self.job, facts, self.stage3)

    def _note(self, text: str) -> None:
        if self.runtime.rank == 0:
            self.runtime.log({"kind": "note", "text": text})


def total_steps(stage: StageConfig, batches: Batches) -> int:
    """Optimizer steps of a stage."""
    return stage.steps or max(1, round(stage.epochs * batches.schedule.steps_per_epoch))


def learning_rate(index: int, total: int, stage: StageConfig) -> float:
    """Learning rate of step ``index`` (from 0) of ``total``: linear warm-up from 0, then the schedule down to 0."""
    warmup = round(stage.warmup_ratio * total)
    if index < warmup:
        return stage.learning_rate * (index + 1) / (warmup + 1)
    progress = (index - warmup) / max(1, total - warmup)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return stage.learning_rate * factor[stage.schedule]


def memory_gib(device: torch.device) -> float:
    """Peak GPU memory of this rank, or its resident memory on the CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30
