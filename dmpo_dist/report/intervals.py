"""Interval plots of evaluations: all models, paired differences, strata."""

from collections.abc import Mapping, Sequence

from dmpo_dist.artifacts.evaluation import Comparison, Evaluation, Metrics, Stratum
from dmpo_dist.figures.intervals import IntervalRow, interval_drawing
from dmpo_dist.figures.style import BLUE, GREEN, GREY, ORANGE, Drawing, Look, looks
from dmpo_dist.formats import metric_name

MAIN_METRICS = ("ndcg@10", "hr@1")
ENDS = ("random", "untuned", "oracle")
"""Models whose figures are usually far from all others."""
STRATA_MODELS = 4


def model_drawings(evaluation: Evaluation) -> list[Drawing]:
    """A drawing of each main metric with a row for each model: trained ones blue, others grey, the oracle hollow."""
    drawings = []
    for metric in MAIN_METRICS:
        rows = []
        for name, metrics in evaluation.models.items():
            colour = GREEN if name == "oracle" else BLUE if name in evaluation.trained else GREY
            rows += _rows(name, metrics, metric, colour, hollow=name == "oracle")
        if rows:
            drawings.append(interval_drawing(metric_name(metric), rows))
    return drawings


def comparison_drawings(comparisons: Sequence[Comparison]) -> list[Drawing]:
    """A drawing of each metric with the differences between models, grouped by the model that several rows share.

    Differences from ENDS are left to the table, as beside such large ones no other could be read.
    """
    comparisons = [c for c in comparisons if not {c.a, c.b} & {*ENDS}] or comparisons
    by_second = len({c.b for c in comparisons}) < len({c.a for c in comparisons})
    drawings = []
    for metric in dict.fromkeys(c.metric for c in comparisons):
        of_metric = [c for c in comparisons if c.metric == metric]
        rows = []
        for shared in dict.fromkeys(c.b if by_second else c.a for c in of_metric):
            rows.append(IntervalRow(f"minus {shared}" if by_second else f"{shared} minus"))
            for c in (c for c in of_metric if shared == (c.b if by_second else c.a)):
                colour = GREY if c.low <= 0 <= c.high else BLUE if c.low > 0 else ORANGE
                rows.append(IntervalRow(c.a if by_second else c.b, c.difference, c.low, c.high, colour))
        drawings.append(interval_drawing(metric_name(metric), rows, zero=True))
    return drawings


def strata_drawings(evaluation: Evaluation, strata: Mapping[str, Stratum]) -> list[Drawing]:
    """A drawing per main metric with the best trained models and the best baseline in each of ``strata``."""
    shown = _models_for_strata(evaluation)
    there = {m for s in strata.values() for metrics in s.models.values() for m in metrics}
    drawings = []
    for metric in [m for m in MAIN_METRICS if m in there] or sorted(there)[:1]:
        rows = []
        for name, stratum in strata.items():
            rows.append(IntervalRow(f"{name} ({stratum.requests} requests)"))
            for model, look in shown.items():
                rows += _rows(model, stratum.models.get(model, {}), metric, look.colour)
        drawings.append(interval_drawing(metric_name(metric), rows))
    return drawings


def _models_for_strata(evaluation: Evaluation) -> dict[str, Look]:
    """The best STRATA_MODELS - 1 trained models by the main metric, then the best of the others except ENDS."""
    ranked = sorted(evaluation.models, key=lambda name: -_main(evaluation.models[name]))
    trained = [name for name in ranked if name in evaluation.trained]
    others = [name for name in ranked if name not in evaluation.trained and name not in ENDS]
    return looks(trained[: STRATA_MODELS - 1] + others[: max(1, STRATA_MODELS - len(trained))])


def _main(metrics: Metrics) -> float:
    return next((metrics[m].value for m in MAIN_METRICS if m in metrics), 0.0)


def _rows(name: str, metrics: Metrics, metric: str, colour: str, hollow: bool = False) -> list[IntervalRow]:
    """One row, or none where ``metric`` was not measured."""
    figure = metrics.get(metric)
    return [IntervalRow(name, figure.value, figure.low, figure.high, colour, hollow)] if figure else []
