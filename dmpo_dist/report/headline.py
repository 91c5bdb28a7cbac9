"""The headline of a page: sentences that say what was trained on what, and the one result that matters most."""

from pathlib import Path

import pandas as pd

from dmpo_dist.artifacts.evaluation import Comparison, Evaluation
from dmpo_dist.artifacts.explanations import Explanations
from dmpo_dist.config.evaluation import BASELINES
from dmpo_dist.figures.study import SWEEP_METRIC
from dmpo_dist.formats import candidates, interval, joined, metric_name, number, verdict
from dmpo_dist.records.read import Run
from dmpo_dist.report.gather import Material
from dmpo_dist.report.study import at_home, labels

METRIC, SUBJECT = "ndcg@10", "dmpo"
MOST_DATASETS = 3  # of a study that get a sentence each
FAIR = ("sft_continued", "sft", "untuned")
"""Models to compare the subject with, fairest first: SFT for as many more steps on the same data, then its starts."""


def headline(material: Material) -> list[str]:
    """Sentences for the top of the page, at least one."""
    evaluations, studies = list(material.evaluations.values()), list(material.studies.values())
    sentences = []
    if material.runs:
        sentences.append(_training(material, evaluations[0] if evaluations else None))
    sentences += map(_result, evaluations[:1])
    sentences += map(_study, studies[:1])
    if not sentences:
        sentences += map(_explanations, list(material.explanations.values())[:1])
    if len(evaluations) > 1:
        sentences.append(f"That is the first of {len(evaluations)} evaluations below.")
    return sentences or ["The folders hold no training run and no evaluation; this page shows what else they hold."]


def describe_run(run: Run) -> str:
    """The run in words, such as ``objective dmpo with 7 negatives, from sft`` or ``supervised fine-tuning, from x``."""
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
    """The model an evaluation is about: SUBJECT, else the one that all were compared with, else the best trained."""
    # A comparison is a minus b; where every comparison has one model as a, the evaluation was made about that model.
    compared = {c.a for c in evaluation.comparisons} & evaluation.models.keys()
    if SUBJECT in evaluation.models or len(compared) == 1:
        return SUBJECT if SUBJECT in evaluation.models else compared.pop()

    def value(name: str) -> float:
        metrics = evaluation.models[name]
        return metrics[METRIC].value if METRIC in metrics else 0.0

    return max(evaluation.trained or evaluation.models, key=value)


def _training(material: Material, evaluation: Evaluation | None) -> str:
    """A sentence on the run that made the evaluated model, else on the last preference run, else on the last run."""
    runs = material.runs
    model = evaluation.trained.get(subject_of(evaluation)) if evaluation else None
    last = [name for name, run in runs.items() if run.stage == "train"] or list(runs)
    name = next((n for n, run in runs.items() if model and _made(run, model)), last[-1])
    run = runs[name]
    done, total = run.steps
    steps = f"{done} of {total} steps" if total else f"{done} steps"
    data = f", on {joined([card.content.name for card in material.cards])}" if material.cards else ""
    others = f" It is one of {len(runs)} training runs on this page." if len(runs) > 1 else ""
    return f"{name}: {describe_run(run)}, {steps}{'' if run.end else ', not finished'}{data}.{others}"


def _made(run: Run, model: str) -> bool:
    """Whether ``model``, a path in an evaluation, is the run's model."""
    return str((run.folder / "model").resolve()).endswith("/" + model.strip("/"))


def _result(evaluation: Evaluation) -> str:
    """The subject's figure, then its paired differences from the fairest other model and from the best baseline."""
    subject = subject_of(evaluation)
    metrics = evaluation.models[subject]
    metric = METRIC if METRIC in metrics else next(iter(metrics))
    figure = metrics[metric]
    text = (
        f"On {evaluation.requests} test requests among {candidates(evaluation.negatives)} candidates, {subject} ranks "
        f"with {metric_name(metric)} {number(figure.value)} {interval(figure.low, figure.high)}"
    ).rstrip()
    compared = _compared(evaluation, subject, metric)
    parts = [_against(c) for c in compared]
    # A result without a baseline beside it says little: if no baseline was compared in pairs, name the best one.
    if not any(c.b in BASELINES for c in compared):
        parts += _beside_best_baseline(evaluation, subject, metric)
    return f"{text}: {joined(parts)}." if parts else f"{text}."


def _compared(evaluation: Evaluation, subject: str, metric: str) -> list[Comparison]:
    """The comparisons of the subject with the fairest other model and with the best baseline, where they exist."""
    against = {  # other model -> the comparison "subject minus other model"
        c.b: c
        for c in evaluation.comparisons
        if c.a == subject and c.metric == metric and metric in evaluation.models.get(c.b, {})
    }
    # The fairest comparison is the one with a model that had the same data and as many steps, so that the difference is
    # due to the objective alone; FAIR is in that order.
    fair = [against[name] for name in FAIR if name in against][:1]
    # Every model that was not trained by us counts as a baseline, except the oracle, which nothing can beat.
    baselines = [n for n in against if n in BASELINES or (n not in evaluation.trained and n not in ("oracle", *FAIR))]
    best = max(baselines, key=lambda name: evaluation.models[name][metric].value, default=None)
    return fair + ([against[best]] if best is not None else [])


