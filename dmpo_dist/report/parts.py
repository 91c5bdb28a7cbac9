"""What a page shows, section by section, as tables, figures and sentences; a section without data is empty."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import pandas as pd
import yaml

from dmpo_dist.artifacts.evaluation import SCORES_FILE, Evaluation
from dmpo_dist.artifacts.explanations import ExplainedRequest, Explanations
from dmpo_dist.evaluation.metrics import sure_hits
from dmpo_dist.evaluation.seeds import split_name
from dmpo_dist.explanation.words import by_word
from dmpo_dist.records.compare import evaluation_of, paired_lines
from dmpo_dist.report import curves, explained, facts, intervals, study, tables
from dmpo_dist.report.gather import Material, ReportedData
from dmpo_dist.report.headline import describe_run, headline
from dmpo_dist.report.svg import Figure
from dmpo_dist.report.tables import Table
from dmpo_dist.report.words import candidates

SECTIONS = {
    "results": "Results",
    "comparisons": "Paired comparisons",
    "training": "Training curves",
    "strata": "Strata",
    "sweep": "K sweep",
    "shots": "Few-shot curves",
    "transfer": "Other domains",
    "cells": "Study, cell by cell",
    "explanations": "Explanations",
    "data": "Data and leak check",
    "configuration": "Configuration",
    "environment": "Environment",
    "files": "Files",
}
"""Key -> heading, in the page's order."""
WAYS = {
    "popularity": "popularity of the target",
    "history": "length of the history",
    "item_cold": "how often the target was taken before",
}
STAGES = {"sft": "SFT runs", "train": "Preference runs"}
SHOWN, FOLDED = 5, 20  # of the requests of an explanations.json
OPEN_RUNS = 4  # whose curves are not folded
MOST_PAIRS = 10  # of runs, beyond those an evaluation compares


@dataclass(frozen=True)
class StrataPart:
    """The requests parted in one way."""

    figures: Sequence[Figure]
    tables: Sequence[Table]


@dataclass(frozen=True)
class EvaluationPart:
    """One evaluation; ``notes`` are what a reader must know of its figures, ``lines`` what else is known of them."""

    notes: Sequence[str]
    lines: Sequence[str]
    models: Table
    all_metrics: Table | None
    figures: Sequence[Figure]
    seeds: Table | None
    catalogue: Table | None
    catalogue_all: Table | None
    comparisons: Table | None
    comparison_figures: Sequence[Figure]
    strata: dict[str, StrataPart]


@dataclass(frozen=True)
class StudyPart:
    """One ``dmpo experiment``."""

    sweep: Sequence[Figure]
    shots: Sequence[Figure]
    transfer: Table | None
    cells: Table


@dataclass(frozen=True)
class ExplainedPart:
    """One request that is explained."""

    request: ExplainedRequest
    words: Sequence[tuple[str, float]]
    history: Table | None


@dataclass(frozen=True)
class ExplanationsPart:
    """One ``explanations.json``."""

    model: str
    reference: str | None
    shown: Sequence[ExplainedPart]
    folded: Sequence[ExplainedPart]
    left_out: int
    figures: Sequence[Figure]


@dataclass(frozen=True)
class DataPart:
    """One prepared data set."""

    name: str
    counts: Table
    leaks: Table | None
    lines: Sequence[str]
    config: str


@dataclass(frozen=True)
class Page:
    """Everything the template shows."""

    title: str
    headline: Sequence[str]
    privacy: str
    notes: Sequence[str]
    sections: dict[str, str]
    absent: str
    evaluations: dict[str, EvaluationPart]
    paired_runs: Sequence[str]
    runs: Table | None
    open_runs: int
    described: dict[str, str]
    curves: dict[str, Sequence[Figure]]
    side_by_side: dict[str, Sequence[Figure]]
    studies: dict[str, StudyPart]
    explanations: dict[str, ExplanationsPart]
    cards: Sequence[DataPart]
    differences: Table | None
    configs: dict[str, str]
    environment: Table | None
    files: Table


def make_page(material: Material) -> Page:
    """Turn what was gathered into what is shown."""
    evaluations = {name: _evaluation(e) for name, e in material.evaluations.items()}
    studies = {name: _study(s) for name, s in material.studies.items()}
    paired = _other_pairs(material)
    environment = facts.environment_table(material.environments)
    there = {
        "results": bool(evaluations),
        "comparisons": any(e.comparisons for e in evaluations.values()) or bool(paired),
        "training": bool(material.runs),
        "strata": any(e.strata for e in evaluations.values()),
        "sweep": any(s.sweep for s in studies.values()),
        "shots": any(s.shots for s in studies.values()),
        "transfer": any(s.transfer for s in studies.values()),
        "cells": bool(studies),
        "explanations": bool(material.explanations),
        "data": bool(material.cards),
        "configuration": bool(material.configs),
        "environment": environment is not None,
        "files": bool(material.files),
    }
    return Page(
        title=material.title,
        headline=headline(material),
        privacy=_privacy(material),
        notes=material.notes,
        sections={key: name for key, name in SECTIONS.items() if there[key]},
        absent=", ".join(name for key, name in SECTIONS.items() if not there[key]),
        evaluations=evaluations,
        paired_runs=paired,
        runs=facts.runs_table(material.runs) if material.runs else None,
        open_runs=OPEN_RUNS,
        described={name: describe_run(run) for name, run in material.runs.items()},
        curves={name: curves.run_figures(run) for name, run in material.runs.items()},
        side_by_side={
            STAGES.get(stage, stage): curves.side_by_side(runs)
            for stage, runs in curves.runs_by_stage(material.runs).items()
        },
        studies=studies,
        explanations={name: _explanations(x) for name, x in material.explanations.items()},
        cards=[_data(card) for card in material.cards],
        differences=facts.differences_table(material.runs),
        configs=facts.config_texts(material.configs),
        environment=environment,
        files=facts.files_table(material.files),
    )


