"""The methods sheet of an experiment: what a reviewer asks of data, tuning, training, compute and versions."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dmpo_dist.artifacts.evaluation import Evaluation
from dmpo_dist.data.store import PreparedData
from dmpo_dist.errors import UserError
from dmpo_dist.experiment.parts import Part
from dmpo_dist.experiment.stamps import evaluation_folder, progress
from dmpo_dist.modeling.backbone import find_model
from dmpo_dist.modeling.model_files import content_digests
from dmpo_dist.records.read import Run, read_run

Rows = list[dict[str, Any]]
STAGE_KEYS = ("learning_rate", "global_batch_size", "schedule")


def data_rows(data: Mapping[str, PreparedData]) -> Rows:
    """A row for each dataset: dates, sizes, splits, and how candidates were drawn."""
    return [{"dataset": name, **_sizes(prepared), **_splits(prepared)} for name, prepared in data.items()]


def baseline_rows(found: pd.DataFrame) -> Rows:
    """A row for each baseline that was tuned: how many settings were tried, which was best, and the time."""
    rows = []
    for folder in dict.fromkeys(found[found["part"].isna()]["folder"]):
        dataset = found[found["folder"] == folder]["dataset"].iloc[0]
        for name, known in Evaluation.read(folder).baselines.items():
            best = max(known.validation, key=known.validation.__getitem__, default="")
            rows.append(
                {
                    "dataset": dataset,
                    "baseline": name,
                    "settings tried on validation": len(known.validation),
                    "chosen": best,
                    "its validation NDCG@10": f"{known.validation[best]:.3f}" if best else "",
                    "CPU seconds": "" if known.seconds is None else f"{known.seconds:.0f}",
                }
            )
    return rows


def model_rows(parts: Sequence[Part], data: Mapping[str, PreparedData]) -> Rows:
    """A row for each kind of trained model, its seeds together: steps, rates, what was chosen on, and compute."""
    finished = [part for part in parts if progress(part, data).state == "done"]
    kinds: dict[tuple[Any, ...], list[Part]] = {}
    for part in finished:
        cell = part.cell.k if part.role == "cell" else None
        kinds.setdefault((part.role, _label(part), part.cell.dataset, part.shots, cell, part.distinct), []).append(part)
    return [_model_row(members, data) for members in kinds.values()]


def environment_lines(parts: Sequence[Part]) -> list[str]:
    """A line for each machine and version that trained a model, and one for each model that training started from."""
    found = dict.fromkeys(_environment(read_run(part.run)) for part in parts if (part.run / "metrics.jsonl").exists())
    starts = dict.fromkeys(part.config.model.path for part in parts if part.from_before_training)
    return [*found, *map(_start_line, starts)]


def _sizes(data: PreparedData) -> dict[str, Any]:
    log = data.interactions
    if log is None or not len(log):
        return {"dates": "", "users": "", "items": "", "events": ""}
    dates = [str(pd.Timestamp(t, unit="s").date()) for t in (log["timestamp"].min(), log["timestamp"].max())]
    items = len(log["item"].unique() if data.items is None else data.items)
    return {"dates": " to ".join(dates), "users": log["user"].nunique(), "items": items, "events": len(log)}


def _splits(data: PreparedData) -> dict[str, Any]:
    config, card = data.card.config, data.card
    cuts, kind = card.cuts, config.get("negatives")
    ready = data.interactions is None  # rows that the settings of split and draws had no part in
    split = f"time: {cuts['validation'].utc}, {cuts['test'].utc}" if cuts else config.get("split", "")
    among = "all items" if config.get("evaluation_candidates") == "all" else "items somebody took before"
    drawn = f"1 + {config.get('evaluation_negatives')} uniform among {among}, never taken by the user"
    return {
        "validation and test from": "ready rows" if ready else split,
        "training groups": card.counts["train"],
        "validation requests": card.counts["validation"],
        "test requests": card.counts["test"],
        "candidates": "as given" if ready else drawn,
        "training negatives": _stored(data) if ready else f"{config.get('negatives_per_group')} {kind}",
        "fingerprint": data.fingerprint[:12],
    }


def _stored(data: PreparedData) -> str:
    """How many negatives the groups of ready rows have, and whether they are those that they came with."""
    counts = data.stored_negatives()
    fewest, most = min(counts, default=0), max(counts, default=0)
    how = "hard" if data.card.config.get("negatives") == "hard" else "as given"
    return f"{fewest} {how}" if fewest == most else f"{fewest} to {most} {how}"


def _label(part: Part) -> str:
    return {"start": "sft", "continued": "sft_continued", "compute": "sft_continued_compute"}.get(
        part.role, part.cell.objective
    )


def _model_row(members: Sequence[Part], data: Mapping[str, PreparedData]) -> dict[str, Any]:
    """The row of a model's seeds."""
    first, runs = members[0], [read_run(part.run) for part in members]
    settings = runs[0].config.get(first.stage, {})
    groups = first.shots or len(data[first.cell.dataset].train)
    in_a_step = groups / -(-groups // settings.get("global_batch_size", groups))  # all, where a batch asks for more
    seconds, tokens = np.sum([_compute(run, in_a_step) for run in runs], axis=0)
    return {
        "model": _label(first),
        "axes": first.distinct,
        "K": first.cell.k if first.role == "cell" else "",
        "groups": groups,
        "trained on": first.cell.dataset,
        "seeds": ", ".join(str(part.cell.seed) for part in members),
        "steps": " ".join(dict.fromkeys(str(run.steps[1]) for run in runs)),
        "selected step": ", ".join(str(run.best_step) for run in runs),
        **{key.replace("_", " "): settings.get(key, "") for key in STAGE_KEYS},
        "steps compared on validation": len(runs[0].validation),
        "validation requests": len(data[first.cell.dataset].validation),
        "scoring rules tried": _rules_tried(first),
        "training seconds x workers": f"{seconds:.0f}",
        "tokens": f"{tokens:,.0f}",
    }


def _compute(run: Run, in_a_step: float) -> tuple[float, float]:
    """Seconds of training steps of so many groups, times workers, and tokens through the policy.

    Start, validation and waits are left out.
    """
    train, workers = run.train, (run.start.world_size if run.start else None) or 1
    if "groups_per_second" not in train:
        return 0.0, 0.0
    steps = np.diff(train.index.to_numpy(), prepend=0)
    seconds = steps * in_a_step / train["groups_per_second"].to_numpy()
    tokens = seconds * train["tokens_per_second"].to_numpy() if "tokens_per_second" in train else np.zeros(1)
    return float(np.nansum(seconds)) * workers, float(np.nansum(tokens))


def _rules_tried(part: Part) -> int | str:
    """How many rules and prior weights were compared on validation; empty where none was chosen by it."""
    for dataset in part.evaluate_on:
        rules = Evaluation.read(evaluation_folder(part, dataset)).rules
        if rules is not None:
            return max(len(choice.validation) for choice in rules.chosen.values()) or ""
    return ""


def _environment(run: Run) -> str:
    known, start = run.environment, run.start
    packages = ", ".join(f"{name} {version}" for name, version in known.packages.items() if version)
    device = "" if start is None or start.device is None else f", {start.world_size} x {start.device}"
    return (
        f"dmpo_dist {known.dmpo_dist}, commit {known.git_commit or 'unknown'}, Python {known.python}, {packages}; "
        f"{known.platform}, {known.cpus} CPUs{device}"
    )


def _start_line(path: str) -> str:
    if path == "scratch":
        return "Training started from random weights."
    try:
        source = find_model(path)
        digests = content_digests(source.base if Path(source.base).is_dir() else source.path)
    except (OSError, UserError):
        digests = {}
    weights = [f"{name} XXH3 {digest}" for name, digest in digests.items() if name.endswith((".safetensors", ".bin"))]
    weights += [f"revision {digests['revision']}"] if "revision" in digests else []
    if not weights:
        return f"Training started from {path}, which is not there any more."
    return f"Training started from {path}: " + ", ".join(weights)


def with_columns(rows: Iterable[dict[str, Any]]) -> Rows:
    """``rows`` without the columns that are empty in all of them."""
    rows = list(rows)
    used = {name for row in rows for name, value in row.items() if value not in ("", None)}
    return [{name: value for name, value in row.items() if name in used} for row in rows]
