"""All scoring rules of the language models of an experiment side by side, with the ones that validation chose."""

from typing import Any

import numpy as np
import pandas as pd

from dmpo_dist.artifacts.evaluation import Evaluation, Interval, RuleChoice
from dmpo_dist.config.evaluation import Rule
from dmpo_dist.evaluation.rules import RULES

METRIC = "ndcg@10"
POINT = ["dataset", "evaluated_on", "train_groups", "k", "model", "free"]


def rules_rows(found: pd.DataFrame) -> list[dict[str, Any]]:
    """A table row for each point of ``evaluations`` that was scored by several rules; none where no rule was asked for.

    A figure has the 95 % interval over users where there is one seed, else the standard deviation over seeds.
    """
    rows = []
    of_models = found[found["part"].notna()]
    for key, group in of_models.groupby(POINT, dropna=False, sort=False):
        figures, choices = _of_seeds(group)
        if not choices:
            continue
        values = dict(zip(POINT, key, strict=True))
        row = {"model": values["model"], "K": "" if pd.isna(values["k"]) else int(values["k"])}
        row |= {"groups": int(values["train_groups"]), "seeds": len(group), "trained on": values["dataset"]}
        row |= {"evaluated on": values["evaluated_on"]} | ({"axes": values["free"]} if values["free"] else {})
        rows.append(row | {rule: _figure(figures.get(rule, [])) for rule in RULES} | {"chosen": _chosen(choices)})
    return rows


def _of_seeds(group: pd.DataFrame) -> tuple[dict[Rule, list[Interval]], list[RuleChoice]]:
    """Rule -> its figure under each seed, in the order of ``RULES``; and each seed's choice."""
    figures: dict[Rule, list[Interval]] = {}
    choices = []
    for folder, name in zip(group["folder"], group["scored_as"], strict=True):
        of_folder = Evaluation.read(folder).rules
        if of_folder is None or name not in of_folder.models:
            continue
        choices.append(of_folder.chosen[name])
        for rule in RULES:
            if rule in of_folder.models[name]:
                figures.setdefault(rule, []).append(of_folder.models[name][rule][METRIC])
    return figures, choices


def _figure(of_seeds: list[Interval]) -> str:
    if not of_seeds:
        return ""
    values = [figure.value for figure in of_seeds]
    if len(values) > 1:
        return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"
    (only,) = of_seeds
    return f"{only.value:.3f}" + ("" if only.low is None else f" [{only.low:.3f}, {only.high:.3f}]")


def _chosen(choices: list[RuleChoice]) -> str:
    """Each chosen rule with its weight, and under how many seeds where they differ."""
    names = [c.rule if c.rule != "prior" else f"prior, weight {c.prior_weight:g}" for c in choices]
    counts = pd.Series(names).value_counts(sort=False)
    return "; ".join(name if len(counts) == 1 else f"{name} ({n} of {len(names)})" for name, n in counts.items())
