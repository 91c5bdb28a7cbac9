"""`dmpo bench scaling`: strong and weak scaling over workers, ZeRO stage, offload and token budget.

Each cell is a Ray Train job of its own. Its file is written when the job is done, so an interrupted sweep continues
with the first cell that has no file.
"""

import json
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console

from dmpo_dist.artifacts.files import write_json
from dmpo_dist.batching.layout import group_cost
from dmpo_dist.batching.plan import Step
from dmpo_dist.bench.step import profiled_collectives, watched_phases
from dmpo_dist.cluster.train import ray_session, train_with_ray
from dmpo_dist.commands.train import open_run_folder, preflight
from dmpo_dist.config import RunConfig
from dmpo_dist.data.prepare import prepare
from dmpo_dist.modeling.memory import peak_bytes, reset_peak
from dmpo_dist.planning.flops import Shape, Work, shape_of, step_flops
from dmpo_dist.records.environment import git_commit
from dmpo_dist.training.busy import Stopwatch
from dmpo_dist.training.engine import whole_shape
from dmpo_dist.training.groups import ahead
from dmpo_dist.training.job import Job
from dmpo_dist.training.loop import Trainer
from dmpo_dist.training.runtime import Runtime
from dmpo_dist.training.worker import set_up

CELLS = "cells"


@dataclass(frozen=True)
class ScalingCell:
    """The settings that one job measures.

    Attributes:
        workers: number of ranks.
        zero: ZeRO stage.
        offload: whether the optimizer state (and under stage 3 the weights) is kept in host memory.
        token_budget: most tokens in a micro-batch.
        groups: preference groups per optimizer step, over all workers.
    """

    workers: int
    zero: int
    offload: bool
    token_budget: int
    groups: int

    @property
    def deepspeed(self) -> str:
        """Name of the DeepSpeed configuration."""
        return f"zero{self.zero}" + ("_offload" if self.offload else "")

    @property
    def name(self) -> str:
        return f"w{self.workers}-{self.deepspeed}-t{self.token_budget}-g{self.groups}"


@dataclass(frozen=True)
class Sweep:
    """The cells of a measurement.

    Strong scaling has ``groups`` groups per step for any number of workers. Weak scaling has ``groups`` at the fewest
    workers, and in proportion more for more workers.
    """

    workers: Sequence[int]
    zero: Sequence[int]
    offload: Sequence[bool]
    token_budgets: Sequence[int]
    groups: int

    def cells(self) -> list[ScalingCell]:
        """Every cell once; at the fewest workers strong and weak scaling share a cell."""
        fewest = min(self.workers)
        found = [
            ScalingCell(workers, zero, offload, budget, groups)
            for zero, offload, budget, workers in product(self.zero, self.offload, self.token_budgets, self.workers)
            if not offload or zero >= 2  # deepspeed_configs/ has offload for stages 2 and 3 only
            for groups in (self.groups, self.groups * workers // fewest)
        ]
        return list(dict.fromkeys(found))


def run_scaling(
    config: RunConfig, sweep: Sweep, warmup: int, steps: int, resume: bool, console: Console
) -> list[dict[str, Any]]:
    """Measure every cell of ``sweep`` that has no file yet; returns the results of all cells, see ``measure``.

    Args:
        config: as for ``dmpo train``; it also names the cluster. Without ``data.path`` data is prepared in
            ``output_dir``.
        warmup, steps: optimizer steps before the measurement, and in it.
        resume: continue in ``output_dir``.

    Raises:
        UserError: as ``dmpo train``, for the first cell that cannot run.
    """
    cells = sweep.cells()
    most = max(cell.workers for cell in cells)
    config = config.model_copy(
        update={"cluster": config.cluster.model_copy(update={"workers": most, "fewest_workers": None})}
    )
    output = config.output_dir.absolute()
    open_run_folder(config, "bench scaling", resume)
    if config.data.path is None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"path": output / "data"})})
        if not (output / "data" / "dataset.json").exists():
            prepare(config.data, config.seed, output / "data", echo=lambda line: console.print(line, highlight=False))
    (output / CELLS).mkdir(exist_ok=True)
    results = []
    with ray_session(config.cluster):
        for number, cell in enumerate(cells, start=1):
            file = output / CELLS / f"{cell.name}.json"
            known, began = file.exists(), time.monotonic()
            if not known:
                _run_cell(config, cell, output / CELLS / cell.name, file, warmup, steps)
            result = json.loads(file.read_text(encoding="utf-8"))
            what = "measured before" if known else f"measured in {time.monotonic() - began:.0f} s"
            console.print(
                f"{number}/{len(cells)} {cell.name}: {result['groups_per_second']:.2f} groups/s, {what}",
                highlight=False,
            )
            results.append(result)
    return results


