"""What a page shows, section by section; a section without data is left out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import yaml

from dmpo_dist.evaluation.seeds import split_name
from dmpo_dist.explanation.words import by_word
from dmpo_dist.figures.curves import MOST_RUNS, VALIDATION_PANEL, curve_charts, run_panels, side_by_side_panels
from dmpo_dist.figures.explanations import faithfulness_charts
from dmpo_dist.figures.study import few_shot_charts, matrix_charts, sweep_charts
from dmpo_dist.formats import candidates
from dmpo_dist.records.compare import evaluation_of, paired_lines
from dmpo_dist.records.read import Run
from dmpo_dist.report import facts, intervals, study, tables
from dmpo_dist.report.explained import history_table
from dmpo_dist.report.gather import DataCard, Material
from dmpo_dist.report.headline import describe_run, headline
from dmpo_dist.report.records import ExplainedRequest, Explanations
from dmpo_dist.tables import Table

WAYS = {
    "popularity": "popularity of the target",
    "history": "length of the history",
    "item_cold": "how often the target was taken before",
}
STAGES = {"sft": "SFT runs", "train": "Preference runs"}
SHOWN, FOLDED = 5, 20  # of the requests of an explanations.json
OPEN_RUNS = 4  # whose curves are not folded
MOST_PAIRS = 10  # of runs, beyond those an evaluation compares
INTERVALS_NOTE = (
    "Best of each column in bold, the oracle apart; intervals are 95 %, by bootstrap over users (and seeds, where there are "
    "several). In the figures language models are blue, baselines grey, the oracle a ring."
)
DIFFERENCES_NOTE = (
    "To the right of 0 the first model is better; grey: the interval holds 0, no clear difference. What is far from all others "
    "(random, untuned, oracle) stands in the table alone, where clear differences are bold."
)

Kind = Literal["heading", "text", "note", "warning", "lines", "code", "charts", "table", "explained", "folded"]


@dataclass(frozen=True)
class Block:
    """One thing on the page, from top to bottom.

    Attributes:
        content: of heading, text, note, warning and code a text; of lines several; of charts a list of Chart; of table a Table;
            of explained an ExplainedPart; of folded further blocks.
        summary: of folded blocks, what is seen of them before they are opened.
    """

    kind: Kind
    content: Any
    summary: str = ""


@dataclass(frozen=True)
class ExplainedPart:
    """One request that is explained."""

    request: ExplainedRequest
    words: Sequence[tuple[str, float]]
    history: Table | None


@dataclass(frozen=True)
class Page:
    """Everything the template shows.

    Attributes:
        sections: key -> blocks, in the order of ``SECTIONS``.
        absent: headings of the sections that have none.
    """

    title: str
    headline: Sequence[str]
    privacy: str
    notes: Sequence[str]
    sections: dict[str, list[Block]]
    absent: Sequence[str]


def make_page(material: Material) -> Page:
    """Turn what was gathered into what is shown."""
    sections = {key: list(blocks(material)) for key, (_, blocks) in SECTIONS.items()}
    return Page(
        title=material.title,
        headline=headline(material),
        privacy=_privacy(material),
        notes=material.notes,
        sections={key: blocks for key, blocks in sections.items() if blocks},
        absent=[SECTIONS[key][0] for key, blocks in sections.items() if not blocks],
    )


def _results(material: Material) -> Iterator[Block]:
    for name, e in material.evaluations.items():
        yield from _heading(name, material.evaluations)
        yield from (Block("warning", f"Note: {note}") for note in e.notes)
        first = tables.first_metrics(e.models)
        caption = f"All models on {e.requests} test requests, {candidates(e.negatives)} candidates"
        yield Block("table", tables.metrics_table(caption, first, e.sure_hits, e.seeds))
        yield Block("note", INTERVALS_NOTE)
        yield Block("charts", intervals.model_charts(e))
        if first != e.models:
            yield _folded_table("All metrics", tables.metrics_table("All metrics", e.models, e.sure_hits, e.seeds))
        if e.seeds:
            yield Block("table", tables.seeds_table(e))
        if e.catalogue is not None:
            items = f"all {e.catalogue.items} items" if e.catalogue.items else "the whole catalogue"
            few = tables.first_metrics(e.catalogue.models)
            yield Block("table", tables.metrics_table(f"Among {items}, those a user had taken left out", few))
            if few != e.catalogue.models:
                whole = tables.metrics_table(f"All metrics among {items}", e.catalogue.models)
                yield _folded_table("All metrics among the whole catalogue", whole)
        lines = facts.evaluation_lines(e)
        if lines:
            yield Block("lines", lines)


def _comparisons(material: Material) -> Iterator[Block]:
    for name, e in material.evaluations.items():
        if e.comparisons:
            yield from _heading(name, material.evaluations)
            yield Block("charts", intervals.comparison_charts(e.comparisons))
            yield Block("note", DIFFERENCES_NOTE)
            yield Block("table", tables.comparisons_table(e))
    pairs = _other_pairs(material)
    if pairs:
        yield Block("heading", "Other pairs of runs")
        yield Block("lines", pairs)


def _training(material: Material) -> Iterator[Block]:
    if not material.runs:
        return
    yield Block("table", facts.runs_table(material.runs))
    for stage, title in STAGES.items():
        runs = {name: run for name, run in material.runs.items() if run.stage == stage}
        if len(runs) > 1:
            yield Block("heading", f"{title} side by side")
            yield Block("charts", _side_by_side(runs))
    for place, (name, run) in enumerate(material.runs.items()):
        best = run.best_step
        note = "" if best is None else f"The line is step {best}, whose weights are the result."
        charts = curve_charts(run_panels(run.train, run.validation, best), {VALIDATION_PANEL: note})
        if charts:
            yield Block("heading", name)
            yield Block("note", describe_run(run))
            curves = Block("charts", charts)
            yield curves if place < OPEN_RUNS else Block("folded", [curves], f"Curves of {name}")


def _side_by_side(runs: Mapping[str, Run]) -> list[Any]:
    """Charts of the quantities that two of the first MOST_RUNS runs logged."""
    shown = dict(list(runs.items())[:MOST_RUNS])
    frames = {name: (run.train, run.validation) for name, run in shown.items()}
    panels = [p for p in side_by_side_panels(frames, next(iter(shown.values())).metric) if len(p.lines) > 1]
    note = f"The first {MOST_RUNS} of {len(runs)} runs." if len(runs) > MOST_RUNS else ""
    return curve_charts(panels, {panel.title: note for panel in panels})


def _strata(material: Material) -> Iterator[Block]:
    for name, e in material.evaluations.items():
        if e.strata:
            yield from _heading(name, material.evaluations)
        for way, strata in e.strata.items():
            yield Block("heading", f"By {WAYS.get(way, way.replace('_', ' '))}")
            yield Block("charts", intervals.strata_charts(e, strata))
            whole = [
                Block("table", tables.metrics_table(f"{part}: {s.requests} requests", s.models, e.sure_hits))
                for part, s in strata.items()
            ]
            yield Block("folded", whole, "All models and metrics")


def _sweep(material: Material) -> Iterator[Block]:
    for name, table in material.studies.items():
        yield from _charts(name, material, sweep_charts(study.points_of(table), study.whiskers_note(table)))


def _shots(material: Material) -> Iterator[Block]:
    for name, table in material.studies.items():
        yield from _charts(name, material, few_shot_charts(study.points_of(table), study.whiskers_note(table)))


def _transfer(material: Material) -> Iterator[Block]:
    for name, table in material.studies.items():
        transfer = study.transfer_table(table)
        if transfer is not None:
            yield from _charts(name, material, matrix_charts(study.points_of(table)))
            yield Block("table", transfer)


def _cells(material: Material) -> Iterator[Block]:
    for name, table in material.studies.items():
        yield from _heading(name, material.studies)
        yield _folded_table("The grid as a table", study.cells_table(table))


def _explanations(material: Material) -> Iterator[Block]:
    for name, x in material.explanations.items():
        yield from _heading(name, material.explanations)
        yield Block("text", f"Model {x.model}{f', reference {x.reference}' if x.reference else ''}.")
        charts = faithfulness_charts(x.faithfulness.model_dump()) if x.faithfulness else []
        if charts:
            yield Block("heading", "Faithfulness")
            yield Block("charts", charts)
        yield from _explained(x)


def _explained(x: Explanations) -> Iterator[Block]:
    blocks = [
        Block(
            "explained",
            ExplainedPart(
                r,
                by_word((token.text, token.log_ratio) for token in r.tokens),
                history_table(r) if r.history else None,
            ),
        )
        for r in x.requests[: SHOWN + FOLDED]
    ]
    yield from blocks[:SHOWN]
    if blocks[SHOWN:]:
        yield Block("folded", blocks[SHOWN:], f"{len(blocks) - SHOWN} more")
    if len(x.requests) > len(blocks):
        yield Block("note", f"{len(x.requests) - len(blocks)} further explanations are in explanations.json.")


def _data(material: Material) -> Iterator[Block]:
    for card in material.cards:
        content = card.content
        yield Block("heading", str(content["name"]))
        yield Block("table", facts.counts_table(card))
        leaks = facts.leaks_table(card)
        missing = "No leak check is written down: the data was prepared by a version without one."
        yield Block("table", leaks) if leaks else Block("text", missing)
        yield Block("lines", _card_lines(card))
        config = yaml.safe_dump(content.get("config") or {}, sort_keys=False, allow_unicode=True)
        yield Block("folded", [Block("code", config)], "How it was prepared")


def _card_lines(card: DataCard) -> list[str]:
    cuts = card.content.get("cuts")
    lines = [f"Validation from {cuts['validation']['utc']}, test from {cuts['test']['utc']}."] if cuts else []
    lines += map(str, card.content.get("notes") or [])
    lines.append(f"Fingerprint {card.content['fingerprint']}, seed {card.content.get('seed')}.")
    if card.trained:
        lines.append(f"By its fingerprint what these runs were trained on: {', '.join(card.trained)}.")
    if card.others:
        lines.append(f"Not what these runs were trained on: {', '.join(card.others)}.")
    return lines


def _configuration(material: Material) -> Iterator[Block]:
    differences = facts.differences_table(material.runs)
    if differences:
        yield Block("table", differences)
    for name, text in facts.config_texts(material.configs).items():
        yield Block("folded", [Block("code", text)], f"Whole configuration of {name}")


def _environment(material: Material) -> Iterator[Block]:
    table = facts.environment_table(material.environments)
    if table:
        yield Block("table", table)


def _files(material: Material) -> Iterator[Block]:
    if material.files:
        table = facts.files_table(material.files)
        yield _folded_table(table.caption, table)


SECTIONS = {
    "results": ("Results", _results),
    "comparisons": ("Paired comparisons", _comparisons),
    "training": ("Training curves", _training),
    "strata": ("Strata", _strata),
    "sweep": ("K sweep", _sweep),
    "shots": ("Few-shot curves", _shots),
    "transfer": ("Other domains", _transfer),
    "cells": ("Study, cell by cell", _cells),
    "explanations": ("Explanations", _explanations),
    "data": ("Data and leak check", _data),
    "configuration": ("Configuration", _configuration),
    "environment": ("Environment", _environment),
    "files": ("Files", _files),
}
"""Key -> heading and what makes the blocks, in the page's order."""


