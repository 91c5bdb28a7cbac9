"""From the scores of several models to one comparison, and the files that hold it: JSON, Markdown, Parquet."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from dmpo_dist.artifacts.evaluation import SCORES_FILE, Comparison, Evaluation
from dmpo_dist.artifacts.files import json_text, whole_file
from dmpo_dist.evaluation.comparisons import COMPARED_METRICS
from dmpo_dist.evaluation.metrics import METRICS, bootstrap_p, ranking_metrics
from dmpo_dist.evaluation.seeds import SeededValues, on_common_seeds, stacked
from dmpo_dist.evaluation.strata import Strata, cells, strata_figures
from dmpo_dist.evaluation.tables import TABLE_METRICS, in_order, markdown

SUBJECTS = ("dmpo", "dmpo_likelihood")
"""Models that are compared with all others unless something else is asked for."""


def evaluate_scores(
    scores_by_model: dict[str, list[np.ndarray]],
    rows: Dataset,
    samples: int,
    seed: int,
    strata: Mapping[str, Strata] | None = None,
    against: Sequence[str] = (),
    starts: Mapping[str, str] | None = None,
) -> Evaluation:
    """All metrics of all models with 95 % intervals, by stratum, and models against each other.

    Models named ``name@seed`` are one model ``name`` (see ``evaluation/seeds.py``).

    Args:
        scores_by_model: model name -> per request a float array (1 + K,), the positive first.
        rows: the requests, in the order of the scores.
        samples: bootstrap resamples of the requests, the same ones for every model and metric.
        strata: groups of the requests to look at by themselves.
        against: models that all others are compared with, each pair once; none compares each of ``SUBJECTS`` that is
            present with all others.
        starts: model -> the model that its stage started from, which it is compared with for itself.

    Returns:
        Intervals of all models, means of each seed, strata and comparisons; what the figures are of (data, folders,
        notes) is for the caller to add.

    Raises:
        ValueError: scores that do not match the rows, or are not finite (names the model and the request).
    """
    sizes = [1 + len(negatives) for negatives in rows["negatives"][:]]
    found = stacked({name: _metric_values(name, scores, sizes) for name, scores in scores_by_model.items()})
    values = {name: found[name] for name in in_order(found)}
    subjects = [name for name in SUBJECTS if name in values]
    pairs = [(a, b) for i, a in enumerate(subjects) for b in values if b not in subjects[: i + 1]]
    if against:
        # two names that are both compared with all others make one pair, under the first
        against = list(dict.fromkeys(against))
        pairs = [(o, one) for i, one in enumerate(against) for o in values if o not in against[: i + 1]]
    of_starts = [(name, start) for name, start in (starts or {}).items()]
    compared = {
        name: _only(values[name], COMPARED_METRICS)
        for name in dict.fromkeys(n for pair in [*pairs, *of_starts] for n in pair)
    }
    shown = {name: _only(of_model, TABLE_METRICS) for name, of_model in values.items()}
    evaluation = Evaluation(
        requests=len(sizes),
        negatives={"fewest": min(sizes) - 1, "most": max(sizes) - 1},
        bootstrap={"samples": samples, "seed": seed},
        models={name: cells(METRICS, of_model.interval(samples, seed)) for name, of_model in values.items()},
        seeds={name: _by_seed(of_model) for name, of_model in values.items() if of_model.seeds != ("",)},
        strata=strata_figures(strata or {}, shown, TABLE_METRICS, samples, seed),
        comparisons=_comparisons(pairs, compared, samples, seed),
    )
    if of_starts:
        evaluation.against_start = _comparisons(of_starts, compared, samples, seed)
    return evaluation


def write_evaluation(
    folder: Path, evaluation: Evaluation, scores_by_model: dict[str, list[np.ndarray]], rows: Dataset
) -> None:
    """Write evaluation.json, evaluation.md and scores.parquet (one row per model, request and candidate).

    All three are complete before the first is moved into ``folder``; an error leaves what was there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = evaluation.content()
    files = (whole_file(folder / name) for name in (Evaluation.FILE, "evaluation.md", SCORES_FILE))
    with ExitStack() as stack:  # moves the last one first, so that evaluation.json comes when the others are there
        figures, text, scores = map(stack.enter_context, files)
        _write_scores(scores, scores_by_model, rows)
        text.write_text(markdown(content), encoding="utf-8")
        figures.write_text(json_text(content), encoding="utf-8")


