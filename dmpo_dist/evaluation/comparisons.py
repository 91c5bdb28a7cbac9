"""Paired comparisons of models for people: lines and tables, with the verdict of ``verdicts`` on each difference."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table as TerminalTable

from dmpo_dist import tables
from dmpo_dist.tables import Cell, Table
from dmpo_dist.verdicts import Judged, Verdict, judge, rule

COMPARED_METRICS = ("ndcg@10", "hr@1", "auc")
LINES_UP_TO = 3
"""With more pairs of models than this the comparisons are shown as a table."""


def judged(comparisons: Iterable[Mapping[str, Any]]) -> list[Judged]:
    """The verdicts on comparisons that are shown together."""
    return judge((c["low"], c["high"], c.get("p")) for c in comparisons)


def difference_line(c: Mapping[str, Any], users: int, verdict: Judged, seeds: str = "") -> str:
    """``dmpo against sft: ndcg@10 +0.021 [0.008, 0.034], paired over 812 users``, and whether that is no difference."""
    unclear = "" if verdict.clear else " (no clear difference)"
    return (
        f"{c['a']} against {c['b']}: {c['metric']} {_difference(c)}, paired over {users} users"
        f"{', ' * bool(seeds)}{seeds}{unclear}"
    )


def comparison_lines(evaluation: dict[str, Any]) -> list[str]:
    """One line per comparison: "dmpo against sft: ndcg@10 +0.021 [0.008, 0.034], paired over 812 users"."""
    return _lines(evaluation, evaluation.get("comparisons", []))


def below_start_lines(evaluation: dict[str, Any]) -> list[str]:
    """A line per model and metric that is clearly below what the model's stage started from."""
    lines = _lines(evaluation, evaluation.get("against_start", []), only="behind")
    return [f"below its start: {line}" for line in lines]


def against_start_lines(evaluation: dict[str, Any]) -> list[str]:
    """One line per comparison of a model with what its stage started from."""
    return _lines(evaluation, evaluation.get("against_start", []))


def _lines(
    evaluation: dict[str, Any], comparisons: Sequence[Mapping[str, Any]], only: Verdict | None = None
) -> list[str]:
    return [
        difference_line(c, evaluation["requests"], verdict, _seeds_of_pair(evaluation, c))
        for c, verdict in zip(comparisons, judged(comparisons), strict=True)
        if only in (None, verdict.verdict)
    ]


def seeds_note(common: Sequence[str], of_a: Collection[str], of_b: Collection[str]) -> str:
    """What to know of a pair of models that do not have the same seeds; empty where there is nothing.

    Args:
        common: the seeds they were compared on.
        of_a, of_b: all seeds of each; none where it is a single training.
    """
    if common and len(common) < max(len(of_a), len(of_b)):
        return f"on common seeds {', '.join(common)}"
    return "no common seeds" if of_a and of_b and not common else ""


def comparison_table(evaluation: dict[str, Any]) -> Table:
    """One row per pair of models, under a heading with what they share; differences that are not clear are soft."""
    comparisons = evaluation["comparisons"]
    pairs: dict[tuple[str, str], dict[str, tuple[dict[str, Any], Judged]]] = {}
    for c, verdict in zip(comparisons, judged(comparisons), strict=True):
        pairs.setdefault((c["a"], c["b"]), {})[c["metric"]] = (c, verdict)
    one_first = len({a for a, _ in pairs}) == 1
    rows, heading = [], ""
    for (a, b), by_metric in pairs.items():
        new = f"{a} against" if one_first else f"against {b}"
        if new != heading:
            rows.append([Cell(new, kind="strong")])
            heading = new
        seeds = _seeds_of_pair(evaluation, next(iter(by_metric.values()))[0])
        cells = [_difference_cell(*by_metric[m]) if m in by_metric else Cell("") for m in COMPARED_METRICS]
        rows.append([Cell(f"  {b if one_first else a}", f"  {seeds}" if seeds else ""), *cells])
    caption = f"Paired differences over {evaluation['requests']} users, 95 % intervals; pale: no clear difference"
    note = rule(len(comparisons))
    return Table(caption, ["", *COMPARED_METRICS], rows, text_columns=1 + len(COMPARED_METRICS), note=note)


def _difference_cell(c: Mapping[str, Any], verdict: Judged) -> Cell:
    return Cell(_difference(c), kind="" if verdict.clear else "soft")


def show_comparisons(evaluation: dict[str, Any]) -> list[str | TerminalTable]:
    """The comparisons for the terminal: lines for a few pairs, a table for many."""
    if len({(c["a"], c["b"]) for c in evaluation["comparisons"]}) > LINES_UP_TO:
        return [tables.terminal(comparison_table(evaluation))]
    return list(comparison_lines(evaluation))


def _difference(c: Mapping[str, Any]) -> str:
    return f"{c['difference']:+.3f} [{c['low']:.3f}, {c['high']:.3f}]"


def _seeds_of_pair(evaluation: dict[str, Any], c: Mapping[str, Any]) -> str:
    seeds = evaluation.get("seeds", {})
    return seeds_note(c.get("seeds", []), seeds.get(c["a"], {}), seeds.get(c["b"], {}))
