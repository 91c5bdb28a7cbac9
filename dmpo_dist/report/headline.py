"""What was trained on what, and the one result that matters, in sentences made of the figures."""

from pathlib import Path

import pandas as pd

from dmpo_dist.orchestration.runs import Run
from dmpo_dist.report.gather import Material
from dmpo_dist.report.intervals import BASELINES
from dmpo_dist.report.records import Comparison, Evaluation
from dmpo_dist.report.study import SWEEP_METRIC
from dmpo_dist.report.words import candidates, interval, joined, metric_name, number, verdict

METRIC = "ndcg@10"
FAIR = ("sft_continued", "sft", "untuned")
"""What to compare a model with first: what had as many steps on the same data, then what it started from."""


def headline(material: Material) -> list[str]:
    """Sentences for the top of the page; one at least."""
    evaluations, studies = list(material.evaluations.values()), list(material.studies.values())
    sentences = []
    if material.runs:
        sentences.append(_training(material, evaluations[0] if evaluations else None))
    sentences += map(_result, evaluations[:1])
    sentences += map(_study, studies[:1])
    if len(evaluations) > 1:
        sentences.append(f"That is the first of {len(evaluations)} evaluations below.")
    return sentences or ["No training run and no evaluation lie here: this page shows what else was found."]


def describe_run(run: Run) -> str:
    """``dmpo with 7 negatives, from sft``, or what it is instead."""
    start = Path(str((run.config.get("model") or {}).get("path", "?")))
    came = f"from {start.parent.name if start.name == 'model' else start}"
    if run.stage != "train":
        return f"supervised fine-tuning, {came}"
    objective = run.config.get("objective") or {}
    negatives = (run.config.get("train") or {}).get("negatives")
    weight = objective.get("sft_weight")
    likelihood = f" and {weight:g} \u00d7 likelihood" if weight else ""
    return f"objective {objective.get('name', '?')} with {negatives} negatives{likelihood}, {came}"


def subject_of(evaluation: Evaluation) -> str:
    """The model an evaluation is about: the one that was compared with others, else the best trained one."""
    if evaluation.comparisons and evaluation.comparisons[0].a in evaluation.models:
        return evaluation.comparisons[0].a
    trained = [name for name in evaluation.models if name in evaluation.folders]

    def value(name: str) -> float:
        metrics = evaluation.models[name]
        return metrics[METRIC].value if METRIC in metrics else 0.0

    return max(trained or evaluation.models, key=value)


def _training(material: Material, evaluation: Evaluation | None) -> str:
    """The run behind the result, else the last preference run, else the last."""
    runs = material.runs
    model = evaluation.folders.get(subject_of(evaluation)) if evaluation else None
    last = [name for name, run in runs.items() if run.stage == "train"] or list(runs)
    name = next((n for n, run in runs.items() if model and _made(run, model)), last[-1])
    run = runs[name]
    done, total = run.steps
    steps = f"{done} of {total} steps" if total else f"{done} steps"
    data = f", on {joined([str(card.content['name']) for card in material.cards])}" if material.cards else ""
    others = f" It is one of {len(runs)} training runs here." if len(runs) > 1 else ""
    return f"{name}: {describe_run(run)}, {steps}{'' if run.end else ', not finished'}{data}.{others}"


def _made(run: Run, model: str) -> bool:
    """Whether ``model``, as an evaluation names it, is the run's."""
    return str((run.folder / "model").resolve()).endswith("/" + model.strip("/"))


def _result(evaluation: Evaluation) -> str:
    """The subject's figure, then how it stands to what it must be compared with, by paired intervals where there are."""
    subject = subject_of(evaluation)
    metrics = evaluation.models[subject]
    metric = METRIC if METRIC in metrics else next(iter(metrics))
    figure = metrics[metric]
    text = (
        f"On {evaluation.requests} test requests among {candidates(evaluation.negatives)} candidates, {subject} ranks "
        f"with {metric_name(metric)} {number(figure.value)} {interval(figure.low, figure.high)}"
    ).rstrip()
    parts = [_against(c) for c in _compared(evaluation, subject, metric)]
    return f"{text}: {joined(parts)}." if parts else f"{text}."


def _compared(evaluation: Evaluation, subject: str, metric: str) -> list[Comparison]:
    """With the fairest other model, and with the best baseline."""
    mine = {
        c.b: c
        for c in evaluation.comparisons
        if c.a == subject and c.metric == metric and metric in evaluation.models.get(c.b, {})
    }
    fair = [mine[name] for name in FAIR if name in mine][:1]
    baselines = [n for n in mine if n in BASELINES or (n not in evaluation.folders and n not in ("oracle", *FAIR))]
    best = max(baselines, key=lambda name: evaluation.models[name][metric].value, default=None)
    return fair + ([mine[best]] if best is not None else [])


def _against(c: Comparison) -> str:
    difference = number(c.difference, "+.3f")
    return f"{verdict(c.low, c.high)} {c.b} ({difference} {interval(c.low, c.high, '+.3f')}, paired)"


def _study(study: pd.DataFrame) -> str:
    """How many cells, and what more negatives did."""
    trained = study[study["objective"].notna()]
    cells = len(trained[["dataset", "shots", "k", "objective", "free", "seed"]].drop_duplicates())
    text = f"A study of {cells} cells on {joined(sorted(map(str, study['dataset'].unique())))}"
    parts = []
    home = trained[(trained["dataset"] == trained["evaluated_on"]) & (trained["metric"] == SWEEP_METRIC)]
    for (objective, free), part in home[home["k"].notna()].groupby(["objective", "free"], sort=False, dropna=False):
        by_k = part.groupby("k")[["value", "loss"]].mean()
        if len(by_k) < 2 or part["dataset"].nunique() > 1 or part["shots"].nunique(dropna=False) > 1:
            continue
        (first, last), (low, high) = by_k.iloc[[0, -1]].itertuples(index=False), by_k.index[[0, -1]]
        loss = "" if by_k["loss"].isna().any() else f" while its loss goes from {first.loss:.3f} to {last.loss:.3f}"
        name = f"{objective} ({free})" if isinstance(free, str) and free else str(objective)
        parts.append(f"{name} {first.value:.3f} to {last.value:.3f}{loss} (K={low:g} to {high:g})")
    return f"{text}. {metric_name(SWEEP_METRIC)} with more negatives: {'; '.join(parts)}." if parts else f"{text}."
