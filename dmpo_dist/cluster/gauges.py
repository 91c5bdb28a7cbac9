"""A run's latest figures as Prometheus gauges of the driver's Ray node (needs ``ray[default]`` there)."""

import time
from collections.abc import Mapping
from typing import Any

from dmpo_dist.artifacts.log import CheckpointRecord, LogRecord, StartRecord, StepRecord
from dmpo_dist.training.job import Job

FIGURES = {
    "groups_per_second": "Preference groups per second over all workers.",
    "tokens_per_second": "Tokens per second over all workers.",
    "loss": "Training loss, mean since the log line before.",
    "margin": "Mean log-ratio of the positive minus the negatives'.",
    "slowest_share": "Busy time of the slowest rank over the mean.",
}
TAGS = ("run", "stage")


class RayGauges:
    """Sink of one stage; call within a Ray session. Ray puts ``ray_`` before the names.

    Between log lines ``dmpo_checkpoint_age_seconds`` stands still: alert on
    ``time() - ray_dmpo_checkpoint_timestamp_seconds``, which also grows while a run hangs.
    """

    def __init__(self, job: Job) -> None:
        from ray.util.metrics import Gauge

        def gauge(name: str, text: str) -> Any:
            made = Gauge(f"dmpo_{name}", description=text, tag_keys=TAGS)
            made.set_default_tags({"run": str(job.output), "stage": job.section})
            return made

        self._figures = {name: gauge(name, text) for name, text in FIGURES.items()}
        self._step = gauge("step", "Optimizer steps done.")
        self._memory = gauge("memory_bytes", "Memory of rank 0: peak of its GPU, or resident.")
        self._age = gauge("checkpoint_age_seconds", "Time since the latest checkpoint, at the latest log line.")
        self._saved_at = gauge("checkpoint_timestamp_seconds", "Unix time of the latest checkpoint, or of the start.")
        self._saved = time.time()

    def write(self, record: LogRecord) -> None:
        now = record.time or time.time()
        if isinstance(record, StartRecord | CheckpointRecord):
            self._saved = now
        elif isinstance(record, StepRecord):
            for name, gauge in self._figures.items():
                gauge.set(getattr(record, name))
            self._step.set(record.step)
            self._memory.set(None if record.memory_gib is None else record.memory_gib * 2**30)
        self._age.set(now - self._saved)
        self._saved_at.set(self._saved)

    def close(self, result: Mapping[str, float], finished: bool) -> None:
        """Nothing: the last values stay until the driver ends."""
