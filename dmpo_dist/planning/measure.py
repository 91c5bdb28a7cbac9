"""One rank of a measured case, started by torchrun: ``python -m dmpo_dist.planning.measure CASE.json``."""

import json
import logging
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dmpo_dist.batching.plan import Schedule
from dmpo_dist.batching.synthetic import random_groups
from dmpo_dist.modeling.backbone import count_parameters
from dmpo_dist.modeling.memory import held_bytes, peak_bytes, reset_peak, return_freed_memory, trim
from dmpo_dist.planning.cases import SMALL, Case
from dmpo_dist.training.engine import resolve_config, start_engine, start_process_group
from dmpo_dist.training.groups import Batches
from dmpo_dist.training.job import Job
from dmpo_dist.training.loop import Trainer
from dmpo_dist.training.runtime import ProcessRuntime
from dmpo_dist.training.worker import Policy, frozen_copy, load_module

WARM_UP, MEASURED = 2, 1
"""Numbers of steps. In the warm-up the optimizer allocates its state and ZeRO-3 learns the order of the layers."""


def main(path: Path) -> None:
    """Measure the case in ``path``; rank 0 writes ``result.json`` beside it."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    return_freed_memory()
    case = Case(**json.loads(path.read_text()))
    device = start_process_group()
    small = replace(SMALL, deepspeed=case.deepspeed, ranks=case.ranks, dtype=case.dtype, lora=4 if case.lora else 0)
    _run(small, path.parent / "small", device)
    trim()
    base = held_bytes(device)
    parameters = _run(case, path.parent / "model", device)
    peak = torch.tensor([peak_bytes(device) - base], dtype=torch.int64)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        content = {"peak": peak.item(), "base": base, "parameters": parameters}
        (path.parent / "result.json").write_text(json.dumps(content))
    dist.destroy_process_group()


def _run(case: Case, folder: Path, device: torch.device) -> dict[str, int]:
    """Train as ``dmpo train`` does, and reset the peak after the warm-up; returns numbers of parameters."""
    trainer, policy = trainer_of_case(case, str(folder), device)
    for index in range(WARM_UP + MEASURED):
        if index == WARM_UP:
            reset_peak(device)
        trainer.train_step(index, *trainer.prepare(index))
    counts = _counts(policy.module)
    if case.name == SMALL.name:
        trainer.engine.destroy()
    return counts


def trainer_of_case(case: Case, model: str, device: torch.device) -> tuple[Trainer, Policy]:
    """What trains the model in the folder ``model`` on random groups as ``dmpo train`` does, on every rank."""
    job = Job("preference", case.run_config(model), model, Path(model).parent)
    world = dist.get_world_size()
    deepspeed = resolve_config(job.config.deepspeed, job.stage, case.dtype, world, count_parameters(model))
    policy = load_module(job, device, deepspeed)
    engine = start_engine(policy.module, deepspeed)
    frozen = frozen_copy(job, policy.route, device, deepspeed) if policy.reference_mode == "model_copy" else engine
    groups = random_groups(case.global_batch_size, case.prompt, case.response, case.negatives, case.vocab)
    schedule = Schedule(len(groups), case.global_batch_size, 0)
    trainer = Trainer(
        job=job,
        runtime=ProcessRuntime(job.output, 1, lambda record: None),
        device=device,
        engine=engine,
        tokenizer=policy.tokenizer,
        loss=job.loss,
        reference=lambda layout, groups, epoch: frozen(layout, "reference"),
        batches=Batches(groups, schedule, case.negatives, world, case.budget, shared=True),
        validation=[],
    )
    return trainer, policy


def _counts(module: Any) -> dict[str, int]:
    whole = [(p, getattr(p, "ds_numel", p.numel())) for p in module.parameters()]
    return {"total": sum(n for _, n in whole), "trainable": sum(n for p, n in whole if p.requires_grad)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
