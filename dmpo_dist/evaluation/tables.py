"""An evaluation for people: its tables and sentences, for the terminal, Markdown and the report's page."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table as TerminalTable

from dmpo_dist import tables
from dmpo_dist.config.evaluation import SAME_USERS
from dmpo_dist.evaluation.comparisons import against_start_lines, below_start_lines, comparison_lines
from dmpo_dist.evaluation.metrics import sure_hits
from dmpo_dist.evaluation.sentences import generation_lines, order_line
from dmpo_dist.formats import number
from dmpo_dist.tables import Cell, Table
from dmpo_dist.verdicts import rule

MODEL_ORDER = (
    "random", "popularity", "pop_fitted", "item_knn", "ease", "sasrec", "bert4rec", "untuned", "zero_shot",
    "sft", "sft_continued", "sft_continued_compute", "dpo", "dpo_pairs", "ipo", "simpo", "sdpo", "recpo", "mult_dpo",
    "plackett_luce", "rank_reward", "dmpo", "dmpo_likelihood", "oracle",
)  # fmt: skip
ORACLE = "oracle"
TABLE_METRICS = ("hr@1", "hr@5", "hr@10", "ndcg@10", "mrr", "auc")
"""What fits into 100 columns; evaluation.json and evaluation.md hold more."""
MARKDOWN_METRICS = (
    "hr@1", "hr@5", "hr@10", "hr@20", "ndcg@5", "ndcg@10", "ndcg@20", "mrr", "auc", "pair_accuracy", "pooled_auc",
)  # fmt: skip
CATALOGUE_TERMINAL = ("hr@1", "hr@10", "hr@20", "ndcg@10", "mrr@20")
CATALOGUE_MARKDOWN = ("hr@1", "hr@3", "hr@5", "hr@10", "hr@20", "ndcg@3", "ndcg@5", "ndcg@10", "mrr@20")
CATALOGUE_LISTS = ("coverage@10", "gini@10")
"""Measures of the ranked lists together; more of them is neither better nor worse."""
BEAMS_ROW = re.compile(r"(.+), \d+ beams?")
"""The names that ``beams_row`` gives."""
STRATA_TITLES = {
    "popularity": "By popularity of the positive (head, mid, tail: items that hold a third of the interactions each)",
    "history": "By likes in the history",
    "item_cold": "By how often the positive was taken before, in what baselines are fitted on",
}

Metrics = Mapping[str, Mapping[str, Any]]
"""Metric -> value, and low and high where it has an interval."""
BySeed = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Model -> seed -> metric -> value."""


def in_order(names: Iterable[str]) -> list[str]:
    """Names in the order of ``MODEL_ORDER``, a baseline on the same users after its own; others follow as they come.

    A model by beam search follows the same model by its exact ranking.
    """
    names = list(names)
    exact_of = {name: match[1] for name in names if (match := BEAMS_ROW.fullmatch(name)) and match[1] in names}
    exact = [name for name in names if name not in exact_of]
    known = [name for model in MODEL_ORDER for name in (model, model + SAME_USERS) if name in exact]
    ordered = known + [name for name in exact if name not in known]
    return [one for name in ordered for one in (name, *(row for row, of in exact_of.items() if of == name))]


def metrics_table(
    caption: str,
    models: Mapping[str, Metrics],
    metrics: Sequence[str],
    seeds: BySeed,
    heading: Callable[[str], str] = str,
    note: str = "",
    leading_zero: bool = True,
) -> Table:
    """The table of models and metrics, wherever it is shown: values with 95 % intervals, the best of a column strong.

    Strong are all that print the best value, which says nothing of differences; the oracle never is. A model of several
    seeds has the standard deviation over them behind each value.

    Args:
        models: rows, in their order.
        metrics: columns, in their order; a model without a metric has a dash there.
        heading: how a metric is named.
        leading_zero: False writes intervals as .501, for narrow terminals.
    """
    best = _best(models)
    rows = []
    for name, of_model in models.items():
        of_seeds = seeds.get(name, {})
        row = [Cell(name, f"{len(of_seeds)} seeds" if of_seeds else "", "code")]
        for metric in metrics:
            if metric not in of_model:
                row.append(Cell(number(None)))
                continue
            value = of_model[metric]["value"]
            strong = "strong" if name != ORACLE and number(value) == number(best.get(metric)) else ""
            interval = _interval(of_model[metric], leading_zero)
            row.append(Cell(number(value) + _deviation(of_seeds, metric), interval, strong, value))
        rows.append(row)
    return Table(caption, ["model", *map(heading, metrics)], rows, sortable=len(rows) > 2, note=note)


