"""`dmpo bench speed`: groups per second and memory of each implementation, on the same token ids in one run."""

import platform
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from dmpo_dist.batching.synthetic import random_groups
from dmpo_dist.bench.implementations import LORA_RANK, Implementation, LayoutImplementation, Tokens
from dmpo_dist.bench.memory import peak_memory, peak_of_steps
from dmpo_dist.bench.settings import Settings, SpeedCell
from dmpo_dist.bench.timing import Turn, fastest, measure_peak, time_rounds
from dmpo_dist.bench.trl_pairs import TrlImplementation, head_everywhere
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.memory import keep_freed_memory
from dmpo_dist.planning.flops import pairs_work, shape_of, shared_work, step_flops, unshared_work

DISTINCT_GROUPS = 12
TOLERANCE = {"float32": 1e-4, "bfloat16": 1.5}
"""dtype -> largest difference allowed between two implementations' log-probs of a response, in nats. bf16 rounds
differently in every layout (0.57 of 141 nats on an 8B model); exactness is shown by the fp32 tests and
``tests/gpu/prove.py``."""
CONVENTION = (
    "matrix products only, causal attention, no base-weight gradients under LoRA, recomputation excluded; "
    "MFU: FLOPs of what passes through the model, by time, by peak"
)
Say = Callable[[str], None]


