"""Runs a list of training jobs on this rank; started once per rank by other tests.

    RANK=.. WORLD_SIZE=.. MASTER_PORT=.. python run_jobs.py jobs.json

Each job is {"kind", "start", "output", "config"}; starting Python once for all of them is what keeps the test short.
With "stop" it ends after the checkpoint of that step, by SIGKILL with "kill"; a later job with its output goes on.
"""

import gc
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import torch

from dmpo_dist.config import RunConfig
from dmpo_dist.training.job import Job
from dmpo_dist.training.runtime import ProcessRuntime
from dmpo_dist.training.worker import run


class Stopped(Exception):
    pass


class Stopping(ProcessRuntime):
    """Ends this rank after the checkpoint of a step."""

    def end_after(self, step: int | None, kill: bool) -> None:
        self._stop, self._kill = step, kill

    def save(self, step, write):
        super().save(step, write)
        if step == self._stop:
            if self._kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise Stopped


torch.set_num_threads(1)
for entry in json.loads(Path(sys.argv[1]).read_text()):
    config = RunConfig.model_validate(entry["config"])
    output = Path(entry["output"])
    job = Job(entry["kind"], config, entry["start"], output)
    records: list[dict] = []
    runtime = Stopping(output / "checkpoints", 2, records.append)
    runtime.end_after(entry.get("stop"), entry.get("kill", False))
    with suppress(Stopped):
        run(job, runtime)
    gc.collect()  # the engine before is gone on every rank before the next one starts its collectives
    if runtime.rank == 0:
        (output / "records.json").write_text(json.dumps(records))
