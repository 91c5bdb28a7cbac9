"""The files with an experiment's results: Parquet for programs, Markdown and pictures for people."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from dmpo_dist.artifacts.files import whole_file, write_whole
from dmpo_dist.config.section import dotted
from dmpo_dist.data.store import PreparedData
from dmpo_dist.evaluation.memorization import memorization_table
from dmpo_dist.experiment.memorization import probed
from dmpo_dist.experiment.methods import baseline_rows, data_rows, environment_lines, model_rows, with_columns
from dmpo_dist.experiment.parts import CONTINUED, Part
from dmpo_dist.experiment.results import curves, differences, evaluations, figures, notes, points
from dmpo_dist.experiment.rules import rules_rows
from dmpo_dist.experiment.schema import GridConfig
from dmpo_dist.experiment.stamps import progress
from dmpo_dist.figures.study import (
    FEW_SHOT_FILE,
    K_SWEEP_FILE,
    MATRIX_FILE,
    STEPS_FILE,
    draw_few_shot,
    draw_k_sweep,
    draw_matrix,
    draw_steps,
)
from dmpo_dist.report.records import DIFFERENCES_FILE, MEANS_FILE, Summary
from dmpo_dist.report.study_headline import summary_sentences
from dmpo_dist.tables import Table, markdown, texts
from dmpo_dist.verdicts import judge, rule

CURVES_FILE = "curves.parquet"
SHOWN = ("hr@1", "ndcg@10", "auc")
FIRST_COLUMNS = ("dataset", "model", "axes", "K", "groups", "seeds", "trained on", "evaluated on")
IN_THE_ROW = ("sft", *CONTINUED)
"""A cell's difference from these, and from the fewest K, stands in its row of the main table."""
PICTURES = {
    FEW_SHOT_FILE: (
        draw_few_shot,
        MEANS_FILE,
        "Few-shot curves: means over seeds, bars 95 % over users and seeds, small points single seeds.",
    ),
    K_SWEEP_FILE: (
        draw_k_sweep,
        MEANS_FILE,
        "Accuracy, preference loss and how far it fell over the number of negatives; before training S-DPO's loss is "
        "log(1 + K), the others' log 2.",
    ),
    STEPS_FILE: (
        draw_steps,
        CURVES_FILE,
        "HR@1 on the validation requests by step: means over seeds, thin lines single seeds.",
    ),
    MATRIX_FILE: (draw_matrix, MEANS_FILE, "Trained on one dataset, evaluated on another."),
}
"""File -> the function that draws it, the file whose table it draws, and its caption."""


def write_report(
    grid: GridConfig, parts: Sequence[Part], data: Mapping[str, PreparedData], failed: Sequence[str]
) -> None:
    """Write experiment.parquet, curves.parquet, means.parquet, differences.parquet, experiment.md and pictures.

    Models that are not finished are left out; those that failed are named.
    """
    output, samples = grid.output_dir, parts[0].config.evaluation.bootstrap_samples
    found = evaluations(parts, data, output)
    _write(figures(found), output / "experiment.parquet")
    logged = curves(parts, data)
    _write(logged, output / CURVES_FILE)
    means, gains = points(found, samples), judged(differences(found, samples))
    _write(means.drop(columns="values"), output / MEANS_FILE)
    _write(gains.drop(columns="clear"), output / DIFFERENCES_FILE)
    drawn = []
    tables = {MEANS_FILE: means, CURVES_FILE: logged}
    for name, (draw, table, caption) in PICTURES.items():
        (output / name).unlink(missing_ok=True)  # an earlier grid may have had it where this one has not
        if draw(tables[table], output / name):
            drawn.append(f"![{caption}]({name})\n\n{caption}")
    lines = [
        *_head(grid, parts, data, failed, notes(found)),
        *summary_sentences(Summary(means, gains)),
        *drawn,
        *_tables(means, gains),
        *_matrix(means),
        *_memorization(parts, output),
        *_rules(found),
        *_methods(parts, data, found),
        HOW,
    ]
    write_whole(output / "experiment.md", "\n\n".join(lines) + "\n")


def judged(gains: pd.DataFrame) -> pd.DataFrame:
    """``gains`` with a column ``clear``: whether each is a difference, among all of the study."""
    verdicts = judge(gains[["low", "high", "p"]].astype(float).itertuples(index=False, name=None))
    return gains.assign(clear=[verdict.clear for verdict in verdicts])