def run(
    settings: Settings, environment: dict[str, Any], say: Say, save: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Measure all cells.

    Args:
        settings: what to measure.
        environment: versions and commit, copied into the result.
        say: prints a line of progress.
        save: is called with the result so far after each cell, so that a long run that is stopped leaves it.

    Returns:
        Plain JSON types: the settings, versions, and ``cells``, a list of the results of ``measure_cell``.

    Raises:
        UserError: the implementations disagree, or memory ran out.
    """
    torch.set_num_threads(settings.threads)
    keep_freed_memory()  # as in training, for all implementations
    peak_flops = measure_peak(settings.device, settings.dtype)
    peak = peak_flops["value"]
    say(
        f"{settings.device}, {settings.dtype}, {settings.threads} threads, peak {peak / 1e9:,.0f} GFLOP/s: "
        f"{peak_flops['source']}"
    )
    say(f"{len(settings.cells)} cells, about {_expected_seconds(settings, peak) / 60:.0f} minutes or more")
    packages = ("torch", "transformers", "peft", *(["trl"] if settings.with_trl else []))
    result: dict[str, Any] = {
        "kind": "dmpo bench speed",
        "commit": environment.get("git_commit"),
        "versions": {name: metadata.version(name) for name in packages},
        "device": _device_name(settings.device),
        "environment": environment,
        "device_type": settings.device,
        "dtype": settings.dtype,
        "threads": settings.threads,
        "rounds": settings.rounds,
        "with_trl": settings.with_trl,
        "groups_per_row": settings.groups_per_row,
        "compiled": settings.compiled,
        "model": settings.model,
        "lora_rank": LORA_RANK,
        "peak_flops": peak_flops,
        "flop_convention": CONVENTION,
        "cells": [],
    }
    for cell in settings.cells:
        result["cells"].append(measure_cell(cell, settings, peak, say))
        save(result)
    return result


def measure_cell(cell: SpeedCell, settings: Settings, peak: float, say: Say) -> dict[str, Any]:
    """Measure one cell: agreement, the fastest batches, speed in rounds, memory; returns plain JSON types.

    Ratios are above 1 where ours is faster or smaller. A ratio of speed is the median over rounds of the ratio within a
    round, by the clock. ``cpu_speedup_*`` is the same by CPU seconds, which a busy machine disturbs less but which say
    nothing about a GPU. For ``memory_ratio_trl`` TRL's batch has all K pairs of a group, as our row has the whole
    group; for ``memory_ratio_trl_fastest`` it is the batch that TRL was timed with.
    """
    spec, longest = settings.spec(cell), cell.prompt + cell.response
    groups = random_groups(DISTINCT_GROUPS, cell.prompt, cell.response, cell.negatives, cell.vocab)
    ours = LayoutImplementation(spec, True, longest)
    compared: dict[str, Implementation] = {"ours": ours, "unshared": LayoutImplementation(spec, False, longest)}
    if settings.with_trl:
        compared["trl"] = TrlImplementation(spec, cell.negatives)
    difference = check_agreement(compared, groups[0], TOLERANCE[settings.dtype])
    for implementation in compared.values():
        implementation.step(groups[:1])  # warm-up
    probes: dict[str, dict[str, float]] = {}
    for name, implementation in compared.items():
        batchings = implementation.batchings(groups[0], settings.device)
        compared[name], probes[name] = fastest(batchings, groups, settings.device, settings.threads)
    # Every implementation has its fastest batches. All have a turn in each round, so a busy machine slows all of them.
    times = time_rounds(compared, groups, settings.rounds, settings.device)
    memory = _memory(cell, settings, compared)
    tried = probes.pop("trl", {})
    flops = step_flops_of(cell, settings)
    result = {
        "prompt": cell.prompt,
        "negatives": cell.negatives,
        "vocab": cell.vocab,
        "response": cell.response,
        **_ratios(times, memory, flops),
        "trl_batch": min(tried, key=tried.__getitem__) if tried else None,
        "trl_probe_seconds_per_group": tried,
        "rows": probes,
        "attention": ours.attention,
        "largest_difference": difference,
        "one_row": _one_row(ours, groups, settings),
        "implementations": {
            name: _figures(times[name], compared[name].tokens(groups[0]), flops[name], peak, memory[name])
            | ({"peak_memory_fastest_mib": memory["trl_fastest"]} if name == "trl" else {})
            for name in compared
        },
    }
    say(_line(cell, result))
    return result


def check_agreement(compared: Mapping[str, Implementation], group: TokenGroup, tolerance: float) -> float:
    """The largest difference between the implementations' policy log-probs of ``group``.

    Raises:
        UserError: it exceeds ``tolerance``: they do not compute the same thing, so a ratio would mean nothing.
    """
    log_probs = {name: implementation.log_probs(group).double() for name, implementation in compared.items()}
    differences = {name: (values - log_probs["ours"]).abs().max().item() for name, values in log_probs.items()}
    name = max(differences, key=differences.__getitem__)
    if not differences[name] <= tolerance:
        raise UserError(
            f"log-probs of {name} differ from ours by {differences[name]:.2g}, more than {tolerance:g}: the "
            "implementations do not compute the same, so no ratio is given; check versions against constraints.txt"
        )
    return differences[name]


def step_flops_of(cell: SpeedCell, settings: Settings) -> dict[str, int]:
    """implementation -> FLOPs of a step on one group; ``trl_completions`` is TRL with its head on completions alone."""
    shape = shape_of(settings.spec(cell).transformers_config, LORA_RANK)
    lengths = (cell.prompt, cell.response, cell.negatives)
    work = {"ours": shared_work(*lengths), "unshared": unshared_work(*lengths)}
    if settings.with_trl:
        work["trl"] = pairs_work(*lengths, head_everywhere=head_everywhere(settings.device))
        work["trl_completions"] = pairs_work(*lengths)
    return {name: step_flops(shape, what) for name, what in work.items()}


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "cpu"


def _expected_seconds(settings: Settings, peak: float) -> float:
    """A lower bound: FLOPs at the machine's peak, with 8 groups for all work beside the rounds."""
    flops = [step_flops_of(cell, settings) for cell in settings.cells]
    steps = sum(count for cell in flops for name, count in cell.items() if name != "trl_completions")
    return steps * (settings.rounds + 8) / peak


def _ratios(times: dict[str, list[Turn]], memory: dict[str, float], flops: dict[str, int]) -> dict[str, Any]:
    """Speed-ups, their ceilings by the FLOP model, and ratios of memory; None where an implementation did not run."""
    ratios: dict[str, Any] = {}
    for other in ("trl", "unshared"):
        ran = other in times
        ratio, cpu_ratio = _round_ratios(times[other], times["ours"]) if ran else ([], [])
        ratios[f"speedup_{other}"] = median(ratio) if ran else None
        ratios[f"cpu_speedup_{other}"] = median(cpu_ratio) if ran else None
        ratios[f"speedup_{other}_quartiles"] = _quartiles(ratio) if ran else None
        ratios[f"ceiling_{other}"] = flops[other] / flops["ours"] if ran else None
        ratios[f"memory_ratio_{other}"] = memory[other] / memory["ours"] if ran else None
    ran = "trl" in times
    ratios["ceiling_trl_head_on_completions"] = flops["trl_completions"] / flops["ours"] if ran else None
    ratios["memory_ratio_trl_fastest"] = memory["trl_fastest"] / memory["ours"] if ran else None
    return ratios


def _round_ratios(slower: list[Turn], faster: list[Turn]) -> tuple[list[float], list[float]]:
    """Ratios within each round, by the clock and by CPU seconds."""
    both = list(zip(slower, faster, strict=True))
    return [a.seconds / b.seconds for a, b in both], [a.cpu_seconds / b.cpu_seconds for a, b in both]


def _memory(cell: SpeedCell, settings: Settings, compared: Mapping[str, Implementation]) -> dict[str, float]:
    """name -> peak MiB of a step: ours with a group in a row, ``trl`` with K pairs in a batch, ``trl_fastest`` with the
    batches it was timed with.

    On a GPU the given implementations are measured one after the other; on a CPU each is made again in its own process.
    """
    trl = compared.get("trl")
    timed = (trl.pairs_per_batch, trl.groups_per_step) if isinstance(trl, TrlImplementation) else None
    if settings.device == "cuda":
        measured: dict[str, Implementation] = {}
        for name, implementation in compared.items():
            if isinstance(implementation, LayoutImplementation):
                measured[name] = implementation.with_rows(1, 1)
            elif isinstance(implementation, TrlImplementation):
                batches = implementation.with_batches(cell.negatives, 1)
                measured |= {name: batches, f"{name}_fastest": implementation}
        return {name: peak_of_steps(implementation, cell, "cuda") for name, implementation in measured.items()}
    spec, longest = settings.spec(cell), cell.prompt + cell.response
    makers: dict[str, Callable[[], Implementation]] = {
        "ours": partial(LayoutImplementation, spec, True, longest),
        "unshared": partial(LayoutImplementation, spec, False, longest),
    }
    if timed is not None:
        makers["trl"] = partial(TrlImplementation, spec, cell.negatives)
        if timed != (cell.negatives, 1):
            makers["trl_fastest"] = partial(TrlImplementation, spec, *timed)
    memory = {name: peak_memory(make, cell, settings.threads, name) for name, make in makers.items()}
    return {"trl_fastest": memory["trl"], **memory} if "trl" in memory else memory


def _one_row(ours: LayoutImplementation, groups: list[TokenGroup], settings: Settings) -> dict[str, Any] | None:
    """Ours with several groups in one row, compared with a row for each of them; one optimizer step for all."""
    count = settings.groups_per_row
    if count == 1:
        return None
    compared = {"one_row": ours.with_rows(count, count), "row_each": ours.with_rows(1, count)}
    for implementation in compared.values():
        implementation.step(groups[:1])
    many = [groups[i % len(groups)] for i in range(count)]
    times = time_rounds(compared, many, settings.rounds, settings.device)
    ratio, cpu_ratio = _round_ratios(times["one_row"], times["row_each"])
    return {
        "groups": count,
        "tokens": sum(ours.tokens(group).physical for group in many),
        "seconds_per_group": {name: median(turn.seconds for turn in turns) for name, turns in times.items()},
        "time_ratio": median(ratio),
        "cpu_time_ratio": median(cpu_ratio),
        "time_ratio_quartiles": _quartiles(ratio),
    }


def _figures(turns: list[Turn], tokens: Tokens, flops: int, peak: float, memory: float) -> dict[str, Any]:
    """Speed, tokens, memory and MFU of an implementation."""
    seconds = median(turn.seconds for turn in turns)
    return {
        "seconds_per_group": seconds,
        "seconds_per_group_quartiles": _quartiles([turn.seconds for turn in turns]),
        "cpu_seconds_per_group": median(turn.cpu_seconds for turn in turns),
        "groups_per_second": 1 / seconds,
        "logical_tokens_per_second": tokens.logical / seconds,
        "physical_tokens_per_second": tokens.physical / seconds,
        "reuse": tokens.logical / tokens.physical,
        "padding": tokens.padding / tokens.physical,
        "flops_per_group": flops,
        "mfu": flops / seconds / peak,
        "peak_memory_mib": memory,
    }


def _quartiles(values: list[float]) -> list[float]:
    """Lower and upper quartile."""
    if len(values) == 1:
        return [values[0], values[0]]
    lower, _, upper = quantiles(values, n=4, method="inclusive")
    return [lower, upper]


def _line(cell: SpeedCell, result: dict[str, Any]) -> str:
    parts = []
    for other in ("trl", "unshared"):
        if result[f"speedup_{other}"] is not None:
            speed = f"{result[f'speedup_{other}']:.2f}x {other} (ceiling {result[f'ceiling_{other}']:.2f})"
            parts.append(f"{speed}, memory {result[f'memory_ratio_{other}']:.1f}x")
    if one_row := result["one_row"]:
        parts.append(f"{one_row['groups']} groups in one row: {one_row['time_ratio']:.3f} of the time")
    return f"{cell}: " + "; ".join(parts)
