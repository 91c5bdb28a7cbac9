"""Reading the given folders: training runs, evaluations, explanations, studies, data, files."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from dmpo_dist.artifacts.base import read_config
from dmpo_dist.artifacts.dataset import DatasetCard
from dmpo_dist.artifacts.environment import Environment
from dmpo_dist.artifacts.evaluation import Evaluation
from dmpo_dist.artifacts.explanations import Explanations
from dmpo_dist.artifacts.log import METRICS_FILE, MetricsLog
from dmpo_dist.data.store import seen_fingerprint
from dmpo_dist.errors import UserError
from dmpo_dist.records.read import CONFIG_FILE, Run, read_run
from dmpo_dist.report.records import STUDY_FILE, Summary, read_study, read_summary

BULK = ("checkpoints", "model", "scratch", "tensorboard", "train", "validation", "test")
"""Names of folders with many files but nothing to report; the list of files has one line for each of them."""
MOST_FILES = 120
MARK = '<meta name="generator" content="dmpo report">'
"""A page with this tag was written by `dmpo report` and may be overwritten by it."""


@dataclass(frozen=True)
class Found:
    """One of the given folders, and the folders in it by what they hold; ``cells`` are the runs of a study's cells."""

    folder: Path
    runs: list[Path] = field(default_factory=list)
    evaluations: list[Path] = field(default_factory=list)
    explanations: list[Path] = field(default_factory=list)
    studies: list[Path] = field(default_factory=list)
    cells: list[Path] = field(default_factory=list)
    cards: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class ReportedData:
    """The card of prepared data.

    Attributes:
        content: the card.
        trained: names of the runs that were trained on this data or on ``data.shots`` of its groups, by fingerprint.
        others: names of the runs that were trained on none of the data found.
    """

    content: DatasetCard
    trained: list[str]
    others: list[str]


@dataclass(frozen=True)
class Material:
    """Everything that a page is made from. Names are paths relative to the common parent of the given folders.

    Attributes:
        title: what the page is about.
        runs: name -> run, in the order of their start.
        evaluations: name -> evaluation.
        evaluation_folders: name -> folder of the evaluation.
        configs, environments: name -> configuration or environment of a run or an evaluation, where it has one; of the
            cells of studies one configuration, as an example, and all environments.
        explanations: name -> explanations.
        studies: name -> the rows that `dmpo experiment` wrote.
        summaries: name of a study -> its means over seeds and paired differences; None for those of earlier versions.
        cards: of the data that the folders hold, or that their runs were trained on.
        files: path and bytes; a folder of many files is one entry that ends in "/ (n files)".
        notes: for readers, what could not be read or is left out.
        single_users: whether the page may show what single users did.
    """

    title: str
    runs: dict[str, Run]
    evaluations: dict[str, Evaluation]
    evaluation_folders: dict[str, Path]
    configs: dict[str, dict[str, Any]]
    environments: dict[str, Environment]
    explanations: dict[str, Explanations]
    studies: dict[str, pd.DataFrame]
    summaries: dict[str, Summary | None]
    cards: list[ReportedData]
    files: list[tuple[str, int]]
    notes: list[str]
    single_users: bool = True


def gather(folders: Sequence[Path], explanations: bool = True) -> Material:
    """Read everything a report can show from ``folders`` and what lies below them.

    Args:
        folders: of training runs, evaluations or studies, or folders that hold several of them.
        explanations: whether to show single users: explanations and ranked lists.

    Raises:
        UserError: a folder is missing or holds nothing to report, or a file in it is damaged or of another version.
    """
    found = [_look(folder) for folder in folders]
    root = Path(os.path.commonpath([f.folder.resolve() for f in found]))
    runs = sorted(map(read_run, _unique([p for f in found for p in f.runs])), key=lambda run: run.began)
    by_name = {_name(run.folder, root): run for run in runs}
    ranked = {_name(p, root): p for p in _unique([p for f in found for p in f.evaluations])}
    configs = {name: run.config for name, run in by_name.items()}
    environments = {name: run.environment for name, run in by_name.items()}
    cells = _unique([p for f in found for p in f.cells])
    for cell in cells[:1]:  # one as an example: the study's table shows in which settings the others differ
        configs.setdefault(_name(cell, root), read_config(cell / CONFIG_FILE))
    for name, folder in ranked.items():
        configs.setdefault(name, read_config(folder / CONFIG_FILE))
    for folder in [*cells, *ranked.values()]:
        environments.setdefault(_name(folder, root), Environment.read_if_there(folder) or Environment())
    explained = _unique([p for f in found for p in f.explanations]) if explanations else []
    studied = {_name(p, root): p for p in _unique([p for f in found for p in f.studies])}
    notes = [note for name, run in by_name.items() for note in _damaged_lines(name, run.log)]
    cards, missing = _cards([p for f in found for p in f.cards], by_name, configs)
    return Material(
        title=", ".join(dict.fromkeys(f.folder.resolve().name for f in found)),
        runs=by_name,
        evaluations={name: Evaluation.read(folder) for name, folder in ranked.items()},
        evaluation_folders=ranked,
        configs={name: config for name, config in configs.items() if config},
        environments={name: environment for name, environment in environments.items() if environment.content()},
        explanations={_name(p, root): Explanations.read(p) for p in explained},
        studies={name: read_study(p / STUDY_FILE) for name, p in studied.items()},
        summaries={name: read_summary(p) for name, p in studied.items()},
        cards=cards,
        files=_files([f.folder for f in found], root),
        notes=notes + missing,
        single_users=explanations,
    )


