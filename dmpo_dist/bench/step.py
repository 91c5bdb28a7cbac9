"""`dmpo bench step`: the time of each phase of an optimizer step, and the overhead of the training loop.

A run that is set up once is measured in three ways:

- every phase of a step, by a stop watch that synchronises;
- blocks of the whole loop (data thread, DeepSpeed engine, meter), in turn with blocks of the same forward and backward
  under a plain torch optimizer;
- a profile of a few steps, for collectives and for calls that make the host wait. On a GPU these are synchronisations;
  on a CPU they are reads of tensors as numbers, which would synchronise on a GPU.
"""

import os
import socket
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from dmpo_dist.artifacts.files import write_json
from dmpo_dist.bench.timing import synchronize, timed
from dmpo_dist.commands.train import as_rank
from dmpo_dist.config import RunConfig
from dmpo_dist.training.groups import ahead, groups_of
from dmpo_dist.training.job import Job
from dmpo_dist.training.loop import Trainer
from dmpo_dist.training.runtime import Runtime
from dmpo_dist.training.worker import load_module, set_up

PHASES = ("data", "reference", "policy", "backward", "optimizer")
PROFILED = 3
COLLECTIVES = ("gloo:", "nccl:")
HOST_WAITS = {
    "cpu": ("aten::_local_scalar_dense",),
    "cuda": ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
}


def run_bench_step(config: RunConfig, steps: int, rounds: int, console: Console) -> None:
    """Measure the preference stage of ``config``, in this process or as a rank of torchrun; writes to ``output_dir``.

    Raises:
        UserError: as ``dmpo train``.
    """
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": str(_free_port())}
    job, result = as_rank(
        "preference", config, console, False, lambda job, runtime: bench_step(job, runtime, steps, rounds)
    )
    if os.environ["RANK"] == "0":
        assert result is not None  # it is not resumed
        show(result, console)
        write(result, job.output)
        console.print(f"written to {job.output}/step.json and step.png", highlight=False)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def bench_step(job: Job, runtime: Runtime, steps: int, rounds: int) -> dict[str, Any]:
    """Measure ``steps`` steps per block and ``rounds`` blocks of each kind; every rank calls it.

    Returns:
        ``phases_ms`` (median per step, this rank), ``reduce_ms`` (in collectives, part of backward and optimizer),
        ``host_waits`` per step and phase, ``loop_ms`` and ``bare_ms`` per step by the clock, their ratio
        ``loop_over_bare``, and ``loop_over_bare_cpu``, the ratio by the CPU seconds of this process (which a busy
        machine disturbs less, and which include the data thread). All are medians over blocks. The other keys describe
        the run.
    """
    trainer = set_up(job, runtime)
    try:
        trainer.train_step(0, *trainer.prepare(0))  # first calls allocate and compile
        bare = _bare_loop(job, trainer)
        bare([trainer.prepare(1)])
        loops, bares, step = [], [], 2
        for _ in range(rounds):
            loops.append(timed(lambda first=step: _loop_block(trainer, first, steps), trainer.device))
            work = [trainer.prepare(index) for index in range(step, step + steps)]
            bares.append(timed(lambda work=work: bare(work), trainer.device))
            step += steps
        watched = watched_phases(trainer, step, steps)
        collective_ms, host_waits = profiled_collectives(trainer, step + steps)
        clock, cpu = ([loop[i] / bare[i] for loop, bare in zip(loops, bares, strict=True)] for i in (0, 1))
        return {
            "phases_ms": watched,
            "reduce_ms": collective_ms,
            "host_waits": host_waits,
            "loop_ms": 1000 * statistics.median(seconds for seconds, _ in loops) / steps,
            "bare_ms": 1000 * statistics.median(seconds for seconds, _ in bares) / steps,
            "loop_over_bare": statistics.median(clock),
            "loop_over_bare_cpu": statistics.median(cpu),
            "spread": [min(clock), max(clock)],
            "groups_per_step": job.stage.global_batch_size,
            "world_size": runtime.world_size,
            "device": str(trainer.device),
            "deepspeed": job.config.deepspeed,
            "steps": steps,
            "rounds": rounds,
        }
    finally:
        trainer.engine.destroy()


def _loop_block(trainer: Trainer, first: int, steps: int) -> None:
    """``steps`` steps of the training loop, with data prepared ahead as in training."""
    for index, (step, work) in enumerate(ahead(trainer.prepare, first, first + steps), start=first):
        trainer.train_step(index, step, work)


