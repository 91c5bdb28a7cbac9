"""The training loop: reference and policy log-probs, loss, exact mean over the global batch, optimizer step."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from dmpo_dist.batching.layout import Layout
from dmpo_dist.batching.plan import MicroBatch, Step
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.objectives.loss import Loss
from dmpo_dist.training.busy import Stopwatch
from dmpo_dist.training.checkpoint import resume, save_checkpoint
from dmpo_dist.training.checks import FirstLoss, check_shared_prompts, require_finite
from dmpo_dist.training.engine import set_learning_rate
from dmpo_dist.training.groups import Batches, ahead, groups_of
from dmpo_dist.training.job import Job
from dmpo_dist.training.log_lines import LogLines
from dmpo_dist.training.on_policy import OnPolicy
from dmpo_dist.training.reference import Reference
from dmpo_dist.training.runtime import Runtime
from dmpo_dist.training.schedule import learning_rate, total_steps
from dmpo_dist.training.selection import Selection

Work = list[tuple[MicroBatch, Layout]]
"""One rank's micro-batches of a step, laid out."""


@dataclass
class Trainer:
    """Everything a rank trains with.

    Attributes:
        loss: what is minimised; SFT's likelihood or a preference objective.
        reference: log-probs of the frozen reference; None where the loss needs none.
        validation: token groups of the validation requests, positive first.
        on_policy: makes the groups of ``batches`` where negatives come from the model itself.
        phases: entered around the reference, policy, backward and optimizer part of a step; a benchmark puts its own.
    """

    job: Job
    runtime: Runtime
    device: torch.device
    engine: Any
    tokenizer: Any
    loss: Loss
    reference: Reference | None
    batches: Batches
    validation: list[TokenGroup]
    on_policy: OnPolicy | None = None
    phases: Callable[[str], AbstractContextManager[None]] = field(init=False)

    def __post_init__(self) -> None:
        self.stage = self.job.stage
        self.total_steps = total_steps(self.stage, self.batches.schedule)
        self.watch = Stopwatch(self.device)
        self.phases = self.watch.phase
        self.log_lines = LogLines(self.job, self.loss, self.engine, self.watch, self.total_steps, self.device)
        self.first_loss = FirstLoss(self.job, self.loss, self.device)
        self.selection = Selection(
            self.job, self.runtime, self.engine, self.tokenizer, self.batches, self.validation, self.device
        )

    def fit(self) -> None:
        """Train to the last step and leave the selected weights in ``output/model``."""
        first, best, drawn = resume(self.runtime, self.engine, self.job, self.selection.lost)
        if self.on_policy:
            self.on_policy.restore(drawn)
        if first:
            self.selection.resume(first, best)
        else:
            check_shared_prompts(self.job, self.runtime, self.engine, self.batches, self.device)
            self.selection.validate(0)
        self.watch.lap()  # what came before is not training
        for index, (step, work) in enumerate(self.steps(first), start=first):
            self.train_step(index, step, work)
            done, last = index + 1, index + 1 == self.total_steps
            if index == 0 or last or done % self.stage.log_every == 0:
                line = self.log_lines.reduce(index, step, *([self.on_policy.spent] if self.on_policy else []))
                require_finite(line, self.job)
                if index == 0:
                    self.first_loss.check(line, len(step.groups), self.runtime)
                self.runtime.log(line)
            if last or done % self.stage.validate_every == 0:
                with self.watch.paused():
                    self.selection.validate(done)
            if not last and done % self.stage.checkpoint_every == 0:
                with self.watch.paused():
                    drawn = self.on_policy.state(done) if self.on_policy else None
                    save_checkpoint(self.runtime, self.engine, self.job, done, self.selection.best, drawn)
        self.selection.finish(self.total_steps)

    def steps(self, first: int) -> Iterator[tuple[Step, Work]]:
        """The steps from ``first`` to the last, each prepared while the one before is trained on."""
        if self.on_policy is None:
            yield from ahead(self.prepare, first, self.total_steps)
            return
        for start, end in self.on_policy.stretches(first, self.total_steps):
            self.on_policy.begin(start, end)  # by the weights as they are now
            yield from ahead(self.prepare, start, end)

    def prepare(self, index: int) -> tuple[Step, Work]:
        """Step ``index`` and this rank's micro-batches of it, laid out; runs in a thread of its own."""
        step = self.batches.step(index)
        cuda = self.device.type == "cuda"
        layouts = ((m, self.batches.layout(m, step.epoch)) for m in step.micro_batches[self.runtime.rank])
        return step, [(m, layout.pinned() if cuda else layout) for m, layout in layouts]

    def train_step(self, index: int, step: Step, work: Work) -> None:
        """Accumulate a step's micro-batches, then update the weights once; N responses in G groups a micro-batch."""
        phase = self.phases
        set_learning_rate(self.engine, learning_rate(index, self.total_steps, self.stage))
        for micro_batch, host_layout in work:
            layout = host_layout.to(self.device)
            groups = groups_of(layout.targets)
            with phase("reference"), torch.no_grad():
                reference = self.reference(layout, micro_batch.groups, step.epoch) if self.reference else None  # (N,)
            with phase("policy"):
                policy, history = layout.targets.split(self.engine(layout))  # (N,), and (G,) where histories are scored
                loss_sum, sums = self.loss(policy, reference, groups, history)
            # ZeRO averages gradients over ranks, and a rank may hold any share of the step's groups: scaled so, what is
            # accumulated is the exact mean over the global batch. A filler only keeps ranks in step.
            weight = 0.0 if micro_batch.filler else self.runtime.world_size / len(step.groups)
            with phase("backward"):
                self.engine.backward(loss_sum * weight, scale_wrt_gas=False)
            if not micro_batch.filler:
                self.log_lines.count(layout, sums)
                if index == 0:
                    self.first_loss.count(policy, groups)
        with phase("optimizer"):
            self.engine.step()