def _metric_values(name: str, scores: list[np.ndarray], sizes: list[int]) -> np.ndarray:
    """(n_requests, n_metrics), in the order of ``METRICS``."""
    _check_sizes(name, scores, sizes)
    try:
        values = ranking_metrics(scores)
    except ValueError as error:
        raise ValueError(f"scores of {name}: {error}") from None
    return np.stack([values[metric] for metric in METRICS], axis=1)


def _check_sizes(name: str, scores: list[np.ndarray], sizes: list[int]) -> None:
    if len(scores) != len(sizes):
        raise ValueError(f"scores of {name}: {len(scores)} requests scored, but there are {len(sizes)}")
    for request, (candidates, size) in enumerate(zip(scores, sizes, strict=True)):
        if len(candidates) != size:
            raise ValueError(f"scores of {name}: request {request} has {size} candidates, but {len(candidates)} scores")


def _only(values: SeededValues, metrics: Sequence[str]) -> SeededValues:
    return SeededValues(values.seeds, values.values[:, :, [METRICS.index(metric) for metric in metrics]])


def _by_seed(values: SeededValues) -> dict[str, dict[str, float]]:
    return {
        label: dict(zip(METRICS, row.tolist(), strict=True))
        for label, row in zip(values.seeds, values.by_seed(), strict=True)
    }


def _comparisons(
    pairs: Sequence[tuple[str, str]], values: Mapping[str, SeededValues], samples: int, seed: int
) -> list[Comparison]:
    """Of all pairs, by differences over the same drawn users, and over the same drawn seeds where they share some.

    Args:
        values: name -> what each user contributes to ``COMPARED_METRICS``.
    """
    drawn: dict[tuple[str, tuple[str, ...]], np.ndarray] = {}
    entries = []
    for a, b in pairs:
        of_pair = on_common_seeds(values[a], values[b])
        for name, of_model in zip((a, b), of_pair, strict=True):
            if (name, of_model.seeds) not in drawn:
                drawn[name, of_model.seeds] = of_model.resampled(samples, seed)
        of_a, of_b = of_pair
        differences = drawn[a, of_a.seeds] - drawn[b, of_b.seeds]
        low, high = np.percentile(differences, [2.5, 97.5], axis=0)
        mean = of_a.mean() - of_b.mean()
        results = np.stack([mean, low, high, bootstrap_p(differences, len(of_a.values))], axis=1).tolist()
        seeds = [label for label in of_a.seeds if label] if of_a.seeds == of_b.seeds else []
        entries += [
            Comparison(a=a, b=b, metric=metric, difference=difference, low=low, high=high, p=p, seeds=seeds)
            for metric, (difference, low, high, p) in zip(COMPARED_METRICS, results, strict=True)
        ]
    return entries


def _write_scores(path: Path, scores_by_model: dict[str, list[np.ndarray]], rows: Dataset) -> None:
    titles = [[p, *n] for p, n in zip(rows["positive"][:], rows["negatives"][:], strict=True)]
    sizes = [len(candidates) for candidates in titles]
    known = [[p, *n] for p, n in zip(rows["positive_item"][:], rows["negative_items"][:], strict=True)]
    # Rows of finished answers have no items.
    items = [ids if len(ids) == size else [None] * size for ids, size in zip(known, sizes, strict=True)]
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
        for name in in_order(scores_by_model):
            _check_sizes(name, scores_by_model[name], sizes)
            scores = pa.array(np.concatenate(scores_by_model[name]), pa.float64())
            table = pa.table({**candidates, "model": pa.repeat(name, len(request)), "score": scores})
            writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
            writer.write_table(table)
    finally:
        if writer:
            writer.close()
