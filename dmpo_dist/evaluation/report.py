"""From the scores of several models to one comparison: JSON, Parquet, Markdown, a terminal table and plain lines."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from rich import box
from rich.table import Table
from rich.text import Text

from dmpo_dist.evaluation.metrics import METRICS, bootstrap_interval, paired_bootstrap, ranking_metrics

MODEL_ORDER = ("random", "popularity", "item_knn", "untuned", "sft", "sft_continued", "dmpo", "oracle")
COMPARED_METRICS = ("ndcg@10", "hr@1", "auc")
# What fits into 100 columns; evaluation.json and evaluation.md hold all of METRICS.
TABLE_METRICS = ("hr@1", "hr@5", "hr@10", "ndcg@10", "mrr", "auc")


def evaluate_scores(
    scores_by_model: dict[str, list[np.ndarray]], rows: Dataset, samples: int, seed: int
) -> dict[str, Any]:
    """All metrics of all models with 95 % intervals, and ``dmpo`` (where present) against each other model.

    Args:
        scores_by_model: model name -> per request a float array (1 + K,), the positive first.
        rows: the requests, in the order of the scores.
        samples: bootstrap resamples of the requests, the same ones for every model and metric.

    Returns:
        ``models`` (name -> metric -> value, low, high), ``comparisons`` (a list of a, b, metric, difference a - b,
        low, high, p), ``requests``, ``negatives`` (fewest, most) and ``bootstrap`` (samples, seed); plain JSON types.

    Raises:
        ValueError: scores that do not match the rows, or are not finite (names the model and the request).
    """
    sizes = [1 + len(negatives) for negatives in rows["negatives"][:]]
    values = {name: _metric_values(name, scores_by_model[name], sizes) for name in _in_order(scores_by_model)}
    models = {}
    for name, of_model in values.items():
        columns = np.stack([of_model[metric] for metric in METRICS], axis=1)  # (n_requests, n_metrics)
        interval = np.stack(bootstrap_interval(columns, samples, seed), axis=1).tolist()
        models[name] = {
            metric: {"value": value, "low": low, "high": high}
            for metric, (value, low, high) in zip(METRICS, interval, strict=True)
        }
    others = [name for name in values if name != "dmpo"] if "dmpo" in values else []
    return {
        "requests": len(sizes),
        "negatives": {"fewest": min(sizes) - 1, "most": max(sizes) - 1},
        "bootstrap": {"samples": samples, "seed": seed},
        "models": models,
        "comparisons": [c for other in others for c in _compare("dmpo", other, values, samples, seed)],
    }


def write_evaluation(
    folder: Path, evaluation: dict[str, Any], scores_by_model: dict[str, list[np.ndarray]], rows: Dataset
) -> None:
    """Write evaluation.json, evaluation.md and scores.parquet (one row per model, request and candidate).

    All three are complete before the first is moved into ``folder``; an error leaves what was there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".evaluation-") as temporary:
        staged = Path(temporary)
        _write_scores(staged / "scores.parquet", scores_by_model, rows)
        (staged / "evaluation.md").write_text(_markdown(evaluation), encoding="utf-8")
        text = json.dumps(evaluation, indent=2, ensure_ascii=False, allow_nan=False)
        (staged / "evaluation.json").write_text(text + "\n", encoding="utf-8")
        for name in ("scores.parquet", "evaluation.md", "evaluation.json"):
            os.replace(staged / name, folder / name)


