"""The contest: who trains how many groups a second, in how much memory, on identical token ids in one run."""

import platform
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from dmpo_dist.batching.synthetic import random_groups
from dmpo_dist.bench.contestants import LORA_RANK, Contestant, LayoutContestant
from dmpo_dist.bench.memory import peak_memory, peak_of_steps
from dmpo_dist.bench.settings import Cell, Settings
from dmpo_dist.bench.timing import Turn, fastest_batches, fastest_rows, measure_peak, time_rounds
from dmpo_dist.bench.trl_pairs import TrlContestant, head_everywhere
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.memory import keep_freed_memory
from dmpo_dist.planning.flops import Work, pairs_work, shape_of, shared_work, step_flops, unshared_work

DISTINCT_GROUPS = 12
TOLERANCE = {"float32": 1e-4, "bfloat16": 1.5}
"""Largest difference of a response's log-prob, a sum over its tokens. bf16 rounds otherwise in every layout: 0.57 nats of 141
on an 8B model; exactness is what the fp32 tests and ``tests/gpu/prove.py`` are for."""
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
        environment: versions and commit, for the record.
        say: told what is going on, one line at a time.
        save: given the result so far after each cell, so that a long run that is stopped leaves something.

    Returns:
        Plain JSON types: the settings, versions, and ``cells``, a list of what ``measure_cell`` gives.

    Raises:
        UserError: contestants disagree, or memory ran out.
    """
    torch.set_num_threads(settings.threads)
    keep_freed_memory()  # as in training, for all contestants
    peak_flops = measure_peak(settings.device, settings.dtype)
    peak = peak_flops["value"]
    say(
        f"{settings.device}, {settings.dtype}, {settings.threads} threads, peak {peak / 1e9:,.0f} GFLOP/s: "
        f"{peak_flops['source']}"
    )
    say(f"{len(settings.cells)} cells, about {_expected_seconds(settings, peak) / 60:.0f} minutes or more")
    names = ("torch", "transformers", "peft", *(["trl"] if settings.with_trl else []))
    result: dict[str, Any] = {
        "kind": "dmpo bench speed",
        "commit": environment.get("git_commit"),
        "versions": {name: metadata.version(name) for name in names},
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


def measure_cell(cell: Cell, settings: Settings, peak: float, say: Say) -> dict[str, Any]:
    """One cell: agreement, TRL's best batching, speed in rounds, memory; plain JSON types.

    Ratios are above 1 where ours is the faster or smaller one; those of speed are medians over rounds of the ratio
    within a round, by the clock; ``cpu_speedup_*`` is the same by CPU seconds, which a busy machine disturbs less but
    which say nothing about a GPU. ``memory_ratio_trl`` has all K pairs of a group in TRL's batch, as ours has the group in its row;
    ``memory_ratio_trl_fastest`` has the batch TRL was timed with.
    """
    spec, longest = settings.spec(cell), cell.prompt + cell.response
    groups = random_groups(DISTINCT_GROUPS, cell.prompt, cell.response, cell.negatives, cell.vocab)
    ours = LayoutContestant(spec, True, longest)
    unshared = LayoutContestant(spec, False, longest)
    field: dict[str, Contestant] = {"ours": ours, "unshared": unshared}
    trl = TrlContestant(spec, cell.negatives) if settings.with_trl else None
    if trl is not None:
        field["trl"] = trl
    difference = check_agreement(field, groups[0], TOLERANCE[settings.dtype])
    for contestant in field.values():
        contestant.step(groups[:1])  # warm-up
    probes: dict[str, dict[str, float]] = {}
    for contestant in (ours, unshared):
        field[contestant.name], probes[contestant.name] = fastest_rows(
            contestant, groups, settings.device, settings.threads
        )
    if trl is not None:
        field["trl"], probes["trl"] = fastest_batches(trl, groups, settings.device, settings.threads)
    times = time_rounds(field, groups, settings.rounds, settings.device)
    memory = _memory(cell, settings, field)
    probe = probes.get("trl", {})
    result = {
        "prompt": cell.prompt,
        "negatives": cell.negatives,
        "vocab": cell.vocab,
        "response": cell.response,
        **_ratios(times, memory, cell, settings),
        "trl_batch": min(probe, key=probe.__getitem__) if probe else None,
        "trl_probe_seconds_per_group": probe,
        "rows": {name: probes[name] for name in ("ours", "unshared")},
        "attention": ours.attention,
        "largest_difference": difference,
        "one_row": _one_row(ours, groups, settings),
        "contestants": _figures(field, times, memory, groups[0], cell, settings, peak),
    }
    say(_line(cell, result))
    return result


def check_agreement(field: Mapping[str, Contestant], group: TokenGroup, tolerance: float) -> float:
    """The largest difference between the contestants' policy log-probs of ``group``.

    Raises:
        UserError: it exceeds ``tolerance``, so that they do not compute the same thing and no ratio may be shown.
    """
    log_probs = {name: contestant.log_probs(group).double() for name, contestant in field.items()}
    first = log_probs["ours"]
    differences = {name: (values - first).abs().max().item() for name, values in log_probs.items()}
    name = max(differences, key=differences.__getitem__)
    if not differences[name] <= tolerance:
        raise UserError(
            f"log-probs of {name} differ from ours by {differences[name]:.2g}, more than {tolerance:g}: the contestants "
            "do not compute the same, so no ratio is given; check versions against constraints.txt"
        )
    return differences[name]


def cell_work(cell: Cell, settings: Settings) -> dict[str, Work]:
    """What passes through the model for one group, by contestant; ``trl`` as its head works on this device."""
    lengths = (cell.prompt, cell.response, cell.negatives)
    work = {"ours": shared_work(*lengths), "unshared": unshared_work(*lengths)}
    if settings.with_trl:
        work["trl"] = pairs_work(*lengths, head_everywhere=head_everywhere(settings.device))
    return work


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "cpu"


def _expected_seconds(settings: Settings, peak: float) -> float:
    """At the machine's peak, counting 8 more groups than rounds for TRL's probe, warm-ups and memory."""
    total = 0
    for cell in settings.cells:
        shape = shape_of(settings.spec(cell).transformers_config, LORA_RANK)
        total += sum(step_flops(shape, work) for work in cell_work(cell, settings).values()) * (settings.rounds + 8)
    return total / peak


def _ratios(times: dict[str, list[Turn]], memory: dict[str, float], cell: Cell, settings: Settings) -> dict[str, Any]:
    """Speed-ups, their ceilings by the FLOP model, and ratios of memory; None for a contestant that did not run."""
    shape = shape_of(settings.spec(cell).transformers_config, LORA_RANK)
    flops = {name: step_flops(shape, work) for name, work in cell_work(cell, settings).items()}
    ratios: dict[str, Any] = {}
    for rival in ("trl", "unshared"):
        ratio, cpu_ratio = _round_ratios(times[rival], times["ours"]) if rival in times else ([], [])
        ratios[f"speedup_{rival}"] = median(ratio) if ratio else None
        ratios[f"cpu_speedup_{rival}"] = median(cpu_ratio) if ratio else None
        ratios[f"speedup_{rival}_quartiles"] = _quartiles(ratio) if ratio else None
        ratios[f"ceiling_{rival}"] = flops[rival] / flops["ours"] if ratio else None
        ratios[f"memory_ratio_{rival}"] = memory[rival] / memory["ours"] if ratio else None
    completions_only = step_flops(shape, pairs_work(cell.prompt, cell.response, cell.negatives))
    ratios["ceiling_trl_head_on_completions"] = completions_only / flops["ours"] if "trl" in times else None
    ratios["memory_ratio_trl_fastest"] = memory["trl_fastest"] / memory["ours"] if "trl" in times else None
    return ratios


def _round_ratios(slower: list[Turn], faster: list[Turn]) -> tuple[list[float], list[float]]:
    """Ratios within each round, by the clock and by CPU seconds."""
    both = list(zip(slower, faster, strict=True))
    return [a.seconds / b.seconds for a, b in both], [a.cpu_seconds / b.cpu_seconds for a, b in both]


def _memory(cell: Cell, settings: Settings, field: Mapping[str, Contestant]) -> dict[str, float]:
    """Peak MiB of a step, by contestant; ours with a group in a row, ``trl`` with K pairs in a batch, ``trl_fastest`` as it
    was timed."""
    if settings.device == "cuda":
        return _memory_on_gpu(cell, field)
    spec, longest = settings.spec(cell), cell.prompt + cell.response
    makers: dict[str, Callable[[], Contestant]] = {
        "ours": partial(LayoutContestant, spec, True, longest),
        "unshared": partial(LayoutContestant, spec, False, longest),
    }
    if isinstance(timed := field.get("trl"), TrlContestant):
        makers["trl"] = partial(TrlContestant, spec, cell.negatives)
        if (timed.pairs_per_batch, timed.groups_per_step) != (cell.negatives, 1):
            makers["trl_fastest"] = partial(TrlContestant, spec, timed.pairs_per_batch, timed.groups_per_step)
    memory = {name: peak_memory(make, cell, settings.threads, name) for name, make in makers.items()}
    return {"trl_fastest": memory["trl"], **memory} if "trl" in memory else memory


def _memory_on_gpu(cell: Cell, field: Mapping[str, Contestant]) -> dict[str, float]:
    """The same for the contestants themselves, one after the other."""
    measured: dict[str, Contestant] = {}
    for name, contestant in field.items():
        if isinstance(contestant, LayoutContestant):
            measured[name] = contestant.with_rows(1, 1)
        elif isinstance(contestant, TrlContestant):
            measured |= {name: contestant.with_batches(cell.negatives, 1), f"{name}_fastest": contestant}
    return {name: peak_of_steps(contestant, cell, "cuda") for name, contestant in measured.items()}


def _one_row(ours: LayoutContestant, groups: list[TokenGroup], settings: Settings) -> dict[str, Any] | None:
    """Ours with several groups in one row against the same groups in a row each, at one optimizer step for all."""
    count = settings.groups_per_row
    if count == 1:
        return None
    field = {"one_row": ours.with_rows(count, count), "row_each": ours.with_rows(1, count)}
    for contestant in field.values():
        contestant.step(groups[:1])
    many = [groups[i % len(groups)] for i in range(count)]
    times = time_rounds(field, many, settings.rounds, settings.device)
    ratio, cpu_ratio = _round_ratios(times["one_row"], times["row_each"])
    return {
        "groups": count,
        "tokens": sum(ours.tokens(group).physical for group in many),
        "seconds_per_group": {name: median(turn.seconds for turn in turns) for name, turns in times.items()},
        "time_ratio": median(ratio),
        "cpu_time_ratio": median(cpu_ratio),
        "time_ratio_quartiles": _quartiles(ratio),
    }


def _figures(
    field: Mapping[str, Contestant],
    times: dict[str, list[Turn]],
    memory: dict[str, float],
    group: TokenGroup,
    cell: Cell,
    settings: Settings,
    peak: float,
) -> dict[str, dict[str, Any]]:
    """Speed, tokens, memory and MFU of each contestant."""
    shape, figures = shape_of(settings.spec(cell).transformers_config, LORA_RANK), {}
    for name, work in cell_work(cell, settings).items():
        turns, tokens, flops = times[name], field[name].tokens(group), step_flops(shape, work)
        seconds = median(turn.seconds for turn in turns)
        figures[name] = {
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
            "peak_memory_mib": memory[name],
        }
        if name == "trl":
            figures[name]["peak_memory_fastest_mib"] = memory["trl_fastest"]
    return figures


def _quartiles(values: list[float]) -> list[float]:
    """Lower and upper quartile."""
    if len(values) == 1:
        return [values[0], values[0]]
    lower, _, upper = quantiles(values, n=4, method="inclusive")
    return [lower, upper]


def _line(cell: Cell, result: dict[str, Any]) -> str:
    parts = [f"{cell}:"]
    for rival in ("trl", "unshared"):
        if result[f"speedup_{rival}"] is not None:
            parts.append(
                f"{result[f'speedup_{rival}']:.2f}x {rival} (ceiling {result[f'ceiling_{rival}']:.2f}), "
                f"memory {result[f'memory_ratio_{rival}']:.1f}x;"
            )
    if result["one_row"]:
        parts.append(
            f"{result['one_row']['groups']} groups in one row: {result['one_row']['time_ratio']:.3f} of the time;"
        )
    return " ".join(parts).rstrip(";")
