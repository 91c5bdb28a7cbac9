"""Tables about the origin of results: runs, data, configuration, environment, files."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import yaml

from dmpo_dist.artifacts.environment import Environment
from dmpo_dist.artifacts.evaluation import BaselineTraining, Evaluation
from dmpo_dist.config.section import dotted
from dmpo_dist.data.splits import SPLITS
from dmpo_dist.evaluation.sentences import order_line
from dmpo_dist.evaluation.tables import left_out_line
from dmpo_dist.formats import MISSING, number, size
from dmpo_dist.records.read import Run
from dmpo_dist.report.gather import ReportedData
from dmpo_dist.tables import Cell, Table

NO_SETTING = "output_dir"
CHOSEN = ("regularization", "epochs")
"""Settings of the classical baselines that are chosen on validation."""
VERDICTS = {"leak": "leak", "warning": "warn"}
LONG = 60  # longer values of the configuration are cut in the table of differences


def runs_table(runs: Mapping[str, Run]) -> Table:
    """A row for each run: stage, steps, validation at the selected step, speed, when it began, whether it finished."""
    rows = []
    for name, run in runs.items():
        result, (done, total) = run.result(), run.steps
        when = datetime.fromtimestamp(run.began, UTC).strftime("%Y-%m-%d %H:%M") if run.began else MISSING
        metric = result.get(f"validation/{run.metric}")
        rows.append(
            [
                Cell(name, kind="code"),
                Cell({"sft": "SFT", "train": "preferences"}.get(run.stage, MISSING)),
                Cell(f"{done} of {total}" if total else str(done), key=done),
                Cell(number(result.get("loss"), ".4g"), key=result.get("loss")),
                Cell(number(metric), f"{run.metric}, step {run.best_step}" if metric is not None else "", key=metric),
                Cell(number(run.groups_per_second, ".1f"), _workers(run), key=run.groups_per_second),
                Cell(when),
                Cell("finished" if run.end else "unfinished", kind="" if run.end else "warn"),
            ]
        )
    columns = ["run", "stage", "steps", "last loss", "validation", "groups/s", "began (UTC)", "state"]
    return Table("Training runs; validation at the step whose weights were selected", columns, rows, 2, len(rows) > 2)


def evaluation_lines(evaluation: Evaluation) -> list[str]:
    """Remarks on an evaluation: the metrics left out of tables, the settings chosen for the classical baselines and the
    requests unknown to them, and how little scores depend on the order of candidates."""
    known = dict.fromkeys(metric for of_model in evaluation.models.values() for metric in of_model)
    left_out = left_out_line(list(known), evaluation.most_negatives)
    lines = [f"{left_out}."] if left_out else []
    lines += [_baseline_line(name, baseline) for name, baseline in evaluation.baselines.items()]
    moved = order_line({"order": evaluation.order.content()}) if evaluation.order else None
    return lines + ([f"{moved}."] if moved else [])


def counts_table(card: ReportedData) -> Table:
    """Groups, users and dropped likes of each split."""
    content = card.content
    rows = []
    for split in [s for s in SPLITS if s in content.counts]:
        dropped = content.dropped.get(split, {})
        drops = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in dropped.items() if count)
        users = content.users.get(split)
        rows.append(
            [
                Cell(split),
                Cell(str(content.counts[split])),
                Cell(MISSING if users is None else str(users)),
                Cell(drops or MISSING, kind="title"),
            ]
        )
    return Table("Preference groups by split", ["split", "groups", "users", "dropped likes"], rows, 4)


def leaks_table(card: ReportedData) -> Table | None:
    """The findings of the leak check, worst first; None for data that was prepared by a version without one."""
    order = {"leak": 0, "warning": 1, "not checked": 2}
    rows = [
        [
            Cell(finding.check, finding.verdict, VERDICTS.get(finding.verdict, "")),
            Cell(finding.text, below="; ".join(finding.examples), kind="title"),
        ]
        for finding in sorted(card.content.leaks, key=lambda finding: order.get(finding.verdict, 3))
    ]
    return Table("Leak check", ["check", "finding"], rows, 2) if rows else None


def differences_table(runs: Mapping[str, Run]) -> Table | None:
    """Keys of the configuration in which the runs differ; None for a single run or equal configurations."""
    configs = {name: dotted(run.config) for name, run in runs.items()}
    keys = dict.fromkeys(key for config in configs.values() for key in config)
    differ = [
        key
        for key in keys
        if key != NO_SETTING and len({json.dumps(c.get(key), default=str) for c in configs.values()}) > 1
    ]
    rows = [
        [Cell(key, kind="code"), *(Cell(_value(config.get(key)), kind="code") for config in configs.values())]
        for key in differ
    ]
    if len(runs) < 2 or not rows:
        return None
    return Table("Settings in which the runs differ", ["key", *configs], rows, len(configs) + 1)


def config_texts(configs: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """Each whole configuration as YAML."""
    return {name: yaml.safe_dump(config, sort_keys=False, allow_unicode=True) for name, config in configs.items()}


def environment_table(environments: Mapping[str, Environment]) -> Table | None:
    """Versions, commit and hardware, one column for all folders that agree; None where nothing is known."""
    by_content: dict[str, tuple[dict[str, str], list[str]]] = {}
    for name, known in environments.items():
        shown = _environment(known)
        if shown:
            by_content.setdefault(json.dumps(shown), (shown, []))[1].append(name)
    if not by_content:
        return None
    sets = list(by_content.values())
    keys = dict.fromkeys(key for shown, _ in sets for key in shown)
    rows = [
        [Cell(key), *(Cell(shown.get(key, MISSING), kind="code" if key == "commit" else "") for shown, _ in sets)]
        for key in keys
    ]
    headings = ["everywhere"] if len(sets) == 1 else [_listed(names) for _, names in sets]
    return Table("What it ran on", ["property", *headings], rows, 1 + len(sets))


def files_table(files: Sequence[tuple[str, int]]) -> Table:
    """The files in the folders, with their sizes."""
    rows = [[Cell(path, kind="code"), Cell(size(count), key=count)] for path, count in files]
    total = sum(count for _, count in files)
    return Table(f"Files, {size(total)} in all", ["file", "size"], rows, sortable=len(rows) > 2)


def _baseline_line(name: str, baseline: BaselineTraining) -> str:
    chosen = [f"{key} {baseline.settings[key]:g}" for key in CHOSEN if key in baseline.settings]
    best = max(baseline.validation.values(), default=None)
    why = "" if best is None else f", chosen by its validation NDCG@10 of {number(best)}"
    return (
        f"{name}: {', '.join(chosen)}{why}; {baseline.unknown_positives} targets it had never seen, "
        f"{baseline.requests_with_unknown_history} histories it knew nothing of."
    )


def _value(value: Any) -> str:
    text = MISSING if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONG else f"{text[: LONG - 1]}…"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{names[0]}, {names[1]} and {len(names) - 2} more"


def _workers(run: Run) -> str:
    start = run.start
    return f"on {start.world_size} x {start.device}" if start and start.world_size and start.device else ""


def _environment(known: Environment) -> dict[str, str]:
    shown = {
        "dmpo_dist": known.dmpo_dist,
        "commit": known.git_commit,
        "Python": known.python,
        "machine": known.platform,
        "CPUs": known.cpus,
        **known.packages,
    }
    return {key: str(value) for key, value in shown.items() if value is not None}