def evaluation_table(evaluation: dict[str, Any]) -> Table:
    """The main metrics, one row per model, each value above its 95 % interval; the best but the oracle's in bold."""
    table = Table(title=_caption(evaluation), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", no_wrap=True)
    for metric in TABLE_METRICS:
        table.add_column(metric, justify="right", no_wrap=True)
    best = _best(evaluation)
    for name in _in_order(evaluation["models"]):
        cells = []
        for metric in TABLE_METRICS:
            cell = evaluation["models"][name][metric]
            is_best = name != "oracle" and cell["value"] == best.get(metric)
            value = (f"{cell['value']:.3f}", "bold" if is_best else "")
            cells.append(Text.assemble(value, "\n", (f"{cell['low']:.3f}\u2013{cell['high']:.3f}", "dim")))
        table.add_row(name, *cells)
    return table


def comparison_lines(evaluation: dict[str, Any]) -> list[str]:
    """One line per comparison: "dmpo against sft: ndcg@10 +0.021 [0.008, 0.034], paired over 812 users"."""
    lines = []
    for c in evaluation["comparisons"]:
        unclear = " (no clear difference)" if c["low"] <= 0 <= c["high"] else ""
        lines.append(
            f"{c['a']} against {c['b']}: {c['metric']} {c['difference']:+.3f} [{c['low']:.3f}, {c['high']:.3f}], "
            f"paired over {evaluation['requests']} users{unclear}"
        )
    return lines


def _metric_values(name: str, scores: list[np.ndarray], sizes: list[int]) -> dict[str, np.ndarray]:
    _check_sizes(name, scores, sizes)
    try:
        return ranking_metrics(scores)
    except ValueError as error:
        raise ValueError(f"scores of {name}: {error}") from None


def _check_sizes(name: str, scores: list[np.ndarray], sizes: list[int]) -> None:
    if len(scores) != len(sizes):
        raise ValueError(f"scores of {name}: {len(scores)} requests scored, but there are {len(sizes)}")
    for request, (candidates, size) in enumerate(zip(scores, sizes, strict=True)):
        if len(candidates) != size:
            raise ValueError(f"scores of {name}: request {request} has {size} candidates, but {len(candidates)} scores")


def _compare(a: str, b: str, values: dict[str, dict[str, np.ndarray]], samples: int, seed: int) -> list[dict[str, Any]]:
    columns = [np.stack([values[name][metric] for metric in COMPARED_METRICS], axis=1) for name in (a, b)]
    differences = paired_bootstrap(columns[0], columns[1], samples, seed)
    results = np.stack(differences, axis=1).tolist()
    return [
        {"a": a, "b": b, "metric": metric, "difference": difference, "low": low, "high": high, "p": p}
        for metric, (difference, low, high, p) in zip(COMPARED_METRICS, results, strict=True)
    ]


def _write_scores(path: Path, scores_by_model: dict[str, list[np.ndarray]], rows: Dataset) -> None:
    titles = [[p, *n] for p, n in zip(rows["positive"][:], rows["negatives"][:], strict=True)]
    items = [[p, *n] for p, n in zip(rows["positive_item"][:], rows["negative_items"][:], strict=True)]
    sizes = [len(candidates) for candidates in titles]
    request = np.repeat(np.arange(len(sizes)), sizes)
    first = np.cumsum(sizes) - sizes
    candidates = {
        "request": pa.array(request),
        "user": pa.array(rows["user"][:], pa.string()).take(pa.array(request)),
        "timestamp": pa.array(np.repeat(rows["timestamp"][:], sizes), pa.int64()),
        "item": pa.array([item for group in items for item in group], pa.string()),
        "title": pa.array([title for group in titles for title in group], pa.string()),
        "is_positive": pa.array(np.isin(np.arange(len(request)), first)),
    }
    writer = None
    try:
        for name in _in_order(scores_by_model):
            _check_sizes(name, scores_by_model[name], sizes)
            scores = pa.array(np.concatenate(scores_by_model[name]), pa.float64())
            table = pa.table({**candidates, "model": pa.repeat(name, len(request)), "score": scores})
            writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
            writer.write_table(table)
    finally:
        if writer:
            writer.close()


def _markdown(evaluation: dict[str, Any]) -> str:
    best = _best(evaluation)
    lines = ["# Evaluation", "", _caption(evaluation) + ".", ""]
    lines += ["| model | " + " | ".join(METRICS) + " |", "|---|" + "---:|" * len(METRICS)]
    for name in _in_order(evaluation["models"]):
        cells = []
        for metric in METRICS:
            cell = evaluation["models"][name][metric]
            value = f"{cell['value']:.3f}"
            if name != "oracle" and cell["value"] == best[metric]:
                value = f"**{value}**"
            cells.append(f"{value} ({cell['low']:.3f}\u2013{cell['high']:.3f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "Best in bold, the oracle apart. auc averages over requests, pair_accuracy pools all pairs."]
    if evaluation["comparisons"]:
        lines += ["", "## Paired comparisons", "", *(f"- {line}" for line in comparison_lines(evaluation))]
    return "\n".join(lines) + "\n"


def _caption(evaluation: dict[str, Any]) -> str:
    fewest, most = evaluation["negatives"]["fewest"], evaluation["negatives"]["most"]
    negatives = f"{fewest} negatives each" if fewest == most else f"{fewest} to {most} negatives each"
    return (
        f"{evaluation['requests']} requests, {negatives}; "
        f"95 % intervals from {evaluation['bootstrap']['samples']} bootstrap resamples"
    )


def _best(evaluation: dict[str, Any]) -> dict[str, float]:
    """The highest value of each metric among the models a user could deploy."""
    candidates = [of_model for name, of_model in evaluation["models"].items() if name != "oracle"]
    return {metric: max(c[metric]["value"] for c in candidates) for metric in METRICS if candidates}


def _in_order(names: dict[str, Any]) -> list[str]:
    known = [name for name in MODEL_ORDER if name in names]
    return known + [name for name in names if name not in MODEL_ORDER]