def _beside_best_baseline(evaluation: Evaluation, subject: str, metric: str) -> list[str]:
    """The best baseline in a few words, for evaluations without a paired comparison; nothing without a baseline."""
    values = {n: m[metric].value for n, m in evaluation.models.items() if n in BASELINES and metric in m}
    if not values:
        return []
    best = max(values, key=values.__getitem__)
    relation = "below" if evaluation.models[subject][metric].value < values[best] else "above"
    return [f"{relation} {best} ({number(values[best])}, not compared in pairs)"]


def _against(c: Comparison) -> str:
    difference = number(c.difference, "+.3f")
    return f"{verdict(c.low, c.high)} {c.b} ({difference} {interval(c.low, c.high, '+.3f')}, paired)"


def _explanations(explanations: Explanations) -> str:
    users = len({request.user for request in explanations.requests})
    text = f"Explanations of {len(explanations.requests)} ranks that {explanations.model} gives titles of {users} users"
    area = explanations.faithfulness.areas.get("attribution_vs_random") if explanations.faithfulness else None
    if not area or not {"area", "low", "high"} <= area.keys():
        return f"{text}; how faithful these explanations are was not measured."
    faster = "faster than" if area["low"] > 0 else "not clearly faster than"
    figure = f"{number(area['area'], '+.3f')} {interval(area['low'], area['high'], '+.3f')} nats"
    return f"{text}. Taking history items away by contribution pulls titles down {faster} at random ({figure})."


def _study(study: pd.DataFrame) -> str:
    """The number of cells, then the effect of more negatives or, with several datasets or sizes, the best settings."""
    trained = study[study["objective"].notna()]
    cells = len(trained[["dataset", "shots", "k", "objective", "free", "seed"]].drop_duplicates())
    datasets = list(study["dataset"].unique())
    text = f"A study of {cells} cells on {joined(sorted(map(str, datasets)))}"
    home = at_home(study)
    if len(datasets) == 1 and trained["shots"].nunique(dropna=False) == 1 and trained["k"].nunique() > 1:
        return f"{text}. {_sweep(home[(home['metric'] == SWEEP_METRIC) & home['k'].notna()])}"
    best = [_best(home[(home["dataset"] == d) & (home["metric"] == METRIC)], str(d)) for d in datasets[:MOST_DATASETS]]
    return " ".join([f"{text}.", *best]).strip()


def _sweep(cells: pd.DataFrame) -> str:
    parts = []
    for label, part in cells.groupby(labels(cells, with_k=False), sort=False):
        by_k = part.groupby("k")[["value", "loss"]].mean()
        (first, last), (low, high) = by_k.iloc[[0, -1]].itertuples(index=False), by_k.index[[0, -1]]
        if low == high:
            continue
        loss = "" if by_k["loss"].isna().any() else f" while the loss goes from {first.loss:.3f} to {last.loss:.3f}"
        parts.append(f"{label} from {first.value:.3f} at K={low:g} to {last.value:.3f} at K={high:g}{loss}")
    return f"{metric_name(SWEEP_METRIC)} with more negatives: {'; '.join(parts)}." if parts else ""


def _best(rows: pd.DataFrame, dataset: str) -> str:
    """The best setting beside SFT with as many examples and popularity; "" where no cell was measured."""
    cells = rows[rows["objective"].notna()]
    if cells.empty:
        return ""
    named = cells.assign(label=labels(cells, with_k=True))
    means = named.groupby(["label", "shots"], sort=False, dropna=False)["value"].mean()
    label, shots = means.idxmax()
    same = named[(named["label"] == label) & ((named["shots"] == shots) | (named["shots"].isna() & pd.isna(shots)))]
    spread = interval(*same[["low", "high"]].iloc[0]) if len(same) == 1 else f"(mean of {len(same)} seeds)"
    others = []
    for name in ("sft", "popularity"):
        of_model = rows[rows["model"] == name]
        fitting = of_model[of_model["shots"].isna() if pd.isna(shots) else of_model["shots"] == shots]
        if len(of_model):
            others.append(f"{name} {(fitting if len(fitting) else of_model)['value'].mean():.3f}")
    beside = f"; {', '.join(others)}" if others else ""
    amount = "all examples" if pd.isna(shots) else f"{shots:g} examples"
    return (
        f"On {dataset} the best of {len(means)} settings, {label} on {amount}, has {metric_name(METRIC)} "
        f"{means.max():.3f} {spread}{beside}."
    )
