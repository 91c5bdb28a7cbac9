"""Runs a list of training jobs on this rank; started once per rank by ``test_training_invariance.py``.

    RANK=.. WORLD_SIZE=.. MASTER_PORT=.. python run_jobs.py jobs.json

Each job is {"kind", "start", "output", "config"}; starting Python once for all of them is what keeps the test short.
"""

import gc
import json
import sys
from pathlib import Path

import torch

from dmpo_dist.config import RunConfig
from dmpo_dist.training.job import Job
from dmpo_dist.training.runtime import ProcessRuntime
from dmpo_dist.training.worker import run

torch.set_num_threads(1)
for entry in json.loads(Path(sys.argv[1]).read_text()):
    config = RunConfig.model_validate(entry["config"])
    output = Path(entry["output"])
    job = Job(entry["kind"], config, entry["start"], output)
    records: list[dict] = []
    runtime = ProcessRuntime(output / "checkpoints", 2, records.append)
    run(job, runtime)
    gc.collect()  # the engine before is gone on every rank before the next one starts its collectives
    if runtime.rank == 0:
        (output / "records.json").write_text(json.dumps(records))
