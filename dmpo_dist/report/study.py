"""`dmpo experiment`'s table as figures: K sweep, few-shot curves, transfer between datasets."""

from collections.abc import Sequence

import pandas as pd

from dmpo_dist.report.svg import COLOURS, DASHES, Figure, Line, Panel, line_chart
from dmpo_dist.report.tables import Cell, Table
from dmpo_dist.report.words import metric_name, number

MAIN_METRIC, SWEEP_METRIC = "ndcg@10", "hr@1"
CELL = ["dataset", "evaluated_on", "shots", "k", "objective", "model", "free"]
MOST_ROWS = 300
SHADES = 5
LEVELS = ("sft", "popularity")
LEVEL_STYLE = 2 * COLOURS - 1  # grey, broken
ALL_SHOTS = "all"


def sweep_figures(study: pd.DataFrame) -> list[Figure]:
    """HR@1 and, where it was logged, the loss against K, a line per objective; one figure per dataset and shots."""
    home = at_home(study)
    metric = SWEEP_METRIC if (home["metric"] == SWEEP_METRIC).any() else MAIN_METRIC
    figures = []
    for (dataset, shots), part in home[home["metric"] == metric].groupby(["dataset", "shots"], dropna=False):
        if part["k"].nunique() < 2:
            continue
        lines = _lines(part, "k", "value")
        panels = [Panel(lines + _levels(home, dataset, shots, metric, lines), metric_name(metric))]
        losses = _lines(part, "k", "loss")
        if losses:
            panels.append(Panel(losses, "loss at the end of training"))
        title = f"{dataset}, {_shots(shots)}: {metric_name(metric)}{' and loss' if losses else ''} by negatives K"
        figures.append(_figure(title, panels, "negatives K", part))
    return figures


def shots_figures(study: pd.DataFrame) -> list[Figure]:
    """NDCG@10 against the number of training examples, a line per objective and K; one figure per dataset."""
    part = at_home(study)
    part = part.assign(shots=part["shots"].fillna(part["train_groups"]))  # all of them are a number too
    part = part[(part["metric"] == MAIN_METRIC) & part["shots"].notna()]
    return [
        _figure(
            f"{dataset}: {metric_name(MAIN_METRIC)} by training examples",
            [Panel(_lines(of_dataset, "shots", "value", with_k=of_dataset["k"].nunique() > 1))],
            "training examples (shots)",
            of_dataset,
        )
        for dataset, of_dataset in part.groupby("dataset")
        if of_dataset["shots"].nunique() > 1
    ]


def transfer_table(study: pd.DataFrame) -> Table | None:
    """A row per model, a column for each pair of data trained on and evaluated on; of the largest shots, means over seeds.

    None where nothing was evaluated on other data.
    """
    part = study[study["metric"] == MAIN_METRIC]
    names = labels(part, with_k=part["k"].nunique() > 1)
    away = set(names[part["dataset"] != part["evaluated_on"]])  # a baseline knows no other data
    part = part.assign(label=names, shots=part["shots"].fillna(float("inf")))[names.isin(away)]
    if part.empty:
        return None
    part = part[part["shots"] == part.groupby("label")["shots"].transform("max")]
    means = part.groupby(["label", "dataset", "evaluated_on"], sort=False)["value"].mean()
    pairs = sorted({(trained, evaluated) for _, trained, evaluated in means.index})
    low, high = float(means.min()), float(means.max())
    rows = [
        [Cell(label, kind="code"), *(_shaded(means.get((label, *pair)), low, high) for pair in pairs)]
        for label in dict.fromkeys(part["label"])
    ]
    caption = f"{metric_name(MAIN_METRIC)} by data trained on \u2192 evaluated on; means over seeds, a stronger shade is better"
    return Table(caption, ["model", *(f"{a} \u2192 {b}" for a, b in pairs)], rows, sortable=len(rows) > 2)


def cells_table(study: pd.DataFrame) -> Table:
    """Every cell of the grid: mean over its seeds, and from the lowest to the highest."""
    metrics = [m for m in (MAIN_METRIC, SWEEP_METRIC, "auc") if (study["metric"] == m).any()] or sorted(
        study["metric"].unique()
    )[:3]
    keys = [k for k in CELL if study[k].notna().any()]
    rows = []
    for key, part in study.groupby(keys, dropna=False, sort=False):
        figures = [part.loc[part["metric"] == metric, "value"] for metric in metrics]
        texts = [_key_cell(name, value) for name, value in zip(keys, key, strict=True)]
        loss = part["loss"].mean()
        rows.append(
            [
                *texts,
                Cell(str(max(1, part["seed"].nunique()))),
                *map(_spread_cell, figures),
                Cell(number(loss), key=None if pd.isna(loss) else float(loss)),
            ]
        )
    caption = f"All {len(rows)} cells: means over seeds, and from the lowest seed to the highest"
    if len(rows) > MOST_ROWS:
        caption += f"; the first {MOST_ROWS} are shown, all are in experiment.parquet"
    headings = [*(k.replace("_", " ") for k in keys), "seeds", *map(metric_name, metrics), "loss"]
    return Table(caption, headings, rows[:MOST_ROWS], text_columns=len(keys), sortable=True)


