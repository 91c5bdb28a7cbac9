"""The headline of a page: sentences that say what was trained on what, and the one result that matters most."""

from pathlib import Path

import pandas as pd

from dmpo_dist.artifacts.evaluation import Comparison, Evaluation
from dmpo_dist.artifacts.explanations import Explanations
from dmpo_dist.config.evaluation import BASELINES
from dmpo_dist.figures.explanations import area_verdicts
from dmpo_dist.formats import candidates, interval, joined, metric_name, number
from dmpo_dist.records.read import Run
from dmpo_dist.report.gather import Material
from dmpo_dist.report.records import Summary
from dmpo_dist.report.study import at_home, labels
from dmpo_dist.report.study_headline import FAIR, MOST_DATASETS, against, summary_sentences
from dmpo_dist.report.tables import judged

METRIC, SUBJECT = "ndcg@10", "dmpo"


def headline(material: Material) -> list[str]:
    """Sentences for the top of the page, at least one."""
    evaluations = list(material.evaluations.values())
    sentences = []
    if material.runs:
        sentences.append(_training(material, evaluations[0] if evaluations else None))
    sentences += map(_result, evaluations[:1])
    for name, study in list(material.studies.items())[:1]:
        sentences += _study(study, material.summaries[name])
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
    verdicts = {}  # either way round, as --against may name the subject
    for comparisons in (list(map(_turned, evaluation.comparisons)), evaluation.comparisons):
        verdicts |= zip(map(_pair, comparisons), judged(comparisons), strict=True)
    compared = _compared(evaluation, subject, metric)
    parts = [against(verdicts[_pair(c)].verdict, c.b, c.difference, c.low, c.high) for c in compared]
    # A result without a baseline beside it says little: if no baseline was compared in pairs, name the best one.
    if not any(c.b in BASELINES for c in compared):
        parts += _beside_best_baseline(evaluation, subject, metric)
    return f"{text}: {joined(parts)}." if parts else f"{text}."


def _pair(c: Comparison) -> tuple[str, str, str]:
    return c.a, c.b, c.metric


def _compared(evaluation: Evaluation, subject: str, metric: str) -> list[Comparison]:
    """The comparisons of the subject with the fairest other model and with the best baseline, where they exist."""
    against = {  # other model -> the comparison "subject minus other model"
        c.b: c
        for c in (*evaluation.comparisons, *map(_turned, evaluation.comparisons))
        if c.a == subject and c.metric == metric and metric in evaluation.models.get(c.b, {})
    }
    # The fairest comparison is the one with a model that had the same data and as many steps, so that the difference is
    # due to the objective alone; FAIR is in that order.
    fair = [against[name] for name in FAIR if name in against][:1]
    # Every model that was not trained by us counts as a baseline, except the oracle, which nothing can beat.
    baselines = [n for n in against if n in BASELINES or (n not in evaluation.trained and n not in ("oracle", *FAIR))]
    best = max(baselines, key=lambda name: evaluation.models[name][metric].value, default=None)
    return fair + ([against[best]] if best is not None else [])


def _turned(c: Comparison) -> Comparison:
    """The same comparison the other way round."""
    turned = {"difference": -c.difference, "low": -c.high, "high": -c.low}
    return c.model_copy(update={"a": c.b, "b": c.a} | turned)


def _beside_best_baseline(evaluation: Evaluation, subject: str, metric: str) -> list[str]:
    """The best baseline in a few words, for evaluations without a paired comparison; nothing without a baseline."""
    values = {n: m[metric].value for n, m in evaluation.models.items() if n in BASELINES and metric in m}
    if not values:
        return []
    best = max(values, key=values.__getitem__)
    own, theirs = evaluation.models[subject][metric].value, number(values[best])
    relation = "equal to" if number(own) == theirs else "below" if own < values[best] else "above"
    return [f"{relation} {best} ({theirs}, not compared in pairs)"]


def _explanations(explanations: Explanations) -> str:
    users = len({request.user for request in explanations.requests})
    text = f"Explanations of {len(explanations.requests)} ranks that {explanations.model} gives titles of {users} users"
    areas = explanations.faithfulness.areas if explanations.faithfulness else {}
    area = areas.get("attribution_vs_random")
    if not area or not {"area", "low", "high"} <= area.keys():
        return f"{text}; how faithful these explanations are was not measured."
    verdict = area_verdicts(areas)["attribution_vs_random"].verdict
    faster = "faster than" if verdict == "ahead of" else "not clearly faster than"
    figure = f"{number(area['area'], '+.3f')} {interval(area['low'], area['high'], '+.3f')} nats"
    return f"{text}. Taking history items away by contribution pulls titles down {faster} at random ({figure})."


def _study(study: pd.DataFrame, summary: Summary | None) -> list[str]:
    """The number of cells, then what the study found."""
    trained = study[study["objective"].notna()]
    cells = len(trained[["dataset", "shots", "k", "objective", "free", "seed"]].drop_duplicates())
    datasets = list(map(str, study["dataset"].unique()))
    text = f"A study of {cells} cells on {joined(sorted(datasets))}."
    if summary is not None:
        return [text, *summary_sentences(summary)]
    home = at_home(study)
    best = [_best(home[(home["dataset"] == d) & (home["metric"] == METRIC)], d) for d in datasets[:MOST_DATASETS]]
    return [text, *filter(None, best)]


def _best(rows: pd.DataFrame, dataset: str) -> str:
    """The best setting beside SFT and the best baseline, for studies without paired differences; "" without a cell."""
    cells = rows[rows["objective"].notna()]
    if cells.empty:
        return ""
    named = cells.assign(label=labels(cells, with_k=True))
    means = named.groupby(["label", "shots"], sort=False, dropna=False)["value"].mean()
    label, shots = means.idxmax()
    same = named[(named["label"] == label) & ((named["shots"] == shots) | (named["shots"].isna() & pd.isna(shots)))]
    spread = interval(*same[["low", "high"]].iloc[0]) if len(same) == 1 else f"(mean of {len(same)} seeds)"
    values = {}
    for name, of_model in rows[rows["objective"].isna()].groupby("model", sort=False):
        fitting = of_model[of_model["shots"].isna() if pd.isna(shots) else of_model["shots"] == shots]
        values[str(name)] = (fitting if len(fitting) else of_model)["value"].mean()
    fair = [name for name in FAIR if name in values][:1]
    baselines = sorted((name for name in values if name in BASELINES), key=lambda name: -values[name])[:1]
    beside = ", ".join(f"{name} {number(values[name])}" for name in [*fair, *baselines])
    amount = "all examples" if pd.isna(shots) else f"{shots:g} examples"
    return (
        f"On {dataset} the best of {len(means)} settings, {label} on {amount}, has {metric_name(METRIC)} "
        f"{means.max():.3f} {spread}{f'; {beside} (not compared in pairs)' if beside else ''}."
    )
