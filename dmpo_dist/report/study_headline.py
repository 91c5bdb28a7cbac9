"""The result of a study in sentences: its best settings, beside SFT continued and the best baseline."""

import pandas as pd

from dmpo_dist.config.evaluation import BASELINES
from dmpo_dist.figures.study import MAIN_METRIC, SWEEP_METRIC
from dmpo_dist.formats import interval, joined, metric_name, number
from dmpo_dist.report.records import POINT, Summary
from dmpo_dist.verdicts import judge

FAIR = ("sft_continued", "sft", "zero_shot", "untuned")
"""Models to compare a preference stage with, fairest first: SFT for as many more steps, then what it started from."""
MOST_DATASETS = 3  # that get a sentence each


def summary_sentences(summary: Summary) -> list[str]:
    """For each dataset the best setting beside others and, in a sweep over K alone, what more negatives do."""
    judged = judge(summary.differences[["low", "high", "p"]].astype(float).itertuples(index=False, name=None))
    differences = summary.differences.assign(verdict=[verdict.verdict for verdict in judged])
    own = summary.means[summary.means["dataset"] == summary.means["evaluated_on"]]
    cells = own[own["k"].notna()]
    sentences = []
    for dataset in list(dict.fromkeys(cells["dataset"]))[:MOST_DATASETS]:
        of_dataset = cells[cells["dataset"] == dataset]
        best = of_dataset[of_dataset["metric"] == MAIN_METRIC]
        sentences += [_best(str(dataset), best, differences)] if len(best) else []
        if of_dataset["train_groups"].nunique() == 1:  # with several sizes the figures tell it better
            sentences += _more_negatives(str(dataset), of_dataset[of_dataset["metric"] == SWEEP_METRIC], differences)
    return sentences


def against(verdict: str, name: str, value: float, low: float, high: float) -> str:
    """``ahead of sft (+0.021 [+0.008, +0.034], paired)``."""
    return f"{verdict} {name} ({number(value, '+.3f')} {interval(low, high, '+.3f')}, paired)"


def _best(dataset: str, cells: pd.DataFrame, differences: pd.DataFrame) -> str:
    """The setting with the highest mean, its interval, and its differences from SFT (continued) and a baseline."""
    best = cells.loc[cells["value"].idxmax()]
    amount = "all examples" if pd.isna(best["shots"]) else f"{best['shots']:g} examples"
    seeds = f"mean of {best['seeds']:g} seeds, " if best["seeds"] > 1 else ""
    figure = f"{metric_name(MAIN_METRIC)} {number(best['value'])} {interval(best['low'], best['high'])}"
    text = (
        f"On {dataset} the best of {len(cells)} settings, {_label(best)} on {amount}, has {figure} "
        f"({seeds}picked by these same test requests, which flatters it)"
    )
    others = _of_cell(differences, best, MAIN_METRIC)
    fair = next((others.loc[name] for name in FAIR if name in others.index), None)
    baselines = others[others.index.isin(BASELINES)]
    parts = [] if fair is None else [against(fair["verdict"], fair.name, *fair[["value", "low", "high"]])]
    if len(baselines):  # the best one is the one that the cell is least ahead of
        best_one = baselines.loc[baselines["value"].idxmin()]
        name = f"{best_one.name}, the best baseline"
        parts.append(against(best_one["verdict"], name, *best_one[["value", "low", "high"]]))
    return f"{text}: {joined(parts)}." if parts else f"{text}."


def _more_negatives(dataset: str, cells: pd.DataFrame, differences: pd.DataFrame) -> list[str]:
    """For each setting the metric at its most negatives against that at its fewest; nothing where there is one K."""
    parts = []
    for _, curve in cells.groupby(["model", "free"], sort=False):
        most, fewest = (curve.loc[curve["k"].agg(pick)] for pick in ("idxmax", "idxmin"))
        others = _of_cell(differences, most, SWEEP_METRIC)
        name = f"K={fewest['k']:g}"
        if name in others.index:
            other = others.loc[name]
            figures = f"{number(most['value'])} at K={most['k']:g} is"
            compared = against(other["verdict"], f"that at {name}", *other[["value", "low", "high"]])
            parts.append(f"{_label(most, with_k=False)} {figures} {compared}")
    return [f"More negatives on {dataset}, {metric_name(SWEEP_METRIC)}: {'; '.join(parts)}."] if parts else []


def _of_cell(differences: pd.DataFrame, cell: pd.Series, metric: str) -> pd.DataFrame:
    """The differences of one cell in one metric, by the model that it is compared with."""
    same = differences[differences["metric"] == metric]
    for name in POINT:
        same = same[same[name].isna() if pd.isna(cell[name]) else same[name] == cell[name]]
    return same.drop_duplicates("against").set_index("against")


def _label(cell: pd.Series, with_k: bool = True) -> str:
    return ", ".join(filter(None, [cell["model"], f"K={cell['k']:g}" if with_k else "", cell["free"]]))
