"""Comparing runs: a table of all runs, the differences between some, and their curves in one picture."""

import json
from collections.abc import Sequence
from datetime import datetime
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from dmpo_dist.artifacts.evaluation import SCORES_FILE, Evaluation
from dmpo_dist.config.section import dotted
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.comparisons import COMPARED_METRICS, difference_line, judged
from dmpo_dist.evaluation.metrics import paired_bootstrap, ranking_metrics
from dmpo_dist.figures.curves import SIDE_BY_SIDE, has_values, losses_apart, side_by_side_drawings
from dmpo_dist.figures.models import looks_of
from dmpo_dist.figures.style import save_grid
from dmpo_dist.parsing import parsing
from dmpo_dist.records.read import LAST_FIGURES, VALIDATION_METRICS, Run
from dmpo_dist.tables import Table, terminal, texts

METRIC = "ndcg@10"
DRAWN = ("sft_loss", "preference_loss", "margin")
REQUEST = ["timestamp", "user"]


def find_evaluations(root: Path) -> list[Path]:
    """Folders in and below ``root`` that hold an evaluation with its scores."""
    return sorted(file.parent for file in root.rglob(Evaluation.FILE) if (file.parent / SCORES_FILE).exists())


LESS_IMPORTANT = ("commit", "groups/s", "when", "start", "at step", "objective", "test")
"""Columns that a narrow terminal does without, the first ones first."""


def show_runs(runs: Sequence[Run], root: Path, console: Console) -> None:
    """Print a table with a row for each run: validation at its best step, and the latest evaluation of its model."""
    names, evaluations = run_names(runs, root), find_evaluations(root)
    note = f"best: {METRIC} on validation, at the step whose weights were selected; test: {METRIC} where evaluated"
    rows = [
        [
            name,
            _start(run),
            run.stage or "-",
            run.config["objective"]["name"] if run.stage == "train" else "-",
            f"{run.steps[0]}/{run.steps[1]}" if run.steps[1] else "-",
            _number(run.result().get(f"validation/{METRIC}"), ".3f"),
            _number(run.best_step, "d"),
            _test(run, evaluations),
            _number(run.groups_per_second, ".1f"),
            datetime.fromtimestamp(run.began).strftime("%Y-%m-%d %H:%M") if run.began else "-",
            _commit(run),
            "finished" if run.end else "unfinished",
        ]
        for run, name in zip(runs, names, strict=True)
    ]
    columns = [
        "run",
        "start",
        "stage",
        "objective",
        "steps",
        "best",
        "at step",
        "test",
        "groups/s",
        "when",
        "commit",
        "state",
    ]
    shown = _that_fit(columns, rows, console.width if console.is_terminal else None)
    if len(shown) < len(columns):
        note += f"; left out for want of room: {', '.join(c for i, c in enumerate(columns) if i not in shown)} (--json)"
    table = Table("", [columns[i] for i in shown], texts([[row[i] for i in shown] for row in rows]), 2, note=note)
    if not console.is_terminal:  # a pipe has no width, so nothing is folded there
        console = Console(file=console.file, width=max(console.width, _width(columns, rows, shown)))
    console.print(terminal(table))


def runs_as_json(runs: Sequence[Run], root: Path) -> str:
    """A JSON list with an object for each run: what ``show_runs`` shows, unrounded."""
    evaluations = find_evaluations(root)
    found = [
        {
            "run": name,
            "folder": str(run.folder),
            "start": _start(run),
            "stage": run.stage,
            "objective": run.config["objective"]["name"] if run.stage == "train" else None,
            "step": run.steps[0],
            "steps": run.steps[1],
            f"validation/{METRIC}": run.result().get(f"validation/{METRIC}"),
            "best_step": run.best_step,
            f"test/{METRIC}": _test(run, evaluations),
            "groups_per_second": run.groups_per_second,
            "began": run.began,
            "commit": _commit(run),
            "finished": bool(run.end),
        }
        for run, name in zip(runs, run_names(runs, root), strict=True)
    ]
    return json.dumps(found, indent=2, ensure_ascii=False)


def _that_fit(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int | None) -> list[int]:
    """Which columns leave the first one whole in a table ``width`` wide: the less important go first."""
    shown = list(range(len(columns)))
    for name in LESS_IMPORTANT:
        if width is None or _width(columns, rows, shown) <= width:
            break
        shown.remove(columns.index(name))
    return shown


def _width(columns: Sequence[str], rows: Sequence[Sequence[str]], shown: Sequence[int]) -> int:
    """Characters that these columns take, with those between them."""
    return sum(max(len(str(row[i])) for row in [columns, *rows]) + 3 for i in shown)


def run_names(runs: Sequence[Run], root: Path) -> list[str]:
    """The name of each run: its path relative to ``root``."""
    return [str(run.folder.relative_to(root)) if run.folder != root else run.folder.name for run in runs]


def show_comparison(runs: Sequence[Run], names: Sequence[str], evaluations: Sequence[Path], console: Console) -> None:
    """Print the configuration keys that differ, final figures, and paired differences on the same test requests.

    Args:
        runs: two or more.
        names: their names in the output.
        evaluations: folders with scores; of those that rank a run's model the latest is used.
    """
    configs = [dotted(run.config) for run in runs]
    differing = [
        key for key in dict.fromkeys(k for c in configs for k in c) if len({str(c.get(key)) for c in configs}) > 1
    ]
    differing = [key for key in differing if key != "output_dir"]
    _show_side_by_side("configuration", {key: [c.get(key, "-") for c in configs] for key in differing}, names, console)
    results = [{"last_step": run.steps[0]} | run.result() for run in runs]
    keys = dict.fromkeys(key for result in results for key in result)
    figures = {key: [f"{r[key]:.4g}" if key in r else "-" for r in results] for key in keys}
    _show_side_by_side("final figures", {_at(key): values for key, values in figures.items()}, names, console)
    for line in paired_lines(runs, names, evaluations):
        console.print(line, highlight=False)


