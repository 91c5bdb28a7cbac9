"""Tables as the page draws them, and those of evaluations."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from dmpo_dist.artifacts.evaluation import Comparison, Evaluation, Metrics
from dmpo_dist.evaluation.metrics import METRICS, sure_hits
from dmpo_dist.evaluation.tables import seeds_note
from dmpo_dist.report.words import interval, metric_name, number, verdict

NOT_BETTER = ("coverage@10", "gini@10")
"""More of them is neither better nor worse."""
FIRST = ("ndcg@10", "hr@1", "hr@5", "hr@10", "ndcg@5", "mrr", "auc", "pair_accuracy", *NOT_BETTER)
"""Columns that are not folded; what matters most comes first, as a phone shows two."""
ORDER = tuple(dict.fromkeys((*FIRST, *METRICS)))


@dataclass(frozen=True)
class Cell:
    """A cell's text, what stands small below it, and how it looks.

    Attributes:
        kind: classes of the style sheet: "title" for a text from the data, "strong", "code", "warn", "h0".."h4".
        key: what to sort by, where it is not the text.
        chart: a small picture beside the text.
    """

    text: str
    below: str = ""
    kind: str = ""
    key: float | None = None
    chart: Markup | None = None


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row names it.

    Attributes:
        caption: what it shows.
        columns: headings.
        rows: as many cells as headings each.
        text_columns: how many from the left are text, the others are numbers.
        sortable: whether its order may be changed by its headings.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    text_columns: int = 1
    sortable: bool = False


def metrics_table(caption: str, models: Mapping[str, Metrics], left_out: Collection[str] = ()) -> Table:
    """A row per model, a column per metric that one of them has but ``left_out``; the best but the oracle's is strong."""
    there = dict.fromkeys(metric for metrics in models.values() for metric in metrics if metric not in left_out)
    columns = [m for m in ORDER if m in there] + [m for m in there if m not in ORDER]
    best = {}
    for metric in (m for m in columns if m not in NOT_BETTER):
        values = [m[metric].value for name, m in models.items() if name != "oracle" and metric in m]
        best[metric] = max(values, default=None)
    rows = [
        [
            Cell(name, kind="code"),
            *(_metric_cell(metrics, metric, name != "oracle", best.get(metric)) for metric in columns),
        ]
        for name, metrics in models.items()
    ]
    return Table(caption, ["model", *map(metric_name, columns)], rows, sortable=len(rows) > 2)


def first_metrics(models: Mapping[str, Metrics]) -> dict[str, Metrics]:
    """The models with FIRST alone, or with all where one has none of these."""
    short = {name: {m: figure for m, figure in metrics.items() if m in FIRST} for name, metrics in models.items()}
    return short if all(short.values()) else dict(models)


def comparisons_table(evaluation: Evaluation) -> Table:
    """A row per pair of models, a column per metric; differences whose interval leaves out 0 are strong."""
    metrics = list(dict.fromkeys(c.metric for c in evaluation.comparisons))
    by_pair: dict[tuple[str, str], dict[str, Comparison]] = {}
    for c in evaluation.comparisons:
        by_pair.setdefault((c.a, c.b), {})[c.metric] = c
    rows = [
        [
            Cell(f"{a} \u2212 {b}", _seeds_note(evaluation, of_pair), "code"),
            *(_difference_cell(of_pair.get(metric)) for metric in metrics),
        ]
        for (a, b), of_pair in by_pair.items()
    ]
    caption = f"Mean differences over the same {evaluation.requests} users, their 95 % intervals and bootstrap p-values"
    return Table(caption, ["models", *map(metric_name, metrics)], rows, sortable=len(rows) > 2)


def seeds_table(evaluation: Evaluation) -> Table:
    """Mean over seeds, the smallest and the largest."""
    seeds = evaluation.seeds
    there = {m for of_model in seeds.values() for of_seed in of_model.values() for m in of_seed}
    metrics = [m for m in FIRST if m in there.difference(sure_hits(evaluation.most_negatives))]
    rows = []
    for name, of_model in seeds.items():
        cells = [Cell(name, kind="code"), Cell(str(len(of_model)))]
        for metric in metrics:
            values = [of_seed[metric] for of_seed in of_model.values() if metric in of_seed]
            mean = sum(values) / len(values) if values else None
            spread = f"{min(values):.3f} to {max(values):.3f}" if values else ""
            cells.append(Cell(number(mean), spread, key=mean))
        rows.append(cells)
    caption = "Over training seeds: the mean, and from the lowest seed to the highest"
    return Table(caption, ["model", "seeds", *map(metric_name, metrics)], rows, sortable=len(rows) > 2)


def _seeds_note(evaluation: Evaluation, of_pair: Mapping[str, Comparison]) -> str:
    c = next(iter(of_pair.values()))
    return seeds_note(c.seeds, evaluation.seeds.get(c.a, {}), evaluation.seeds.get(c.b, {}))


def _difference_cell(c: Comparison | None) -> Cell:
    if c is None:
        return Cell(number(None))
    clear = "strong" if verdict(c.low, c.high) != "level with" else ""
    p = "" if c.p is None else f", p {number(c.p)}"
    return Cell(number(c.difference, "+.3f"), interval(c.low, c.high, "+.3f") + p, clear, c.difference)


def _metric_cell(metrics: Metrics, metric: str, ranked: bool, best: float | None) -> Cell:
    if metric not in metrics:
        return Cell(number(None))
    figure = metrics[metric]
    strong = "strong" if ranked and figure.value == best else ""
    return Cell(number(figure.value), interval(figure.low, figure.high), strong, figure.value)