def _figure(title: str, panels: Sequence[Panel], x_name: str, part: pd.DataFrame) -> Figure:
    lines = panels[0].lines
    words = [
        f"{panel.name or title}, {line.label}: " + ", ".join(f"{y:.3f} at {x:g}" for x, y in line.points)
        for panel in panels
        for line in panel.lines
    ]
    seeds = part["seed"].nunique()
    note = f"Means over {seeds} seeds; whiskers from the lowest seed to the highest." if seeds > 1 else ""
    if seeds <= 1 and any(line.whiskers for line in lines):
        note = "Whiskers are 95 % intervals over users; one seed."
    legend = [(line.label, line.style) for line in lines]
    return Figure(title, line_chart(panels, f"{title}. {'; '.join(words)}", x_name, "log"), legend, note)


def _lines(part: pd.DataFrame, x: str, y: str, with_k: bool = False) -> list[Line]:
    """A line per model over the mean of its seeds, in one style whatever ``y``; a model without ``x`` has none."""
    part = part[part[x].notna()]
    several = part["seed"].nunique() > 1
    lines = []
    for style, (label, of_label) in enumerate(part.groupby(labels(part, with_k), sort=False)):
        measured = of_label[of_label[y].notna()]
        if measured.empty:
            continue
        points = [(float(place), float(value)) for place, value in measured.groupby(x)[y].mean().items()]
        whiskers = _whiskers(measured, x, y, several)
        lines.append(Line(str(label), points, style % (COLOURS * DASHES), whiskers=whiskers))
    return lines


def _levels(home: pd.DataFrame, dataset: object, shots: float, metric: str, lines: Sequence[Line]) -> list[Line]:
    """What does not depend on K, as a level line across: LEVELS, where they were evaluated."""
    xs = [x for line in lines for x, _ in line.points]
    here = home[(home["dataset"] == dataset) & (home["metric"] == metric) & home["k"].isna()]
    levels = []
    for name in LEVELS:
        rows = here[here["model"] == name]
        same = rows[rows["shots"].isna() if pd.isna(shots) else rows["shots"] == shots]
        rows = same if len(same) else rows  # a baseline knows no shots
        if len(rows):
            value = float(rows["value"].mean())
            ends = [(min(xs), value), (max(xs), value)]
            levels.append(Line(name, ends, LEVEL_STYLE + COLOURS * len(levels), marked=False))
    return levels


def _whiskers(part: pd.DataFrame, x: str, y: str, several: bool) -> list[tuple[float, float, float]]:
    """From the lowest seed to the highest where there are ``several``, else the intervals of a metric."""
    at = part.groupby(x)
    if several:
        low, high = at[y].min(), at[y].max()
    elif y == "value" and part[["low", "high"]].notna().all(axis=None):
        low, high = at["low"].mean(), at["high"].mean()
    else:
        return []
    return [(float(place), float(low[place]), float(high[place])) for place in low.index]


def labels(part: pd.DataFrame, with_k: bool) -> pd.Series:
    """What to call a row's model, so that no two are averaged; with K where several are shown."""
    objective, model = part["objective"].astype(object), part["model"].astype(str)
    names = model.where(objective.isna() | (objective == model), objective.astype(str) + ": " + model)
    names = names + part["free"].map(lambda free: f", {free}" if isinstance(free, str) and free else "")
    if not with_k:
        return names
    return names + part["k"].map(lambda k: "" if pd.isna(k) else f", K={k:g}")


def at_home(study: pd.DataFrame) -> pd.DataFrame:
    """What was evaluated on the data it was trained on."""
    return study[study["dataset"] == study["evaluated_on"]]


def _shots(shots: float) -> str:
    return "all training examples" if pd.isna(shots) else f"{shots:g} training examples"


def _key_cell(name: str, value: object) -> Cell:
    if pd.isna(value):
        return Cell(ALL_SHOTS if name == "shots" else number(None))
    if isinstance(value, float | int):
        return Cell(f"{value:g}", key=float(value))
    return Cell(str(value), kind="code")


def _spread_cell(values: pd.Series) -> Cell:
    if values.empty:
        return Cell(number(None))
    spread = f"{values.min():.3f} to {values.max():.3f}" if len(values) > 1 else ""
    return Cell(number(float(values.mean())), spread, key=float(values.mean()))


def _shaded(value: float | None, low: float, high: float) -> Cell:
    if value is None or pd.isna(value):
        return Cell(number(None))
    shade = min(SHADES - 1, int((value - low) / ((high - low) or 1) * SHADES))
    return Cell(number(value), kind=f"h{shade}", key=float(value))
