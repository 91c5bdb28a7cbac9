"""The sections of a page and their blocks; a section without data is left out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import yaml

from dmpo_dist.artifacts.explanations import ExplainedRequest, Explanations
from dmpo_dist.explanation.view import faithfulness_sentence
from dmpo_dist.explanation.words import by_word
from dmpo_dist.figures.curves import MOST_RUNS, losses_apart, run_drawings, side_by_side_drawings
from dmpo_dist.figures.explanations import faithfulness_drawings
from dmpo_dist.figures.study import MAIN_METRIC, few_shot_drawings, matrix_drawings, sweep_drawings
from dmpo_dist.figures.style import Drawing, Look
from dmpo_dist.formats import joined
from dmpo_dist.records.read import Run
from dmpo_dist.report import evaluated, metadata, study, users
from dmpo_dist.report.blocks import Block, folded_table, heading
from dmpo_dist.report.colours import page_looks
from dmpo_dist.report.explained import history_table
from dmpo_dist.report.gather import Material, ReportedData
from dmpo_dist.report.headline import describe_run, headline
from dmpo_dist.tables import Table

STAGES = {"sft": "SFT runs", "train": "Preference runs"}
SHOWN, FOLDED = 5, 20  # explained requests that are shown open, and folded
OPEN_RUNS = 4  # runs whose curves are shown open


@dataclass(frozen=True)
class ExplainedPart:
    """One explained request, with its words and their log-ratios, and the table of its history."""

    request: ExplainedRequest
    words: Sequence[tuple[str, float]]
    history: Table | None


@dataclass(frozen=True)
class Page:
    """Everything the template shows.

    Attributes:
        sections: key -> blocks, in the order of ``SECTIONS``.
        absent: headings of the sections without blocks.
    """

    title: str
    headline: Sequence[str]
    privacy: str
    notes: Sequence[str]
    sections: dict[str, list[Block]]
    absent: Sequence[str]


def make_page(material: Material) -> Page:
    """The page about ``material``."""
    sections = {key: list(blocks(material)) for key, (_, blocks) in SECTIONS.items()}
    return Page(
        title=material.title,
        headline=headline(material),
        privacy=_privacy(material, sections),
        notes=material.notes,
        sections={key: blocks for key, blocks in sections.items() if blocks},
        absent=[SECTIONS[key][0] for key, blocks in sections.items() if not blocks],
    )


def _training(material: Material) -> Iterator[Block]:
    if not material.runs:
        return
    yield Block("table", metadata.runs_table(material.runs))
    looks = page_looks(material).runs
    for stage, title in STAGES.items():
        runs = {name: run for name, run in material.runs.items() if run.stage == stage}
        if len(runs) > 1:
            yield Block("heading", f"{title} side by side")
            yield Block("figures", _side_by_side(runs, looks))
    for index, (name, run) in enumerate(material.runs.items()):
        drawings = run_drawings(run.train, run.validation, run.best_step, run.metric, looks[name])
        if drawings:
            yield Block("heading", name)
            yield Block("note", describe_run(run))
            curves = Block("figures", drawings)
            yield curves if index < OPEN_RUNS else Block("folded", [curves], f"Curves of {name}")


def _side_by_side(runs: Mapping[str, Run], looks: Mapping[str, Look]) -> list[Drawing]:
    """The quantities that two of the first MOST_RUNS runs logged."""
    shown = dict(list(runs.items())[:MOST_RUNS])
    frames = {name: (losses_apart(run.train, run.stage), run.validation) for name, run in shown.items()}
    note = f"The first {MOST_RUNS} of {len(runs)} runs." if len(runs) > MOST_RUNS else ""
    return side_by_side_drawings(frames, next(iter(shown.values())).metric, looks, note=note, fewest=2)


def _sweep(material: Material) -> Iterator[Block]:
    for name, table in material.studies.items():
        yield from _figures(name, material, sweep_drawings(study.points_of(table), study.whiskers_note(table)))


def _shots(material: Material) -> Iterator[Block]:
    for name, table in material.studies.items():
        note = study.whiskers_note(table)
        yield from _figures(name, material, few_shot_drawings(study.points_of(table), [MAIN_METRIC], note))


def _transfer(material: Material) -> Iterator[Block]:
    for name, table in material.studies.items():
        transfer = study.transfer_table(table)
        if transfer is not None:
            yield from _figures(name, material, matrix_drawings(study.points_of(table)))
            yield Block("table", transfer)


def _cells(material: Material) -> Iterator[Block]:
    for name, table in material.studies.items():
        yield from heading(name, material.studies)
        yield folded_table("The grid as a table", study.cells_table(table))


def _explanations(material: Material) -> Iterator[Block]:
    for name, x in material.explanations.items():
        yield from heading(name, material.explanations)
        yield Block("text", f"Model {x.model}{f', reference {x.reference}' if x.reference else ''}.")
        drawings = faithfulness_drawings(x.faithfulness.model_dump()) if x.faithfulness else []
        if drawings:
            yield Block("heading", "Faithfulness")
            sentence = faithfulness_sentence(x.faithfulness.model_dump()["areas"]) if x.faithfulness else ""
            yield from [Block("text", sentence)] * bool(sentence)
            yield Block("figures", drawings)
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
        yield Block("heading", content.name)
        yield Block("table", metadata.counts_table(card))
        leaks = metadata.leaks_table(card)
        missing = "There is no leak check in the card: the data was prepared by a version without one."
        yield Block("table", leaks) if leaks else Block("text", missing)
        yield Block("lines", _card_lines(card))
        config = yaml.safe_dump(content.config, sort_keys=False, allow_unicode=True)
        yield Block("folded", [Block("code", config)], "How it was prepared")


def _card_lines(card: ReportedData) -> list[str]:
    content, cuts = card.content, card.content.cuts
    lines = [f"Validation from {cuts['validation'].utc}, test from {cuts['test'].utc}."] if cuts else []
    lines += [*content.notes, f"Fingerprint {content.fingerprint}, seed {content.seed}."]
    if card.trained:
        lines.append(f"By its fingerprint, these runs were trained on this data: {', '.join(card.trained)}.")
    if card.others:
        lines.append(f"These runs were trained on other data: {', '.join(card.others)}.")
    return lines


def _configuration(material: Material) -> Iterator[Block]:
    differences = metadata.differences_table(material.runs)
    if differences:
        yield Block("table", differences)
    for name, text in metadata.config_texts(material.configs).items():
        yield Block("folded", [Block("code", text)], f"Whole configuration of {name}")


def _environment(material: Material) -> Iterator[Block]:
    table = metadata.environment_table(material.environments)
    if table:
        yield Block("table", table)


def _files(material: Material) -> Iterator[Block]:
    if material.files:
        table = metadata.files_table(material.files)
        yield folded_table(table.caption, table)


def _figures(name: str, material: Material, drawings: Sequence[Drawing]) -> list[Block]:
    return [*heading(name, material.studies), Block("figures", drawings)] if drawings else []


SECTIONS = {
    "results": ("Results", evaluated.results),
    "comparisons": ("Paired comparisons", evaluated.comparisons),
    "users": ("User by user", users.user_by_user),
    "lists": ("Ranked lists of a few users", users.ranked_lists),
    "training": ("Training curves", _training),
    "strata": ("Strata", evaluated.strata),
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
"""Key -> heading and the function that makes the blocks, in the order of the page."""
SINGLE_USERS = ("lists", "explanations")
"""Sections that show what single users did."""


def _privacy(material: Material, sections: Mapping[str, list[Block]]) -> str:
    text = "This page holds interaction data: figures made of users' logged choices"
    single = [SECTIONS[key][0] for key in SINGLE_USERS if sections[key]]
    if single:
        text += f", and user ids, titles and histories of single users under {joined(single)}"
    return f"{text}. Pass it on only as the terms of the data allow."