def _head(
    grid: GridConfig,
    parts: Sequence[Part],
    data: Mapping[str, PreparedData],
    failed: Sequence[str],
    of_baselines: Sequence[str],
) -> list[str]:
    done = sum(progress(part, data).state == "done" for part in parts)
    lines = [f"# {grid.output_dir.name}", f"{done} of {len(parts)} models are trained and measured."]
    about = {name: f"{len(d.train)} training groups, {len(d.test)} test requests" for name, d in data.items()}
    lines.append("Datasets:\n\n" + "\n".join(f"- {name}: {about[name]}, {d.card.name}" for name, d in data.items()))
    settings = {"config": ", ".join(grid.config), **dotted(grid.settings)}
    shown = [f"`{key}={value}`" for key, value in settings.items() if value != ""]
    lines.append("Settings of all cells: " + ", ".join(shown))
    if of_baselines:
        lines.append("To know of the baselines:\n\n" + "\n".join(f"- {line}" for line in of_baselines))
    if failed:
        lines.append("Failed, and so missing below:\n\n" + "\n".join(f"- {line}" for line in failed))
    return lines


def _tables(means: pd.DataFrame, gains: pd.DataFrame) -> list[str]:
    """For each dataset a table of the baselines and of the models trained on it, evaluated on it."""
    lines = []
    own = means[means["dataset"] == means["evaluated_on"]]
    for dataset, group in own.groupby("dataset", sort=False):
        of_points = group.groupby(["model", "train_groups", "k", "free"], dropna=False, sort=False)
        rows = [_table_row(point, gains) for _, point in of_points]
        rows.sort(key=lambda row: ("K" in row, row.get("groups", 0)))
        lines += [f"## {dataset}", _as_markdown(rows), *_against_others(gains, str(dataset))]
    return [*lines, f"Differences in bold are clear. {rule(len(gains))}"] if len(gains) else lines


def _table_row(point: pd.DataFrame, gains: pd.DataFrame) -> dict[str, object]:
    """One row of a table: column -> value; ``point`` has a row for each metric."""
    first = point.iloc[0]
    row: dict[str, object] = {"model": first["model"]}
    if first["free"]:
        row["axes"] = first["free"]
    if pd.notna(first["train_groups"]):
        row |= {"groups": int(first["train_groups"]), "seeds": int(first["seeds"])}
    if pd.notna(first["k"]):
        row["K"] = int(first["k"])
    for metric in SHOWN:
        row[metric] = _with_interval(point[point["metric"] == metric].iloc[0])
    if pd.notna(first["final_preference_loss"]):
        at_start, at_end = first["first_preference_loss"], first["final_preference_loss"]
        row["preference loss, start -> end"] = f"{at_start:.3f} -> {at_end:.3f}"
    gains = gains[gains["against"].isin(IN_THE_ROW) | gains["against"].str.startswith("K=")]
    same = gains[gains["metric"] == np.where(gains["against"].str.startswith("K="), "hr@1", "ndcg@10")]
    for name in ("dataset", "train_groups", "k", "model", "free"):
        same = same[same[name] == first[name]] if pd.notna(first[name]) else same[:0]
    for _, gain in same.iterrows():
        row[f"{gain['metric']} - {gain['against']}"] = _gain(gain)
    return row


def _against_others(gains: pd.DataFrame, dataset: str) -> list[str]:
    """Cells minus the model before training and minus each baseline, paired; nothing where there are neither."""
    others = gains[(gains["dataset"] == dataset) & (gains["metric"] == "ndcg@10")]
    others = others[~others["against"].isin(IN_THE_ROW) & ~others["against"].str.startswith("K=")]
    rows = []
    for (model, groups, k, free), group in others.groupby(["model", "train_groups", "k", "free"], sort=False):
        row: dict[str, object] = {"model": model, "K": int(k), "groups": int(groups)} | ({"axes": free} if free else {})
        rows.append(row | {f"- {gain['against']}": _gain(gain) for _, gain in group.iterrows()})
    return ["NDCG@10 minus that of others, paired:", _as_markdown(rows)] if rows else []


