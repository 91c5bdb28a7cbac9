"""The results of `dmpo experiment` on the page: points for the figures, and tables."""

import pandas as pd

from dmpo_dist.figures.study import MAIN_METRIC, SWEEP_METRIC
from dmpo_dist.formats import metric_name, number
from dmpo_dist.tables import Cell, Table

CELL = ["dataset", "evaluated_on", "shots", "k", "objective", "model", "free"]
MOST_ROWS = 300
ALL_SHOTS = "all"


def points_of(study: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, in the form that ``figures.study`` draws.

    With several seeds the columns low and high are the lowest and the highest seed, else the interval over users.
    """
    named = study.assign(
        model=labels(study.assign(free=""), with_k=False),
        free=study["free"].map(lambda free: free if isinstance(free, str) else ""),
        train_groups=study["train_groups"].fillna(study["shots"]),
    )
    key = ["dataset", "evaluated_on", "train_groups", "k", "model", "free", "metric"]
    grouped = named.groupby(key, dropna=False, sort=False)
    points = grouped.agg(
        value=("value", "mean"), lowest=("value", "min"), highest=("value", "max"), low=("low", "mean"),
        high=("high", "mean"), values=("value", list), final_preference_loss=("loss", "mean"), loss_low=("loss", "min"),
        loss_high=("loss", "max"),
    ).reset_index()  # fmt: skip
    if study["seed"].nunique() > 1:
        points = points.assign(low=points["lowest"], high=points["highest"])
    else:
        points = points.drop(columns=["loss_low", "loss_high"])
    return points.assign(first_preference_loss=float("nan"))


def whiskers_note(study: pd.DataFrame) -> str:
    """A sentence that says what the whiskers of the study's figures mean."""
    seeds = study["seed"].nunique()
    if seeds > 1:
        return f"Means over {seeds} seeds; whiskers from the lowest seed to the highest."
    return "Whiskers are 95 % intervals over users; one seed." if study["low"].notna().any() else ""


def transfer_table(study: pd.DataFrame) -> Table | None:
    """A row for each model, a column for each pair (dataset trained on, dataset evaluated on).

    Values are means over seeds at each model's largest number of training examples. None where no model was evaluated
    on a dataset that it was not trained on.
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
    rows = [
        [Cell(label, kind="code"), *(_number_cell(means.get((label, *pair))) for pair in pairs)]
        for label in dict.fromkeys(part["label"])
    ]
    caption = f"{metric_name(MAIN_METRIC)} by data trained on \u2192 evaluated on; means over seeds"
    return Table(caption, ["model", *(f"{a} \u2192 {b}" for a, b in pairs)], rows, sortable=len(rows) > 2)


def cells_table(study: pd.DataFrame) -> Table:
    """A row for each cell of the grid: the mean over its seeds, and the lowest and highest seed."""
    metrics = [m for m in (MAIN_METRIC, SWEEP_METRIC, "auc") if (study["metric"] == m).any()]
    metrics = metrics or sorted(study["metric"].unique())[:3]
    keys = [k for k in CELL if study[k].notna().any()]
    rows = []
    for key, part in study.groupby(keys, dropna=False, sort=False):
        row = [_key_cell(name, value) for name, value in zip(keys, key, strict=True)]
        row.append(Cell(str(max(1, part["seed"].nunique()))))
        row += [_spread_cell(part.loc[part["metric"] == metric, "value"]) for metric in metrics]
        rows.append([*row, _number_cell(part["loss"].mean())])
    caption = f"All {len(rows)} cells: means over seeds, and from the lowest seed to the highest"
    if len(rows) > MOST_ROWS:
        caption += f"; the first {MOST_ROWS} are shown, all are in experiment.parquet"
    headings = [*(k.replace("_", " ") for k in keys), "seeds", *map(metric_name, metrics), "loss"]
    return Table(caption, headings, rows[:MOST_ROWS], text_columns=len(keys), sortable=True)


def labels(part: pd.DataFrame, with_k: bool) -> pd.Series:
    """A label for the model of each row; rows with equal labels are averaged. With K where several K are shown."""
    objective, model = part["objective"].astype(object), part["model"].astype(str)
    names = model.where(objective.isna() | (objective == model), objective.astype(str) + ": " + model)
    names = names + part["free"].map(lambda free: f", {free}" if isinstance(free, str) and free else "")
    if not with_k:
        return names
    return names + part["k"].map(lambda k: "" if pd.isna(k) else f", K={k:g}")


def at_home(study: pd.DataFrame) -> pd.DataFrame:
    """The rows of models that were evaluated on the dataset they were trained on."""
    return study[study["dataset"] == study["evaluated_on"]]


def _key_cell(name: str, value: object) -> Cell:
    if pd.isna(value):
        return Cell(ALL_SHOTS if name == "shots" else number(None))
    if isinstance(value, float | int):
        return Cell(f"{value:g}", key=float(value))
    return Cell(str(value), kind="code")


def _spread_cell(values: pd.Series) -> Cell:
    cell = _number_cell(values.mean())
    spread = f"{values.min():.3f} to {values.max():.3f}" if len(values) > 1 else ""
    return Cell(cell.text, spread, key=cell.key)


def _number_cell(value: float | None) -> Cell:
    return Cell(number(None)) if value is None or pd.isna(value) else Cell(number(float(value)), key=float(value))
