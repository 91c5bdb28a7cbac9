"""How many steps a stage has, and the learning rate of each: pure functions of the step, so that nothing has state."""

import math

from dmpo_dist.batching.plan import Schedule
from dmpo_dist.config import StageConfig


def total_steps(stage: StageConfig, schedule: Schedule) -> int:
    """Optimizer steps of a stage."""
    return stage.steps or max(1, round(stage.epochs * schedule.steps_per_epoch))


def epochs_begun(stage: StageConfig, schedule: Schedule) -> int:
    """Passes over the training groups that a stage begins."""
    return -(-total_steps(stage, schedule) // schedule.steps_per_epoch)


def learning_rate(index: int, total: int, stage: StageConfig) -> float:
    """Learning rate of step ``index`` (from 0) of ``total``: linear warm-up from 0, then the schedule down to 0."""
    warmup = round(stage.warmup_ratio * total)
    if index < warmup:
        return stage.learning_rate * (index + 1) / (warmup + 1)
    progress = (index - warmup) / max(1, total - warmup)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return stage.learning_rate * factor[stage.schedule]