def evaluation_table(evaluation: dict[str, Any]) -> TerminalTable:
    """The main metrics for the terminal."""
    note = left_out_line(TABLE_METRICS, evaluation["negatives"]["most"]) or ""
    return tables.terminal(_models(evaluation, TABLE_METRICS, note))


def left_out_line(metrics: Sequence[str], negatives: int) -> str | None:
    """Names those of ``metrics`` that are 1 for every model among so few negatives, so that no table shows them.

    None if there is none.
    """
    absent = [metric for metric in metrics if metric in sure_hits(negatives)]
    if not absent:
        return None
    return f"Not shown as it is 1 in any order of {1 + negatives} candidates: {', '.join(absent)}"


def catalogue_table(result: dict[str, Any], requests: int) -> TerminalTable:
    """The main metrics among the whole catalogue, for the terminal."""
    return tables.terminal(_catalogue(result, requests, CATALOGUE_TERMINAL, leading_zero=False))


def rules_table(evaluation: dict[str, Any], metrics: Sequence[str] = TABLE_METRICS) -> Table:
    """A row per language model and scoring rule."""
    rules = evaluation["rules"]
    models = {f"{m} {rule}": rules["models"][m][rule] for m in in_order(rules["models"]) for rule in rules["models"][m]}
    shown = [metric for metric in metrics if metric not in sure_hits(evaluation["negatives"]["most"])]
    return metrics_table("Language models by scoring rule", models, shown, {}, note=rules_note(rules["chosen"]))


def rules_note(chosen: Mapping[str, Mapping[str, Any]]) -> str:
    """Which rule is in use, and what the prior's weight is, by model."""
    parts = []
    for name, of_model in chosen.items():
        weight = of_model.get("prior_weight")
        parts.append(f"{name} by {of_model['rule']}" + (f" (prior's weight {weight:g})" if weight is not None else ""))
    on_validation = any(of_model.get("validation") for of_model in chosen.values())
    return f"In use: {', '.join(parts)}" + "; chosen on validation" * on_validation


def markdown(evaluation: dict[str, Any]) -> str:
    """``evaluation.md``: everything but the per-candidate scores."""
    models = _models(evaluation, MARKDOWN_METRICS)
    notes = [*evaluation.get("notes", []), *below_start_lines(evaluation)]
    blocks = ["# Evaluation", models.caption + ".", _list(notes), tables.markdown(models)]
    blocks.append(
        "Best in bold, the oracle apart. auc averages over requests, pair_accuracy pools all pairs of a request, "
        "pooled_auc all candidates of all requests. One positive each, so recall@k is hr@k."
    )
    left_out = left_out_line(MARKDOWN_METRICS, evaluation["negatives"]["most"])
    blocks.append(f"{left_out}." if left_out else "")
    if any(evaluation.get("seeds", {}).values()):
        blocks.append(
            "Models of several seeds: the mean, ± the standard deviation over seeds; intervals cover users and seeds."
        )
    if evaluation["comparisons"]:
        lines = comparison_lines(evaluation)
        blocks += ["## Paired comparisons", _list(lines), rule(len(lines))]
    if evaluation.get("against_start"):
        blocks += ["## Against what each stage started from", _list(against_start_lines(evaluation))]
    if evaluation.get("rules"):
        rules = rules_table(evaluation, MARKDOWN_METRICS)
        blocks += ["## Scoring rules", tables.markdown(rules), f"{rules.note}."]
    if "catalogue" in evaluation:
        catalogue = _catalogue(evaluation["catalogue"], evaluation["requests"], CATALOGUE_MARKDOWN)
        blocks += ["## The whole catalogue", catalogue.caption + ".", tables.markdown(catalogue), catalogue.note]
    for kind, strata in evaluation.get("strata", {}).items():
        blocks += [f"## {STRATA_TITLES[kind]}", tables.markdown(_strata(evaluation, strata))]
    if evaluation.get("generation"):
        blocks += ["## Titles written by the models", _list(generation_lines(evaluation))]
    moved = order_line(evaluation)
    blocks.append(f"{moved}." if moved else "")
    return "\n\n".join(filter(None, blocks)) + "\n"


