"""What a run checks of itself: shared prompts before the first step, the first loss, and that figures stay finite."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dmpo_dist.batching.layout import prefix_layout
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.scoring import score_rows
from dmpo_dist.modeling.self_check import confirmed, disagreement, probe
from dmpo_dist.objectives.groups import Groups
from dmpo_dist.objectives.likelihood import widen
from dmpo_dist.objectives.loss import Loss
from dmpo_dist.training.groups import Batches
from dmpo_dist.training.job import Job
from dmpo_dist.training.runtime import Runtime

STEP = 1e-2
"""Nats by which the slope of a loss is measured."""


def check_shared_prompts(job: Job, runtime: Runtime, engine: Any, batches: Batches, device: torch.device) -> None:
    """Compare log-probs behind shared prompts with separate rows: the longest prompt of all groups and, beside it in
    one row, the shortest. All ranks run the same groups.

    Raises:
        UserError: they differ by more than rounding.
    """
    if not (batches.shared and job.config.train.self_check):
        return
    few = probe(batches.groups, batches.token_budget)
    error = 0.0

    @torch.no_grad()
    def compare(dtype: torch.dtype) -> str | None:
        nonlocal error
        fused = [engine(prefix_layout(few).to(device)).double().cpu().numpy()]
        separate = [score_rows(engine, group, batches.token_budget, device) for group in few]
        error = np.abs(np.concatenate(fused) - np.concatenate(separate)).max()
        return disagreement(fused, separate, dtype)

    can_widen = not engine.zero_optimization_partition_weights() and job.config.model.quantization == "none"
    found = confirmed(compare, engine, getattr(torch, job.config.model.dtype), can_widen)
    if found is not None:
        raise UserError(
            f"a shared prompt {found} on this model; set model.attention=unshared, and please report the model type"
        )
    runtime.log({"kind": "note", "text": f"shared prompt against separate rows: {error:.1e} nats apart at most"})


class FirstLoss:
    """While the policy is the reference, the loss has a known value; another one means that they differ."""

    def __init__(self, job: Job, loss: Loss, device: torch.device) -> None:
        self._job, self._loss = job, loss
        self._known = torch.zeros(2, dtype=torch.float64, device=device)  # sums over groups: the loss, and its slope
        self._is_known = False

    def count(self, policy: Tensor, groups: Groups) -> None:
        """Add a micro-batch of the first step."""
        initial = self._loss.initial(policy.detach(), groups)  # (G,)
        if initial is not None:
            self._known += torch.stack([initial.sum(), self._slope(policy.detach(), groups)])
            self._is_known = True

    def check(self, line: Mapping[str, Any], groups: int, runtime: Runtime) -> None:
        """Compare the first log line with what was counted on all ranks, over the ``groups`` of the step.

        Raises:
            UserError: the loss is another one.
        """
        if not self._is_known:
            if self._job.kind == "preference":
                why = "has no known one" if self._loss.needs_reference else "is reference-free here"
                text = f"the first loss is not checked: {self._job.config.objective.name} {why}"
                runtime.log({"kind": "note", "text": text})
            return
        if not self._job.config.train.self_check:
            return
        dist.all_reduce(self._known)
        seen, (known, slope) = line.get("preference_loss", line["loss"]), (self._known / groups).tolist()
        # Two forwards of one network may differ in the last bits of a log-prob, which the loss scales: dmpo by beta,
        # ipo by 2 / beta.
        exact = self._job.config.model.dtype == "float32"
        tolerance = (1e-4 if exact else 2e-2) * max(1.0, slope)
        if not abs(seen - known) <= tolerance:
            raise UserError(
                f"the first preference loss is {seen:.6f}, but must be {known:.6f} while the policy equals the "
                "reference; policy and reference are not the same network (please report this with the run's "
                "config.yaml), or set train.self_check=false to go on regardless"
            )
        runtime.log({"kind": "note", "text": f"first preference loss {seen:.6f}, as it must be ({known:.6f})"})

    @torch.no_grad()
    def _slope(self, policy: Tensor, groups: Groups) -> Tensor:
        """What the loss, summed over groups, changes for each nat by which the reference errs in favour of all
        positives and against all others.

        The reference is moved and not the policy, because the likelihood term and the choice of negatives depend on
        the policy alone and cancel.
        """
        if not self._loss.needs_reference:
            return policy.new_zeros(())
        same = widen(policy)
        error = STEP * torch.where(groups.negative, -1.0, 1.0)  # (N,)
        history = same.new_zeros(groups.count) if self._loss.scores_history else None
        above, below = (self._loss(policy, same + sign * error, groups, history)[0] for sign in (1, -1))
        return (above - below).abs() / (2 * STEP)


def require_finite(line: Mapping[str, Any], job: Job) -> None:
    """Stop a diverged run; under fp16 an overflowing gradient is normal, DeepSpeed skips that step.

    Raises:
        UserError: the loss or the gradient norm of a log line is not finite.
    """
    loss, norm = line["loss"], line["grad_norm"]
    bad_norm = norm is not None and not math.isfinite(norm) and job.config.model.dtype != "float16"
    if bad_norm or not math.isfinite(loss):
        what = f"gradient norm became {norm}" if math.isfinite(loss) else f"loss became {loss}"
        raise UserError(
            f"the {what} by step {line['step']}; lower {job.section}.learning_rate (now {job.stage.learning_rate:g}) "
            f"or {job.section}.max_grad_norm, or train in float32; what was saved before stays in {job.output}"
        )