def _evaluation(e: Evaluation) -> EvaluationPart:
    catalogue, catalogue_all = None, None
    if e.catalogue is not None:
        items = f"all {e.catalogue.items} items" if e.catalogue.items else "the whole catalogue"
        ranked = e.catalogue.all_metrics()
        few = tables.first_metrics(ranked)
        catalogue = tables.metrics_table(f"Among {items}, those a user had taken left out", few)
        if few != ranked:
            catalogue_all = tables.metrics_table(f"All metrics among {items}", ranked)
    strata = {
        WAYS.get(way, way.replace("_", " ")): StrataPart(
            figures,
            [
                tables.metrics_table(
                    f"{name}: {stratum.requests} requests", stratum.models, sure_hits(e.most_negatives)
                )
                for name, stratum in e.strata[way].items()
            ],
        )
        for way, figures in intervals.strata_figures(e).items()
    }
    first = tables.first_metrics(e.models)
    return EvaluationPart(
        notes=e.notes,
        lines=facts.evaluation_lines(e),
        models=tables.metrics_table(
            f"All models on {e.requests} test requests, {candidates(e.negatives)} candidates",
            first,
            sure_hits(e.most_negatives),
        ),
        all_metrics=tables.metrics_table("All metrics", e.models, sure_hits(e.most_negatives))
        if first != e.models
        else None,
        figures=intervals.model_figures(e),
        seeds=tables.seeds_table(e) if e.seeds else None,
        catalogue=catalogue,
        catalogue_all=catalogue_all,
        comparisons=tables.comparisons_table(e) if e.comparisons else None,
        comparison_figures=intervals.comparison_figures(e.comparisons),
        strata=strata,
    )


def _other_pairs(material: Material) -> list[str]:
    """Paired differences of runs, by the scores their evaluations left, which no evaluation shown gives itself.

    A run that is one seed of a model has that beside its name: the model's name alone stands for all seeds.
    """
    folders = material.evaluation_folders
    scored = [folder for folder in folders.values() if (folder / SCORES_FILE).exists()]
    found = {name: evaluation_of(run, scored) for name, run in material.runs.items()}
    places = {name: place for name, place in found.items() if place is not None}
    by_folder = {folder: material.evaluations[name] for name, folder in folders.items()}
    labels = {
        name: f"{name} ({ranked_as})" if split_name(ranked_as)[1] else name for name, (_, ranked_as) in places.items()
    }
    pairs = []
    for a, b in combinations(places, 2):
        (first, as_a), (second, as_b) = places[a], places[b]
        compared = {frozenset((c.a, c.b)) for c in by_folder[first].comparisons} if first == second else set()
        if frozenset((as_a, as_b)) not in compared:
            pairs.append((a, b))
    lines = [
        line
        for a, b in pairs[:MOST_PAIRS]
        for line in paired_lines([material.runs[a], material.runs[b]], [labels[a], labels[b]], scored)
    ]
    more = len(pairs) - MOST_PAIRS
    return lines + ([f"{more} more pairs: `dmpo runs compare` shows them"] if more > 0 else [])


def _study(table: pd.DataFrame) -> StudyPart:
    return StudyPart(
        sweep=study.sweep_figures(table),
        shots=study.shots_figures(table),
        transfer=study.transfer_table(table),
        cells=study.cells_table(table),
    )


def _explanations(x: Explanations) -> ExplanationsPart:
    parts = [
        ExplainedPart(
            r,
            by_word((token.text, token.log_ratio) for token in r.tokens),
            explained.history_table(r) if r.history else None,
        )
        for r in x.requests
    ]
    return ExplanationsPart(
        model=x.model,
        reference=x.reference,
        shown=parts[:SHOWN],
        folded=parts[SHOWN : SHOWN + FOLDED],
        left_out=max(0, len(parts) - SHOWN - FOLDED),
        figures=explained.faithfulness_figures(x.faithfulness) if x.faithfulness else [],
    )


def _data(card: ReportedData) -> DataPart:
    content = card.content
    cuts = content.cuts
    lines = [f"Validation from {cuts['validation'].utc}, test from {cuts['test'].utc}."] if cuts else []
    lines += content.notes
    lines.append(f"Fingerprint {content.fingerprint}, seed {content.seed}.")
    if card.trained:
        lines.append(f"By its fingerprint what these runs were trained on: {', '.join(card.trained)}.")
    if card.others:
        lines.append(f"Not what these runs were trained on: {', '.join(card.others)}.")
    return DataPart(
        name=content.name,
        counts=facts.counts_table(card),
        leaks=facts.leaks_table(card),
        lines=lines,
        config=yaml.safe_dump(content.config, sort_keys=False, allow_unicode=True),
    )


def _privacy(material: Material) -> str:
    text = "This page holds interaction data: figures made of users' logged choices"
    users = len({request.user for x in material.explanations.values() for request in x.requests})
    if users:
        text += f", and the user ids and histories of {users} user{'s' * (users > 1)} under Explanations"
    return f"{text}. Pass it on only as the terms of the data allow."
