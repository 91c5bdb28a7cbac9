"""Tables of evaluations for the page."""

from collections.abc import Collection, Iterable, Mapping

from dmpo_dist.artifacts.evaluation import Comparison, Evaluation, Metrics
from dmpo_dist.evaluation import tables
from dmpo_dist.evaluation.comparisons import seeds_note
from dmpo_dist.evaluation.metrics import METRICS, sure_hits
from dmpo_dist.evaluation.tables import CATALOGUE_LISTS
from dmpo_dist.formats import interval, metric_name, number
from dmpo_dist.tables import Cell, Table
from dmpo_dist.verdicts import Judged, judge

FIRST = ("ndcg@10", "hr@1", "hr@5", "hr@10", "ndcg@5", "mrr", "auc", "pair_accuracy", *CATALOGUE_LISTS)
"""Metrics of the tables that are shown open, the most important ones first, as a phone shows two columns."""
ORDER = tuple(dict.fromkeys((*FIRST, *METRICS)))


def metrics_table(
    caption: str, models: Mapping[str, Metrics], left_out: Collection[str] = (), seeds: tables.BySeed | None = None
) -> Table:
    """A row for each model, a column for each metric that one of them has, without those in ``left_out``."""
    there = dict.fromkeys(metric for metrics in models.values() for metric in metrics if metric not in left_out)
    columns = [m for m in ORDER if m in there] + [m for m in there if m not in ORDER]
    figures = {name: {m: figure.model_dump() for m, figure in metrics.items()} for name, metrics in models.items()}
    return tables.metrics_table(caption, figures, columns, seeds or {}, heading=metric_name)


def first_metrics(models: Mapping[str, Metrics]) -> dict[str, Metrics]:
    """The models with the metrics of FIRST alone, or with all metrics if a model has none of FIRST."""
    short = {name: {m: figure for m, figure in metrics.items() if m in FIRST} for name, metrics in models.items()}
    return short if all(short.values()) else dict(models)


def comparisons_table(evaluation: Evaluation) -> Table:
    """A row for each pair of models, a column for each metric; clear differences are strong."""
    metrics = list(dict.fromkeys(c.metric for c in evaluation.comparisons))
    by_pair: dict[tuple[str, str], dict[str, tuple[Comparison, Judged]]] = {}
    for c, verdict in zip(evaluation.comparisons, judged(evaluation.comparisons), strict=True):
        by_pair.setdefault((c.a, c.b), {})[c.metric] = (c, verdict)
    rows = []
    for (a, b), of_pair in by_pair.items():
        seeds = next(iter(of_pair.values()))[0].seeds
        note = seeds_note(seeds, evaluation.seeds.get(a, {}), evaluation.seeds.get(b, {}))
        differences = [
            _difference_cell(*of_pair[metric]) if metric in of_pair else Cell(number(None)) for metric in metrics
        ]
        rows.append([Cell(f"{a} \u2212 {b}", note, "code"), *differences])
    caption = f"Mean differences over the same {evaluation.requests} users, their 95 % intervals and corrected p-values"
    return Table(caption, ["models", *map(metric_name, metrics)], rows, sortable=len(rows) > 2)


def judged(comparisons: Iterable[Comparison]) -> list[Judged]:
    """Those on all comparisons of an evaluation, which every table, figure and sentence of the page goes by."""
    return judge((c.low, c.high, c.p) for c in comparisons)


def seeds_table(evaluation: Evaluation) -> Table:
    """For each model with seeds the mean over them, and the lowest and highest seed."""
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


def _difference_cell(c: Comparison, verdict: Judged) -> Cell:
    p = "" if verdict.p is None else f", p {number(verdict.p)}"
    kind = "strong" if verdict.clear else ""
    return Cell(number(c.difference, "+.3f"), interval(c.low, c.high, "+.3f") + p, kind, c.difference)