def _run_cell(config: RunConfig, cell: ScalingCell, folder: Path, file: Path, warmup: int, steps: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # of an interrupted cell
    train = {"global_batch_size": cell.groups, "token_budget": cell.token_budget, "steps": 10 * (warmup + steps)}
    changes = {
        "output_dir": folder,
        "deepspeed": cell.deepspeed,
        "cluster": config.cluster.model_copy(update={"workers": cell.workers, "max_failures": 0}),
        "train": config.train.model_copy(update=train),
    }
    job = preflight("preference", config.model_copy(update=changes), resume=False)
    measured: list[dict[str, Any]] = []
    train_with_ray(
        [job],
        lambda _, record: measured.append(record) if record["kind"] == "cell" else None,
        partial(measure, warmup=warmup, steps=steps),
    )
    shutil.rmtree(folder)
    write_json(file, asdict(cell) | measured[0] | {"commit": git_commit()})


def measure(job: Job, runtime: Runtime, warmup: int, steps: int) -> None:
    """One rank's part of a cell; rank 0 logs a record of kind "cell" with

    - ``step_seconds``: each timed step by rank 0's clock;
    - ``cpu_seconds``: median CPU seconds of a step, mean over ranks;
    - ``groups_per_second`` and ``tokens_per_second``, by the median step;
    - ``memory_gib``: peak of each rank;
    - ``waiting_share``: share of the time in which ranks were not busy, see ``Stopwatch``, mean over ranks;
    - ``communication_share``: time in collectives / time of a step, profiled, mean over ranks;
    - ``phases_ms`` of rank 0, ``imbalance``, ``flops`` of the busiest rank in a step, ``micro_batches`` of a rank;
    - numbers of parameters and layers of the model.
    """
    trainer = set_up(job, runtime)
    try:
        for index in range(warmup):
            trainer.train_step(index, *trainer.prepare(index))
        reset_peak(trainer.device)
        timed = _timed_steps(trainer, warmup, steps)
        memory = peak_bytes(trainer.device) / 2**30
        phases = watched_phases(trainer, warmup + steps, steps)
        collective_ms, _ = profiled_collectives(trainer, warmup + 2 * steps)
        own = {
            "memory_gib": memory,
            "waiting_share": timed["waiting_share"],
            "cpu_seconds": statistics.median(timed["cpu_seconds"]),
            "communication_share": min(1.0, collective_ms / sum(phases.values())),
        }
        ranks: list[Any] = [None] * runtime.world_size
        dist.all_gather_object(ranks, own)
        if runtime.rank == 0:
            runtime.log({"kind": "cell", "phases_ms": phases} | _summary(trainer, timed, ranks))
    finally:
        trainer.engine.destroy()


def _timed_steps(trainer: Trainer, first: int, steps: int) -> dict[str, Any]:
    """Wall, CPU and busy time of ``steps`` steps on this rank, with data prepared ahead as in training."""
    watch = Stopwatch(trainer.device)
    trainer.phases = watch.phase
    seconds, busy, cpu, work_of_steps = [], [], [], []
    for index, (step, work) in enumerate(ahead(trainer.prepare, first, first + steps), start=first):
        before = time.process_time()
        watch.lap()
        trainer.train_step(index, step, work)
        wall, worked = watch.lap()
        seconds.append(wall)
        busy.append(worked)
        cpu.append(time.process_time() - before)
        work_of_steps.append(step)
    return {
        "step_seconds": seconds,
        "cpu_seconds": cpu,
        "waiting_share": 1 - sum(busy) / sum(seconds),
        "steps": work_of_steps,
    }


def _summary(trainer: Trainer, timed: dict[str, Any], ranks: list[dict[str, Any]]) -> dict[str, Any]:
    step_seconds, steps = timed["step_seconds"], timed["steps"]
    median = statistics.median(step_seconds)
    work = [_work_of_ranks(trainer, step) for step in steps]
    means = {
        name: statistics.fmean(rank[name] for rank in ranks)
        for name in ("cpu_seconds", "waiting_share", "communication_share")
    }
    return means | {
        "step_seconds": step_seconds,
        "groups_per_second": trainer.stage.global_batch_size / median,
        "tokens_per_second": statistics.fmean(sum(r.tokens for r in step) for step in work) / median,
        "memory_gib": [rank["memory_gib"] for rank in ranks],
        "imbalance": statistics.fmean(step.imbalance for step in steps),
        "flops": statistics.fmean(max(step_flops(_shape(trainer), rank) for rank in step) for step in work),
        "micro_batches": statistics.fmean(len(step.micro_batches[0]) for step in steps),
        "parameters": sum(whole_shape(p).numel() for p in trainer.engine.module.parameters()),
        "trained_parameters": sum(
            whole_shape(p).numel() for p in trainer.engine.module.parameters() if p.requires_grad
        ),
        "bytes_per_parameter": next(trainer.engine.module.parameters()).element_size(),
        "layers": _shape(trainer).layers,
        "device": str(trainer.device),
    }


def _shape(trainer: Trainer) -> Shape:
    lora = trainer.job.config.model.lora
    return shape_of(trainer.engine.module.causal_lm.config, lora.r if lora else 0)


def _work_of_ranks(trainer: Trainer, step: Step) -> list[Work]:
    """The work of each rank in ``step``: tokens, attention pairs and rows of the head, fillers included."""
    batches = trainer.batches
    works = []
    for micro_batches in step.micro_batches:
        groups = [batches.group(g, step.epoch) for micro_batch in micro_batches for g in micro_batch.groups]
        costs = [group_cost(group, batches.shared) for group in groups]
        rows = sum(len(branch) for group in groups for branch in group.branches)
        works.append(Work(sum(c.tokens for c in costs), sum(c.pairs for c in costs), rows))
    return works