def paired_lines(
    runs: Sequence[Run],
    names: Sequence[str],
    evaluations: Sequence[Path],
    pairs: Sequence[tuple[int, int]] | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> list[str]:
    """For each pair of runs a line per metric, "a against b: ndcg@10 +0.021 [0.008, 0.034]", or the reason for none.

    Args:
        pairs: indices of the runs to compare; None is every pair. What is called clear depends on how many these are.
    """
    scores = [_test_scores(run, evaluations) for run in runs]
    lines = [f"{name}: no evaluation ranks its model" for name, s in zip(names, scores, strict=True) if s is None]
    compared: list[tuple[dict[str, Any], int]] = []
    for i, j in combinations(range(len(runs)), 2) if pairs is None else pairs:
        first, second = scores[i], scores[j]
        if first is None or second is None:
            continue
        if not first.drop(columns="score").equals(second.drop(columns="score")):
            lines.append(f"{names[j]} against {names[i]}: evaluated on other candidates, so not comparable")
            continue
        values = [ranking_metrics(_by_request(frame)) for frame in (second, first)]
        columns = [np.stack([v[metric] for metric in COMPARED_METRICS], axis=1) for v in values]
        for metric, *found in zip(
            COMPARED_METRICS, *paired_bootstrap(columns[0], columns[1], samples, seed), strict=True
        ):
            figures = dict(zip(("difference", "low", "high", "p"), map(float, found), strict=True))
            compared.append(({"a": names[j], "b": names[i], "metric": metric, **figures}, len(columns[0])))
    verdicts = judged(c for c, _ in compared)
    return lines + [difference_line(c, users, verdict) for (c, users), verdict in zip(compared, verdicts, strict=True)]


def plot_runs(runs: Sequence[Run], names: Sequence[str], metric: str, output: Path) -> None:
    """Draw losses, margin and the validation ``metric`` of several runs into a PNG; losses of SFT are apart.

    Raises:
        UserError: no run logged anything, or none logged ``metric``.
    """
    logged = sorted({name for run in runs for name in VALIDATION_METRICS if has_values(run.validation, name)})
    if logged and metric not in logged:
        raise UserError(f"--metric {metric}: no validation {metric} was logged; there is {', '.join(logged)}")
    named = dict(zip(names, runs, strict=True))
    frames = {name: (losses_apart(run.train, run.stage), run.validation) for name, run in named.items()}
    looks = looks_of({name: run.model for name, run in named.items()})
    drawings = side_by_side_drawings(frames, metric, looks, {column: SIDE_BY_SIDE[column] for column in DRAWN})
    if not drawings:
        raise UserError(f"nothing to draw: {', '.join(names)} stopped before the first log line")
    save_grid(drawings, output, columns=len(drawings))


def _show_side_by_side(title: str, rows: dict[str, list[Any]], names: Sequence[str], console: Console) -> None:
    if not rows:
        console.print(f"{title}: no difference")
        return
    table = Table(title, ["", *names], texts([[key, *values] for key, values in rows.items()]), 1 + len(names))
    console.print(terminal(table))


def _at(key: str) -> str:
    """The name of a figure of ``Run.result`` with its step: the step whose weights are kept need not be the last."""
    if key.startswith("validation/"):
        return f"{key} at selected_step"
    return f"{key} at last_step" if key in LAST_FIGURES else key


def _start(run: Run) -> str:
    """The run that made the starting model, or else the path of that model."""
    path = Path(run.config["model"]["path"])
    return path.parent.name if path.name == "model" else str(path)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _commit(run: Run) -> str:
    commit = run.environment.git_commit
    return "-" if commit is None else commit[:8] + ("*" if commit.endswith("-dirty") else "")


def _test(run: Run, evaluations: Sequence[Path]) -> str:
    found = evaluation_of(run, evaluations)
    if found is None:
        return "-"
    folder, name = found
    return f"{Evaluation.read(folder).figures_of(name)[METRIC].value:.3f}"


def evaluation_of(run: Run, evaluations: Sequence[Path]) -> tuple[Path, str] | None:
    """The latest evaluation that ranks the run's model, and its name there."""
    for folder in sorted(evaluations, key=lambda f: (f / Evaluation.FILE).stat().st_mtime, reverse=True):
        if name := Evaluation.read(folder).name_of(run.folder / "model"):
            return folder, name
    return None


def _test_scores(run: Run, evaluations: Sequence[Path]) -> pd.DataFrame | None:
    """The candidates of the test requests with the run's scores, sorted so that evaluations can be compared."""
    found = evaluation_of(run, evaluations)
    if found is None:
        return None
    folder, name = found
    with parsing(folder / SCORES_FILE, "run `dmpo evaluate` again"):
        table = pd.read_parquet(folder / SCORES_FILE, filters=[("model", "==", name)])
    # Titles too: ready rows have no items, and requests of any two files of them are called and numbered alike.
    table = table.sort_values([*REQUEST, "is_positive", "item", "title"], ascending=[True, True, False, True, True])
    return table[[*REQUEST, "is_positive", "item", "title", "score"]].reset_index(drop=True)


def _by_request(scores: pd.DataFrame) -> list[np.ndarray]:
    return [group.to_numpy() for _, group in scores.groupby(REQUEST, sort=False)["score"]]
