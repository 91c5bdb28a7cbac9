"""Interval charts of evaluations: all models, paired differences, strata."""

from collections.abc import Mapping, Sequence
from typing import get_args

from dmpo_dist.artifacts.evaluation import Comparison, Evaluation, Metrics, Stratum
from dmpo_dist.config.evaluation import Baseline
from dmpo_dist.report.svg import Figure, IntervalRow, interval_chart
from dmpo_dist.report.words import interval, metric_name, number

MAIN_METRICS = ("ndcg@10", "hr@1")
BLUE, ORANGE, GREEN, PURPLE, GREY = range(5)
BASELINES = get_args(Baseline)
ENDS = ("random", "untuned", "oracle")
"""Models that are far from all others."""
STRATA_MODELS = 4


def model_figures(evaluation: Evaluation) -> list[Figure]:
    """The main metrics with a row per model: trained ones blue, the others grey, the oracle hollow."""
    return [
        _metric_figure(metric_name(metric), evaluation.models, metric, evaluation.trained)
        for metric in MAIN_METRICS
        if any(metric in metrics for metrics in evaluation.models.values())
    ]


def comparison_figures(comparisons: Sequence[Comparison]) -> list[Figure]:
    """Per metric the differences between models; those to ENDS stay in the table, or nothing else could be seen.

    Rows are grouped by what fewer models stand on: one against many, or many against one.
    """
    comparisons = [c for c in comparisons if not {c.a, c.b} & {*ENDS}] or comparisons
    by_second = len({c.b for c in comparisons}) < len({c.a for c in comparisons})
    figures = []
    for metric in dict.fromkeys(c.metric for c in comparisons):
        mine = [c for c in comparisons if c.metric == metric]
        rows, words = [], []
        for shared in dict.fromkeys(c.b if by_second else c.a for c in mine):
            rows.append(IntervalRow(f"minus {shared}" if by_second else f"{shared} minus"))
            for c in (c for c in mine if shared == (c.b if by_second else c.a)):
                colour = GREY if c.low <= 0 <= c.high else BLUE if c.low > 0 else ORANGE
                rows.append(IntervalRow(c.a if by_second else c.b, c.difference, c.low, c.high, colour))
                difference = f"{number(c.difference, '+.3f')} {interval(c.low, c.high, '+.3f')}"
                words.append(f"{c.a} minus {c.b} {difference}")
        chart = interval_chart(rows, f"{metric_name(metric)}: {'; '.join(words)}", zero=True)
        figures.append(Figure(metric_name(metric), chart))
    return figures


def strata_figures(evaluation: Evaluation) -> dict[str, list[Figure]]:
    """For each way to part the requests, a figure per main metric with the trained models and the best baseline."""
    shown = _models_for_strata(evaluation)
    figures = {}
    for way, strata in evaluation.strata.items():
        there = {m for s in strata.values() for metrics in s.models.values() for m in metrics}
        metrics = [m for m in MAIN_METRICS if m in there] or sorted(there)[:1]
        figures[way] = [_strata_figure(metric, strata, shown) for metric in metrics]
    return figures


def _strata_figure(metric: str, strata: Mapping[str, Stratum], shown: Sequence[str]) -> Figure:
    rows, words = [], []
    for name, stratum in strata.items():
        rows.append(IntervalRow(f"{name} ({stratum.requests} requests)"))
        for style, model in enumerate(shown):
            figure = stratum.models.get(model, {}).get(metric)
            if figure is not None:
                rows.append(IntervalRow(model, figure.value, figure.low, figure.high, style))
                words.append(f"{name}, {model} {figure.value:.3f} {interval(figure.low, figure.high)}")
    chart = interval_chart(rows, f"{metric_name(metric)} by stratum: {'; '.join(words)}")
    return Figure(metric_name(metric), chart)


def _models_for_strata(evaluation: Evaluation) -> list[str]:
    """The best STRATA_MODELS - 1 trained models by the main metric, then the best of the others but the oracle."""
    ranked = sorted(evaluation.models, key=lambda name: -_main(evaluation.models[name]))
    trained = [name for name in ranked if name in evaluation.trained]
    others = [name for name in ranked if name not in evaluation.trained and name not in ENDS]
    return trained[: STRATA_MODELS - 1] + others[: max(1, STRATA_MODELS - len(trained))]


def _main(metrics: Metrics) -> float:
    return next((metrics[m].value for m in MAIN_METRICS if m in metrics), 0.0)


def _metric_figure(title: str, models: Mapping[str, Metrics], metric: str, trained: Mapping[str, str]) -> Figure:
    rows, words = [], []
    for name, metrics in models.items():
        if metric not in metrics:
            continue
        figure = metrics[metric]
        colour = GREEN if name == "oracle" else BLUE if name in trained else GREY
        rows.append(IntervalRow(name, figure.value, figure.low, figure.high, colour, hollow=name == "oracle"))
        words.append(f"{name} {figure.value:.3f} {interval(figure.low, figure.high)}")
    return Figure(title, interval_chart(rows, f"{title} of each model: {'; '.join(words)}"))
