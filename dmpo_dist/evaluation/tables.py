"""An evaluation for people: terminal tables, plain lines and Markdown."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from dmpo_dist.evaluation.metrics import METRICS, sure_hits

MODEL_ORDER = (
    "random", "popularity", "pop_fitted", "item_knn", "ease", "sasrec", "bert4rec", "untuned", "zero_shot",
    "sft", "sft_continued", "dpo", "dpo_pairs", "sdpo", "dmpo", "oracle",
)  # fmt: skip
COMPARED_METRICS = ("ndcg@10", "hr@1", "auc")
TABLE_METRICS = ("hr@1", "hr@5", "hr@10", "ndcg@10", "mrr", "auc")
"""What fits into 100 columns; evaluation.json and evaluation.md hold more."""
MARKDOWN_METRICS = ("hr@1", "hr@5", "hr@10", "hr@20", "ndcg@5", "ndcg@10", "ndcg@20", "mrr", "auc", "pair_accuracy", "pooled_auc")  # fmt: skip
CATALOGUE_METRICS = ("hr@1", "hr@10", "hr@20", "ndcg@10", "mrr@20")
CATALOGUE_LISTS = ("coverage@10", "gini@10")
LINES_UP_TO = 3
"""With more comparisons than this they are shown as a table."""
STRATA_TITLES = {
    "popularity": "By popularity of the positive (head, mid, tail: items that hold a third of the interactions each)",
    "history": "By likes in the history",
    "item_cold": "By how often the positive was taken before, in what baselines are fitted on",
}


def in_order(names: Any) -> list[str]:
    """Names in the order of ``MODEL_ORDER``, others after them as they come."""
    known = [name for name in MODEL_ORDER if name in names]
    return known + [name for name in names if name not in MODEL_ORDER]


def evaluation_table(evaluation: dict[str, Any]) -> Table:
    """The main metrics, one row per model, each value above its 95 % interval; the best but the oracle's in bold.

    A model of several seeds has the standard deviation over them behind each value.
    """
    metrics = _telling(TABLE_METRICS, evaluation)
    table = Table(title=_caption(evaluation), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.caption, table.caption_justify = left_out_line(TABLE_METRICS, evaluation["negatives"]["most"]), "left"
    table.add_column("model", overflow="fold")
    for metric in metrics:
        table.add_column(metric, justify="right", no_wrap=True)
    best = _best(evaluation)
    for name in in_order(evaluation["models"]):
        cells = []
        for metric in metrics:
            cell = evaluation["models"][name][metric]
            is_best = name != "oracle" and cell["value"] == best.get(metric)
            value = (f"{cell['value']:.3f}{_over_seeds(evaluation, name, metric)}", "bold" if is_best else "")
            cells.append(Text.assemble(value, "\n", (f"{cell['low']:.3f}\u2013{cell['high']:.3f}", "dim")))
        seeds = _seeds(evaluation, name)
        table.add_row(Text.assemble(name, *([("\n" + f"{len(seeds)} seeds", "dim")] if seeds else [])), *cells)
    return table


def left_out_line(metrics: Sequence[str], negatives: int) -> str | None:
    """Why those of ``metrics`` that say nothing of at most ``negatives`` negatives are in no table; None where all do."""
    absent = [metric for metric in metrics if metric in sure_hits(negatives)]
    if not absent:
        return None
    return f"Not shown as it is 1 in any order of {1 + negatives} candidates: {', '.join(absent)}"


def comparison_lines(evaluation: dict[str, Any]) -> list[str]:
    """One line per comparison: "dmpo against sft: ndcg@10 +0.021 [0.008, 0.034], paired over 812 users"."""
    lines = []
    for c in evaluation["comparisons"]:
        seeds = seeds_note(c.get("seeds", []), _seeds(evaluation, c["a"]), _seeds(evaluation, c["b"]))
        unclear = " (no clear difference)" if c["low"] <= 0 <= c["high"] else ""
        lines.append(
            f"{c['a']} against {c['b']}: {c['metric']} {c['difference']:+.3f} [{c['low']:.3f}, {c['high']:.3f}], "
            f"paired over {evaluation['requests']} users{', ' * bool(seeds)}{seeds}{unclear}"
        )
    return lines


def seeds_note(common: Sequence[str], of_a: Collection[str], of_b: Collection[str]) -> str:
    """What to know of a pair of models that do not have the same seeds, "" where there is nothing.

    Args:
        common: the seeds they were compared on.
        of_a, of_b: all seeds of each; none where it is a single training.
    """
    if common and len(common) < max(len(of_a), len(of_b)):
        return f"on common seeds {', '.join(common)}"
    return "no common seeds" if of_a and of_b and not common else ""


def comparison_table(evaluation: dict[str, Any]) -> Table:
    """One row per pair of models, under what they have in common; differences whose interval holds 0 are dim."""
    title = f"Paired differences over {evaluation['requests']} users, 95 % intervals"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", overflow="fold")
    for metric in COMPARED_METRICS:
        table.add_column(metric, no_wrap=True)
    pairs = _pairs(evaluation)
    one_first = len({a for a, _ in pairs}) == 1
    heading = ""
    for (a, b), cells in pairs.items():
        new = f"{a} against" if one_first else f"against {b}"
        if new != heading:
            table.add_row(Text(new, "bold"))
            heading = new
        texts = [
            Text(_difference(c), "dim" if c["low"] <= 0 <= c["high"] else "")
            for c in map(cells.get, COMPARED_METRICS)
            if c
        ]
        seeds = seeds_note(next(iter(cells.values())).get("seeds", []), _seeds(evaluation, a), _seeds(evaluation, b))
        table.add_row("\n  ".join([f"  {b if one_first else a}", *([seeds] if seeds else [])]), *texts)
    return table


def show_comparisons(evaluation: dict[str, Any]) -> list[str | Table]:
    """Lines for a few pairs, a table for many."""
    pairs = _pairs(evaluation)
    if len(pairs) > LINES_UP_TO:
        return [comparison_table(evaluation)]
    return list(comparison_lines(evaluation))


def catalogue_table(result: dict[str, Any], requests: int) -> Table:
    """The main metrics among the whole catalogue, one row a model."""
    title = _catalogue_caption(result, requests)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", overflow="fold")
    for heading in (*CATALOGUE_METRICS, *(measure.partition("@")[0] for measure in CATALOGUE_LISTS)):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in in_order(result["models"]):
        figures = [result["models"][name][metric] for metric in CATALOGUE_METRICS]
        table.add_row(
            name,
            *(f"{c['value']:.3f}\n{_short(c['low'])}\u2013{_short(c['high'])}" for c in figures),
            *(f"{result[measure][name]:.3f}" for measure in CATALOGUE_LISTS),
        )
    return table


def order_line(evaluation: dict[str, Any]) -> str | None:
    """How far scores moved with other orders, over all models."""
    order = evaluation.get("order")
    if not order or not order["models"]:
        return None
    worst = {
        kind: max(of_model[kind]["max_difference"] for of_model in order["models"].values())
        for kind in ("candidates", "packing")
    }
    return (
        f"{order['requests']} requests scored again: log-probs moved by at most {worst['candidates']:.1g} nats with candidates "
        f"in other orders, {worst['packing']:.1g} with requests packed otherwise"
    )


def markdown(evaluation: dict[str, Any]) -> str:
    """All of it."""
    best = _best(evaluation)
    lines = ["# Evaluation", "", _caption(evaluation) + ".", ""]
    lines += [f"- {note}" for note in evaluation.get("notes", [])] + [""] * bool(evaluation.get("notes"))
    metrics = _telling(MARKDOWN_METRICS, evaluation)
    lines += ["| model | " + " | ".join(metrics) + " |", "|---|" + "---:|" * len(metrics)]
    for name in in_order(evaluation["models"]):
        cells = []
        for metric in metrics:
            cell = evaluation["models"][name][metric]
            value = f"{cell['value']:.3f}{_over_seeds(evaluation, name, metric)}"
            if name != "oracle" and cell["value"] == best[metric]:
                value = f"**{value}**"
            cells.append(f"{value} ({cell['low']:.3f}\u2013{cell['high']:.3f})")
        lines.append(f"| {_label(evaluation, name)} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Best in bold, the oracle apart. auc averages over requests, pair_accuracy pools all pairs of a request, pooled_auc all "
        "candidates of all requests. One positive each, so recall@k is hr@k.",
    ]
    left_out = left_out_line(MARKDOWN_METRICS, evaluation["negatives"]["most"])
    lines += ["", left_out + "."] if left_out else []
    if any(evaluation.get("seeds", {}).values()):
        lines += [
            "",
            "Models of several seeds: the mean, ± the standard deviation over seeds; intervals cover users and seeds.",
        ]
    if evaluation["comparisons"]:
        lines += ["", "## Paired comparisons", "", *(f"- {line}" for line in comparison_lines(evaluation))]
    if "catalogue" in evaluation:
        lines += ["", "## The whole catalogue", "", *_catalogue(evaluation["catalogue"], evaluation["requests"])]
    for kind, strata in evaluation.get("strata", {}).items():
        lines += ["", f"## {STRATA_TITLES[kind]}", "", *_strata(evaluation, strata)]
    line = order_line(evaluation)
    if line:
        lines += ["", line + "."]
    return "\n".join(lines) + "\n"


def _strata(evaluation: dict[str, Any], strata: dict[str, Any]) -> list[str]:
    """NDCG@10 of each model in each stratum."""
    heads = [f"{name} ({stratum['requests']})" for name, stratum in strata.items()]
    lines = ["| NDCG@10 | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for name in in_order(evaluation["models"]):
        cells = [stratum["models"][name]["ndcg@10"] for stratum in strata.values()]
        figures = [f"{c['value']:.3f} ({c['low']:.3f}\u2013{c['high']:.3f})" for c in cells]
        lines.append(f"| {name} | " + " | ".join(figures) + " |")
    return lines


def _catalogue(result: dict[str, Any], requests: int) -> list[str]:
    """What ``catalogue_table`` shows."""
    heads = (*CATALOGUE_METRICS, *CATALOGUE_LISTS)
    lines = [_catalogue_caption(result, requests) + ".", ""]
    lines += ["| model | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for name in in_order(result["models"]):
        figures = [result["models"][name][metric] for metric in CATALOGUE_METRICS]
        cells = [f"{c['value']:.3f} ({c['low']:.3f}\u2013{c['high']:.3f})" for c in figures]
        cells += [f"{result[measure][name]:.3f}" for measure in CATALOGUE_LISTS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, "", "coverage@10: the share of the items in any first ten; gini@10: 0 all alike, 1 one only."]


def _catalogue_caption(result: dict[str, Any], requests: int) -> str:
    return f"{requests} requests among all {result['items']} items, those taken before left out; 95 % intervals"


def _short(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")


def _telling(metrics: Sequence[str], evaluation: dict[str, Any]) -> list[str]:
    """Those of ``metrics`` that depend on the order of the candidates."""
    return [metric for metric in metrics if metric not in sure_hits(evaluation["negatives"]["most"])]


def _pairs(evaluation: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    pairs: dict[tuple[str, str], dict[str, Any]] = {}
    for c in evaluation["comparisons"]:
        pairs.setdefault((c["a"], c["b"]), {})[c["metric"]] = c
    return pairs


def _difference(c: dict[str, Any]) -> str:
    return f"{c['difference']:+.3f} [{c['low']:.3f}, {c['high']:.3f}]"


def _seeds(evaluation: dict[str, Any], name: str) -> dict[str, dict[str, float]]:
    return evaluation.get("seeds", {}).get(name, {})


def _label(evaluation: dict[str, Any], name: str) -> str:
    seeds = _seeds(evaluation, name)
    return f"{name} ({len(seeds)} seeds)" if seeds else name


def _over_seeds(evaluation: dict[str, Any], name: str, metric: str) -> str:
    """±, and the standard deviation over seeds where there are several."""
    values = [of_seed[metric] for of_seed in _seeds(evaluation, name).values()]
    return f"±{np.std(values, ddof=1):.3f}".replace("±0.", "±.") if len(values) > 1 else ""


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