def _heading(name: str, names: Mapping[str, Any]) -> list[Block]:
    """The name of one of several things; a single one needs none."""
    return [Block("heading", name)] if len(names) > 1 else []


def _charts(name: str, material: Material, charts: Sequence[Any]) -> list[Block]:
    return [*_heading(name, material.studies), Block("charts", charts)] if charts else []


def _folded_table(summary: str, table: Table) -> Block:
    return Block("folded", [Block("table", table)], summary)


def _other_pairs(material: Material) -> list[str]:
    """Paired differences of runs, by the scores their evaluations left, which no evaluation shown gives itself.

    A run that is one seed of a model has that beside its name: the model's name alone stands for all seeds.
    """
    folders = material.evaluation_folders
    scored = [folder for folder in folders.values() if (folder / "scores.parquet").exists()]
    found = {name: evaluation_of(run, scored) for name, run in material.runs.items()}
    ranked = {name: place for name, place in found.items() if place is not None}
    by_folder = {folder: material.evaluations[name] for name, folder in folders.items()}
    labels = {
        name: f"{name} ({ranked_as})" if split_name(ranked_as)[1] else name for name, (_, ranked_as) in ranked.items()
    }
    pairs = []
    for a, b in combinations(ranked, 2):
        (first, as_a), (second, as_b) = ranked[a], ranked[b]
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


def _privacy(material: Material) -> str:
    text = "This page holds interaction data: figures made of users' logged choices"
    users = len({request.user for x in material.explanations.values() for request in x.requests})
    if users:
        text += f", and the user ids and histories of {users} user{'s' * (users > 1)} under Explanations"
    return f"{text}. Pass it on only as the terms of the data allow."