def _matrix(means: pd.DataFrame) -> list[str]:
    away = means[(means["metric"] == "ndcg@10") & means["train_groups"].notna()]
    if not (away["dataset"] != away["evaluated_on"]).any():
        return []
    rows = []
    same = ["model", "train_groups", "k", "free", "dataset"]
    for (model, groups, k, free, dataset), group in away.groupby(same, dropna=False, sort=False):
        row: dict[str, object] = {"model": model, "K": "" if pd.isna(k) else int(k), "groups": int(groups)}
        row["trained on"] = dataset
        row |= {"axes": free} if free else {}
        rows.append(row | {f"on {r['evaluated_on']}": _with_interval(r) for _, r in group.iterrows()})
    return ["## Trained on one, evaluated on another (NDCG@10)", _as_markdown(rows)]


def _memorization(parts: Sequence[Part], output: Path) -> list[str]:
    """What pretrained models know of the datasets before any training."""
    lines = []
    for dataset, found in probed(parts, output):
        table = memorization_table("", found.probes)
        lines += [f"### {found.model} on {dataset}", markdown(table)]
    return ["## What the models knew before training", MEMORIZATION_NOTE, *lines] if lines else []


def _rules(found: pd.DataFrame) -> list[str]:
    rows = rules_rows(found)
    heading = "## Scoring rules (NDCG@10)"
    return [heading, RULES_NOTE, _as_markdown(with_columns(rows))] if rows else []


def _methods(parts: Sequence[Part], data: Mapping[str, PreparedData], found: pd.DataFrame) -> list[str]:
    """The methods sheet."""
    tables = {
        "### Data": data_rows(data),
        "### Baselines and their tuning": baseline_rows(found),
        "### Models, their tuning and compute": model_rows(parts, data),
    }
    lines = ["## Methods"]
    for heading, rows in tables.items():
        if rows:
            lines += [heading, _as_markdown(with_columns(rows))]
    about = environment_lines(parts)
    return [*lines, "### Machine and versions", "\n".join(f"- {line}" for line in about), METHODS_NOTE]


def _with_interval(row: pd.Series, form: str = ".3f") -> str:
    return f"{row['value']:{form}} [{row['low']:.3f}, {row['high']:.3f}]"


def _gain(row: pd.Series) -> str:
    """A paired difference with its interval, in bold where it is clear."""
    text = _with_interval(row, "+.3f")
    return f"**{text}**" if row["clear"] else text


def _as_markdown(rows: Sequence[dict[str, object]]) -> str:
    names = dict.fromkeys(name for row in rows for name in row)
    first = [name for name in FIRST_COLUMNS if name in names]
    columns = [*first, *(name for name in names if name not in first)]
    cells = texts([[row.get(name, "") for name in columns] for row in rows])
    return markdown(Table("", columns, cells, text_columns=len(columns)))


def _write(frame: pd.DataFrame, file: Path) -> None:
    with whole_file(file) as part:
        frame.to_parquet(part, index=False)


MEMORIZATION_NOTE = (
    "Shares with 95 % intervals; differences are paired. Completing a title shows that the model read it, not that it "
    "read this dataset; preferring the user's own history may be taste and not memory; what only memory explains is "
    "writing next titles letter by letter, depending on the history's order beyond its content, and knowing ids. See "
    "docs/EXPERIMENTS.md."
)
RULES_NOTE = (
    "What a title is ranked by: sum, its log-prob; mean, the same per token; prior, minus a weight times its log-prob "
    "after an empty history; reference, minus that of the model it started from. The chosen rule, picked on the "
    "validation requests alone, stands in all other tables."
)
METHODS_NOTE = (
    "Nothing was chosen for baselines that have no row here; item_knn keeps evaluation.knn_neighbours neighbours. "
    "Steps compared on validation include step 0, the start itself. Training seconds are those of the optimizer steps, "
    "times the workers, over all seeds, without start and validation; tokens are those that ran through the policy."
)
HOW = """## How to read it

All models of a dataset rank the same test candidates. A figure is the mean over seeds (of training; data and
candidates stay) and its interval a 95 % bootstrap over users and seeds, the one that `dmpo evaluate NAME@SEED=FOLDER`
gives: what other users and other seeds would give; with one seed other users alone, as in `experiment.parquet`, which
has each seed by itself. The pictures show each seed as a point. Differences are paired, user by user and seed by
seed.

`zero_shot` is a pretrained model before any training, `sft_continued` SFT for as many further steps as the preference
stage has, `sft_continued_compute` for as many as cost the same FLOPs. Baselines count likes alone; those named (same
users) are fitted on nothing but the likes that the training groups show. Losses are means over the last fifth of the
training steps.

`experiment.parquet` has a row for every model, dataset and metric, `curves.parquet` validation and training loss by
step; every model is a run folder that `dmpo runs list` reads."""
