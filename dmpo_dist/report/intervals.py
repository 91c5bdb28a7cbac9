"""Interval plots of evaluations: all models, paired differences, strata."""

from collections.abc import Mapping, Sequence

from dmpo_dist.artifacts.evaluation import Comparison, Evaluation, Metrics, Stratum
from dmpo_dist.figures.intervals import IntervalRow, interval_drawing
from dmpo_dist.figures.style import GREY, Drawing, Look
from dmpo_dist.formats import metric_name
from dmpo_dist.report.tables import judged

MAIN_METRICS = ("ndcg@10", "hr@1")
ENDS = ("random", "untuned", "oracle")
"""Models whose figures are usually far from all others."""
STRATA_MODELS = 4


Looks = Mapping[str, Look]
"""Model -> its look on the page; a model without one is grey."""


def model_drawings(evaluation: Evaluation, looks: Looks) -> list[Drawing]:
    """A drawing of each main metric with a row for each model, the oracle a ring."""
    drawings = []
    for metric in MAIN_METRICS:
        rows = []
        for name, metrics in evaluation.models.items():
            rows += _rows(name, metrics, metric, _colour(looks, name), hollow=name == "oracle")
        if rows:
            drawings.append(interval_drawing(metric_name(metric), rows))
    return drawings


def comparison_drawings(comparisons: Sequence[Comparison], looks: Looks) -> list[Drawing]:
    """A drawing of each metric with the differences between models, grouped by the model that several rows share.

    A row has the colour of its other model, and a ring where the difference is not clear. Differences from ENDS are
    left to the table, as beside such large ones no other could be read.
    """
    verdicts = list(zip(comparisons, judged(comparisons), strict=True))
    shown = [(c, v) for c, v in verdicts if not {c.a, c.b} & {*ENDS}] or verdicts
    by_second = len({c.b for c, _ in shown}) < len({c.a for c, _ in shown})
    drawings = []
    for metric in dict.fromkeys(c.metric for c, _ in shown):
        of_metric = [(c, v) for c, v in shown if c.metric == metric]
        rows = []
        for shared in dict.fromkeys(c.b if by_second else c.a for c, _ in of_metric):
            rows.append(IntervalRow(f"minus {shared}" if by_second else f"{shared} minus"))
            for c, verdict in of_metric:
                if shared == (c.b if by_second else c.a):
                    other = c.a if by_second else c.b
                    colour = _colour(looks, other)
                    rows.append(IntervalRow(other, c.difference, c.low, c.high, colour, hollow=not verdict.clear))
        drawings.append(interval_drawing(metric_name(metric), rows, zero=True))
    return drawings


def strata_drawings(evaluation: Evaluation, strata: Mapping[str, Stratum], looks: Looks) -> list[Drawing]:
    """A drawing per main metric with the best trained models and the best baseline in each of ``strata``."""
    shown = _models_for_strata(evaluation)
    there = {m for s in strata.values() for metrics in s.models.values() for m in metrics}
    drawings = []
    for metric in [m for m in MAIN_METRICS if m in there] or sorted(there)[:1]:
        rows = []
        for name, stratum in strata.items():
            rows.append(IntervalRow(f"{name} ({stratum.requests} requests)"))
            for model in shown:
                rows += _rows(model, stratum.models.get(model, {}), metric, _colour(looks, model))
        drawings.append(interval_drawing(metric_name(metric), rows))
    return drawings


def _models_for_strata(evaluation: Evaluation) -> list[str]:
    """The best STRATA_MODELS - 1 trained models by the main metric, then the best of the others except ENDS."""
    ranked = sorted(evaluation.models, key=lambda name: -_main(evaluation.models[name]))
    trained = [name for name in ranked if name in evaluation.trained]
    others = [name for name in ranked if name not in evaluation.trained and name not in ENDS]
    return trained[: STRATA_MODELS - 1] + others[: max(1, STRATA_MODELS - len(trained))]


def _colour(looks: Looks, model: str) -> str:
    return looks[model].colour if model in looks else GREY


def _main(metrics: Metrics) -> float:
    return next((metrics[m].value for m in MAIN_METRICS if m in metrics), 0.0)


def _rows(name: str, metrics: Metrics, metric: str, colour: str, hollow: bool = False) -> list[IntervalRow]:
    """One row, or none where ``metric`` was not measured."""
    figure = metrics.get(metric)
    return [IntervalRow(name, figure.value, figure.low, figure.high, colour, hollow)] if figure else []