def _models(evaluation: dict[str, Any], metrics: Sequence[str], note: str = "") -> Table:
    """All models by those of ``metrics`` that depend on the order of the candidates."""
    fewest, most = evaluation["negatives"]["fewest"], evaluation["negatives"]["most"]
    negatives = f"{fewest} negatives each" if fewest == most else f"{fewest} to {most} negatives each"
    caption = (
        f"{evaluation['requests']} requests, {negatives}; "
        f"95 % intervals from {evaluation['bootstrap']['samples']} bootstrap resamples"
    )
    models = {name: evaluation["models"][name] for name in in_order(evaluation["models"])}
    shown = [metric for metric in metrics if metric not in sure_hits(most)]
    return metrics_table(caption, models, shown, evaluation.get("seeds", {}), note=note)


def _catalogue(result: dict[str, Any], requests: int, metrics: Sequence[str], leading_zero: bool = True) -> Table:
    """The models among all items; measures of the lists as a whole have no interval."""
    lists = {measure: result[measure] for measure in CATALOGUE_LISTS}
    models = {
        name: result["models"][name] | {measure: {"value": lists[measure][name]} for measure in lists}
        for name in in_order(result["models"])
    }
    taken = "left out" if result.get("without_taken", True) else "among them"
    caption = f"{requests} requests among all {result['items']} items, those taken before {taken}; 95 % intervals"
    note = "coverage@10: the share of the items in any first ten; gini@10: 0 all alike, 1 one only."
    return metrics_table(caption, models, [*metrics, *CATALOGUE_LISTS], {}, note=note, leading_zero=leading_zero)


def _strata(evaluation: dict[str, Any], strata: dict[str, Any]) -> Table:
    """NDCG@10 of each model in each stratum."""
    rows = []
    for name in in_order(evaluation["models"]):
        cells = [stratum["models"][name]["ndcg@10"] for stratum in strata.values()]
        rows.append([Cell(name), *(Cell(number(cell["value"]), _interval(cell)) for cell in cells)])
    return Table("", ["NDCG@10", *(f"{name} ({stratum['requests']})" for name, stratum in strata.items())], rows)


def _best(models: Mapping[str, Metrics]) -> dict[str, float]:
    """The highest value of each metric among the models a user could deploy."""
    best: dict[str, float] = {}
    for name, of_model in models.items():
        for metric, cell in of_model.items():
            if name != ORACLE and metric not in CATALOGUE_LISTS:
                best[metric] = max(cell["value"], best.get(metric, cell["value"]))
    return best


def _interval(cell: Mapping[str, Any], leading_zero: bool = True) -> str:
    ends = [cell.get("low"), cell.get("high")]
    if None in ends:
        return ""
    return "\u2013".join(number(end) if leading_zero else number(end).removeprefix("0") for end in ends)


def _deviation(of_seeds: Mapping[str, Mapping[str, float]], metric: str) -> str:
    """± and the standard deviation over seeds, where there are several."""
    values = [of_seed[metric] for of_seed in of_seeds.values() if metric in of_seed]
    return f"±{np.std(values, ddof=1):.3f}".replace("±0.", "±.") if len(values) > 1 else ""


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