def _bare_loop(job: Job, trainer: Trainer) -> Callable[[list[Any]], None]:
    """A function that runs the same forward and backward without engine, meter and data thread."""
    module = load_module(job, trainer.device).module
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job.stage.learning_rate)

    def run(prepared: list[Any]) -> None:
        for step, work in prepared:
            for micro_batch, host_layout in work:
                layout = host_layout.to(trainer.device)
                with torch.no_grad():
                    reference = trainer.reference(layout, micro_batch.groups, step.epoch) if trainer.reference else None
                policy, history = layout.targets.split(module(layout))
                loss_sum, _ = trainer.loss(policy, reference, groups_of(layout.targets), history)
                (loss_sum / len(step.groups)).backward()
            torch.nn.utils.clip_grad_norm_(trained, job.stage.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()

    return run


def watched_phases(trainer: Trainer, first: int, steps: int) -> dict[str, float]:
    """Median milliseconds per step in each of ``PHASES`` on this rank, by a stop watch that synchronises."""
    samples: dict[str, list[float]] = {name: [] for name in PHASES}
    spent: dict[str, float] = defaultdict(float)

    @contextmanager
    def watch(name: str) -> Iterator[None]:
        synchronize(trainer.device)
        start = time.perf_counter()
        yield
        synchronize(trainer.device)
        spent[name] += 1000 * (time.perf_counter() - start)

    before, trainer.phases = trainer.phases, watch
    for index in range(first, first + steps):
        spent.clear()
        with watch("data"):
            prepared = trainer.prepare(index)
        trainer.train_step(index, *prepared)
        for name in PHASES:
            samples[name].append(spent[name])
    trainer.phases = before
    return {name: statistics.median(values) for name, values in samples.items()}


def profiled_collectives(trainer: Trainer, first: int) -> tuple[float, dict[str, float]]:
    """Milliseconds in collectives, and how often the host waits (``HOST_WAITS``) by phase, per step on this rank.

    Runs ``PROFILED`` steps.
    """
    prepared = [trainer.prepare(index) for index in range(first, first + PROFILED)]
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if trainer.device.type == "cuda" else [])
    before, trainer.phases = trainer.phases, record_function
    with profile(activities=activities, acc_events=True) as record:
        for index, (step, work) in enumerate(prepared, start=first):
            trainer.train_step(index, step, work)
    trainer.phases = before
    events = record.events() or []
    collectives = sum(e.time_range.elapsed_us() for e in events if e.name.startswith(COLLECTIVES))
    waits = [e.time_range.start for e in events if e.name in HOST_WAITS[trainer.device.type]]
    spans = [(e.name, e.time_range) for e in events if e.name in PHASES and e.device_type == DeviceType.CPU]
    inside = {name: sum(s.start <= t <= s.end for n, s in spans if n == name for t in waits) for name in PHASES[1:]}
    inside["elsewhere"] = len(waits) - sum(inside.values())
    return collectives / 1000 / PROFILED, {name: count / PROFILED for name, count in inside.items()}


def show(result: dict[str, Any], console: Console) -> None:
    """Print a table of the phases, and the loop's overhead."""
    phases, total = result["phases_ms"], sum(result["phases_ms"].values())
    table = Table("phase", "ms per step", "share", title="One optimizer step, rank 0")
    for name in PHASES:
        table.add_row(name, f"{phases[name]:.2f}", f"{phases[name] / total:.0%}")
    table.add_row("  of these in collectives", f"{result['reduce_ms']:.2f}", f"{result['reduce_ms'] / total:.0%}")
    console.print(table)
    console.print(
        f"whole loop {result['loop_ms']:.2f} ms a step, bare computation {result['bare_ms']:.2f} ms: "
        f"{result['loop_over_bare']:.3f} times by the clock ({result['spread'][0]:.3f} to {result['spread'][1]:.3f}), "
        f"{result['loop_over_bare_cpu']:.3f} times by CPU seconds (which count the data thread)\n"
        "what makes the host wait for a GPU, times a step between log lines: "
        + ", ".join(f"{name} {count:.1f}" for name, count in result["host_waits"].items()),
        highlight=False,
    )


def write(result: dict[str, Any], folder: Path) -> None:
    """Write ``step.json`` and ``step.png`` to ``folder``."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "step.json", result)
    figure, axes = pyplot.subplots(figsize=(8, 2.2))
    left = 0.0
    for name in PHASES:
        width = result["phases_ms"][name]
        axes.barh(0, width, left=left, label=f"{name} {width:.1f} ms")
        left += width
    axes.set(yticks=[], xlabel="milliseconds per optimizer step", xlim=(0, left))
    axes.set_title(
        f"{result['groups_per_step']} groups on {result['world_size']} x {result['device']}, {result['deepspeed']}"
    )
    axes.legend(ncols=len(PHASES), loc="upper center", bbox_to_anchor=(0.5, -0.45), fontsize=8, frameon=False)
    figure.savefig(folder / "step.png", dpi=150, bbox_inches="tight")
    pyplot.close(figure)