def _look(folder: Path) -> Found:
    """Find runs, evaluations, explanations, studies and data cards in and below ``folder``."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give what was output_dir, such as runs/quickstart")
    found = Found(folder)
    for path, files in _walk(folder):
        if STUDY_FILE in files:
            found.studies.append(path)
        if any(path != study and path.is_relative_to(study) for study in found.studies):
            found.cards.extend([path] if DatasetCard.FILE in files else [])
            found.cells.extend([path] if METRICS_FILE in files else [])
            continue  # the runs of a study's cells are in the study's table, not among the runs of the page
        if METRICS_FILE in files and CONFIG_FILE in files:
            found.runs.append(path)
        for file, holders in (
            (Evaluation.FILE, found.evaluations),
            (Explanations.FILE, found.explanations),
            (DatasetCard.FILE, found.cards),
        ):
            if file in files:
                holders.append(path)
    if not (found.runs or found.evaluations or found.explanations or found.studies or found.cards):
        raise UserError(
            f"{folder} holds no run: no {CONFIG_FILE} with {METRICS_FILE}, no {Evaluation.FILE}, no {STUDY_FILE}, "
            f"in it or below; give what was output_dir (`dmpo runs list` shows training runs)"
        )
    return found


def _walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders from the top down in a fixed order, without bulk and hidden ones."""
    for path, names, files in os.walk(folder):
        # os.walk goes on with the list that it gave out, so this both sorts and prunes.
        names[:] = sorted(n for n in names if not n.startswith(".") and not _is_bulk(Path(path, n)))
        yield Path(path), files


def _is_bulk(folder: Path) -> bool:
    """Whether ``folder`` has a name in BULK and is not a run of that name."""
    return folder.name in BULK and not (folder / CONFIG_FILE).exists()


def _unique(paths: Sequence[Path]) -> list[Path]:
    """Each folder or file once, spelt as where it came first."""
    return list({path.resolve(): path for path in reversed(paths)}.values())[::-1]


def _name(path: Path, root: Path) -> str:
    path = path.resolve()
    return path.relative_to(root).as_posix() if path != root else path.name


def _below(folder: Path, name: str, root: Path) -> str:
    """The path of something in ``folder``, which may be a link to elsewhere."""
    return (folder.resolve() / name).relative_to(root).as_posix()


def _damaged_lines(name: str, log: MetricsLog) -> list[str]:
    """A note on the damaged lines of a metrics.jsonl, if there are any."""
    bad = log.damaged
    if not bad:
        return []
    if bad == [log.lines]:
        return [f"{name}/{METRICS_FILE}: its last line is cut off, as when a run is killed while it writes; left out"]
    listed = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
    return [
        f"{name}/{METRICS_FILE}: {len(bad)} of {log.lines} lines are damaged and left out (line {listed}); "
        "the curves are of the others"
    ]


def _cards(
    folders: Sequence[Path], runs: dict[str, Run], configs: dict[str, dict[str, Any]]
) -> tuple[list[ReportedData], list[str]]:
    """The cards in ``folders`` and of the data that configurations name, each once; and notes on data not found."""
    notes: dict[str, None] = {}
    files = [folder / DatasetCard.FILE for folder in folders]
    for config in configs.values():
        path = (config.get("data") or {}).get("path")
        file = Path(str(path)) / DatasetCard.FILE
        if path is not None and file.is_file():
            files.append(file)
        elif path is not None and not folders:
            notes[f"the data card of {path} is missing: there is no such folder"] = None
    contents = {card.fingerprint: card for card in map(DatasetCard.read, _unique(files))}
    trained = {key: [name for name, run in runs.items() if _trained_on(run, key)] for key in contents}
    known = {name for names in trained.values() for name in names}
    others = [name for name, run in runs.items() if run.environment.data_fingerprint and name not in known]
    cards = [ReportedData(card, trained[key], others) for key, card in contents.items()]
    return cards, list(notes)


def _trained_on(run: Run, fingerprint: str) -> bool:
    """Whether the run was trained on the data of ``fingerprint``, on all of it or on ``data.shots`` of its groups."""
    return run.environment.data_fingerprint == seen_fingerprint(fingerprint, run.config.get("data") or {})


def _files(folders: Sequence[Path], root: Path) -> list[tuple[str, int]]:
    entries: dict[str, int] = {}
    for folder in folders:
        for parent, names, files in os.walk(folder):
            path = Path(parent)
            bulk = sorted(name for name in names if _is_bulk(path / name))
            names[:] = sorted(name for name in names if name not in bulk and not name.startswith("."))
            for name in sorted(files):
                if not name.startswith(".") and not is_report(path / name):
                    entries[_below(path, name, root)] = (path / name).lstat().st_size
            for name in bulk:
                sizes = [file.lstat().st_size for file in (path / name).rglob("*") if file.is_file()]
                entries[f"{_below(path, name, root)}/ ({len(sizes)} files)"] = sum(sizes)
    shown = list(entries.items())[:MOST_FILES]
    rest = list(entries.values())[MOST_FILES:]
    return shown + ([(f"{len(rest)} more", sum(rest))] if rest else [])


def is_report(file: Path) -> bool:
    """Whether ``file`` is a page that this command wrote."""
    if file.suffix != ".html" or not file.is_file():
        return False
    with file.open("rb") as opened:
        return MARK.encode() in opened.read(1000)
