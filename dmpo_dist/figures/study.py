"""The figures of an experiment: few-shot curves, the sweep over K, accuracy by step, the cross-domain matrix.

Accuracy by step is drawn of what training logged. All others take *points*, a table with a row for each trained model
and metric. Its columns are dataset, evaluated_on, train_groups, k, model, free (values of further axes of the grid),
metric, value, low, high, values (one for each seed), first_preference_loss and final_preference_loss, and loss_low and
loss_high where several seeds have a loss. k and the losses are missing for models that were trained without negatives,
train_groups for baselines.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from dmpo_dist.figures.models import METHODS, model_looks
from dmpo_dist.figures.style import GREY, Drawing, Look, hover, log_ticks, save_grid, short
from dmpo_dist.formats import interval, metric_name

FEW_SHOT_FILE, K_SWEEP_FILE, MATRIX_FILE = "few_shot.png", "k_sweep.png", "cross_domain.png"
STEPS_FILE = "steps.png"
CONTINUED = "sft_continued"
MAIN_METRIC, SWEEP_METRIC = "ndcg@10", "hr@1"
LEVELS = {
    "sft": ("SFT", "--"),
    "sft_continued": ("SFT continued", ":"),
    "popularity": ("popularity", (0, (6, 2))),
    "random": ("random", (0, (1, 2))),
}
"""Model -> label and dash of its horizontal line, in figures whose horizontal axis it does not depend on."""
BESIDE_K = ("sft", "sft_continued", "popularity")
HEAT, DARK = "cividis", "#111111"
MOST_PANELS = 12
LEAST = 3  # curves of fewer points are drawn without a line between them
APART = 1.03  # each curve is shifted by this factor on the logarithmic axis, so that points do not cover each other

Curves = Mapping[str, pd.DataFrame]
"""Label -> the points of one curve, in the order of its horizontal axis."""


def draw_few_shot(points: pd.DataFrame, output: Path) -> bool:
    """Draw HR@1 and NDCG@10 over the number of training groups; False where no dataset has several numbers."""
    drawings = few_shot_drawings(points, [SWEEP_METRIC, MAIN_METRIC])
    if drawings:
        save_grid(drawings, output, columns=2)
    return bool(drawings)


def draw_k_sweep(points: pd.DataFrame, output: Path) -> bool:
    """Draw HR@1, the preference loss and how far it fell, over K; False where no dataset has several K."""
    drawings = sweep_drawings(points)
    if drawings:
        save_grid(drawings, output, columns=3)
    return bool(drawings)


def draw_matrix(points: pd.DataFrame, output: Path) -> bool:
    """Draw NDCG@10 by data trained on (rows) and evaluated on (columns), a panel for each model; False without any."""
    drawings = matrix_drawings(points)
    if drawings:
        chance = points[(points["metric"] == MAIN_METRIC) & (points["model"] == "random")]["value"]
        note = f"; a random order has {chance.mean():.3f}" if len(chance) else ""
        heading = f"{metric_name(MAIN_METRIC)}, mean over seeds [95 % over users and seeds]{note}"
        save_grid(drawings, output, columns=2 if len(drawings) == 4 else min(3, len(drawings)), heading=heading)
    return bool(drawings)


def draw_steps(logged: pd.DataFrame, output: Path) -> bool:
    """Draw HR@1 on validation by step; False where no cell was validated at least three times.

    Args:
        logged: a row for each value of a metric that a trained model logged: ``curves.parquet``.
    """
    drawings = step_drawings(logged)
    if drawings:
        save_grid(drawings, output, columns=min(3, len(drawings)))
    return bool(drawings)


def few_shot_drawings(points: pd.DataFrame, metrics: Sequence[str], note: str = "") -> list[Drawing]:
    """A drawing of each of ``metrics`` over the number of training groups, for each dataset with several numbers."""
    own = points[points["dataset"] == points["evaluated_on"]]
    cells = own[own["k"].notna() & own["train_groups"].notna()]
    drawings = []
    for dataset, of_dataset in cells.groupby("dataset", sort=False):
        if of_dataset["train_groups"].nunique() < 2:
            continue
        several_k = of_dataset["k"].nunique() > 1
        for metric in metrics:
            curves = {
                _label(model, k if several_k else None, free): curve.sort_values("train_groups")
                for (model, k, free), curve in of_dataset[of_dataset["metric"] == metric].groupby(
                    ["model", "k", "free"], sort=False
                )
                if len(curve) > 1
            }
            others = own[(own["dataset"] == dataset) & (own["metric"] == metric) & own["k"].isna()]
            several = (
                others[others["free"] == ""].groupby("model").filter(lambda rows: rows["train_groups"].nunique() > 1)
            )
            levels = _levels(others[~others["model"].isin(several["model"])], LEVELS, float("nan"))
            title = f"{dataset}: {metric_name(metric)} by training examples"
            draw = partial(_draw_few_shot, curves=curves, several=several, levels=levels)
            drawings.append(Drawing(title, _alt(title, curves, "train_groups", "value", levels), draw, 3.0, note))
    return drawings


def sweep_drawings(points: pd.DataFrame, note: str = "") -> list[Drawing]:
    """HR@1, the preference loss and how far it fell, over K, for each dataset and number of groups with several K.

    The second drawing is left out where the final loss is unknown, the third where the first loss is.
    """
    metric = SWEEP_METRIC if (points["metric"] == SWEEP_METRIC).any() else MAIN_METRIC
    own = points[(points["dataset"] == points["evaluated_on"]) & (points["metric"] == metric)]
    drawings = []
    for (dataset, groups), cells in own[own["k"].notna()].groupby(
        ["dataset", "train_groups"], sort=False, dropna=False
    ):
        if cells["k"].nunique() < 2:
            continue
        name = f"{dataset}, {'all' if pd.isna(groups) else f'{groups:g}'} training groups"
        by_model = cells.groupby(["model", "free"], sort=False)
        curves = {_label(model, None, free): curve.sort_values("k") for (model, free), curve in by_model}
        others = own[(own["dataset"] == dataset) & own["k"].isna()]
        title = f"{name}: {metric_name(metric)} by negatives K"
        levels = _levels(others, BESIDE_K, groups)
        draw = partial(_draw_metric_by_k, curves=curves, levels=levels)
        drawings.append(Drawing(title, _alt(title, curves, "k", "value", levels), draw, 2.8, note))
        if cells["final_preference_loss"].notna().any():
            hollow = ", hollow at the start" if cells["first_preference_loss"].notna().any() else ""
            title = f"{name}: loss at the end{hollow}"
            alt = _alt(title, curves, "k", "final_preference_loss")
            drawings.append(Drawing(title, alt, partial(_draw_loss, curves=curves), 2.8, note))
        if cells["first_preference_loss"].notna().any():
            curves = {
                label: curve.assign(fall=curve["final_preference_loss"] - curve["first_preference_loss"])
                for label, curve in curves.items()
            }
            title = f"{name}: loss, end minus start"
            drawings.append(
                Drawing(title, _alt(title, curves, "k", "fall"), partial(_draw_fall, curves=curves), 2.8, note)
            )
    return drawings


def step_drawings(logged: pd.DataFrame) -> list[Drawing]:
    """HR@1 on validation by step of the preference stage and of SFT continued, for each dataset and number of groups.

    Steps that not all seeds of a model validated at are left out.
    """
    rows = logged[(logged["series"] == "validation") & (logged["metric"] == SWEEP_METRIC)]
    rows = rows[rows["objective"].notna() | rows["part"].str.startswith(f"{CONTINUED}/")]
    rows = rows.assign(model=rows["objective"].fillna(CONTINUED))
    drawings = []
    for (dataset, groups), of_dataset in rows.groupby(["dataset", "train_groups"], sort=False):
        several_k = of_dataset["k"].nunique() > 1
        curves: dict[str, pd.DataFrame] = {}
        for (model, k, free), of_model in of_dataset.groupby(["model", "k", "free"], sort=False, dropna=False):
            by_seed = of_model.pivot(index="step", columns="seed", values="value").dropna()
            curve = pd.DataFrame({"step": by_seed.index, "value": by_seed.mean(axis=1).to_numpy()})
            curve["values"] = by_seed.to_numpy().tolist()
            if len(curve) >= LEAST:
                curves[_label(model, k if several_k and pd.notna(k) else None, free)] = curve
        if any(not label.startswith(CONTINUED) for label in curves):
            title = f"{dataset}, {groups:g} training groups: {metric_name(SWEEP_METRIC)} on validation by step"
            alt = _alt(title, curves, "step", "value")
            drawings.append(Drawing(title, alt, partial(_draw_steps, curves=curves), 2.8))
    return drawings[:MOST_PANELS]


def matrix_drawings(points: pd.DataFrame) -> list[Drawing]:
    """NDCG@10 by data trained on (rows) and evaluated on (columns), for each model that was evaluated on other data.

    Only trainings on a dataset's largest number of groups are shown, and at most MOST_PANELS models.
    """
    trained = points[points["metric"] == MAIN_METRIC]
    away = trained.loc[trained["dataset"] != trained["evaluated_on"], "model"].unique()
    trained = trained[trained["model"].isin(away)]  # a baseline knows no other data
    groups = trained["train_groups"].astype(float).fillna(float("inf"))
    trained = trained[groups == groups.groupby(trained["dataset"]).transform("max")]
    several_k = trained["k"].nunique() > 1
    names, extent = list(dict.fromkeys(trained["evaluated_on"])), (trained["value"].min(), trained["value"].max())
    drawings = []
    for (model, k, free), of_model in trained.groupby(["model", "k", "free"], dropna=False, sort=False):
        label = _label(model, None if pd.isna(k) or not several_k else k, free)
        words = [f"trained on {r.dataset}, evaluated on {r.evaluated_on} {r.value:.3f}" for r in of_model.itertuples()]
        alt = f"{metric_name(MAIN_METRIC)} of {label}: {'; '.join(words)}"
        draw = partial(_draw_heat, cells=of_model, names=names, extent=extent)
        drawings.append(Drawing(label, alt, draw, 1.0 + 0.6 * of_model["dataset"].nunique()))
    return drawings[:MOST_PANELS]


def _draw_few_shot(axes: Axes, curves: Curves, several: pd.DataFrame, levels: Mapping[str, float]) -> None:
    _draw_curves(axes, curves, "train_groups")
    for name, (label, dash) in LEVELS.items():
        rows = several[several["model"] == name].sort_values("train_groups")
        if len(rows):
            drawn = {"linestyle": dash} if len(rows) >= LEAST else {"linestyle": "none", "marker": "x"}
            at = rows["train_groups"].astype(float)
            axes.plot(at, rows["value"], color=METHODS[name], label=label, **drawn)
    _draw_levels(axes, levels)
    log_ticks(axes, pd.concat(list(curves.values()))["train_groups"])
    axes.set_xlabel("training groups (log scale)")


def _draw_metric_by_k(axes: Axes, curves: Curves, levels: Mapping[str, float]) -> None:
    _draw_curves(axes, curves, "k")
    _draw_levels(axes, levels)
    _finish_k(axes, curves)


def _draw_loss(axes: Axes, curves: Curves) -> None:
    for label, curve, look, shift in _with_looks(curves):
        k, first, final = (curve[c].astype(float) for c in ("k", "first_preference_loss", "final_preference_loss"))
        drawn = {"color": look.colour, "marker": look.marker, "markersize": 5}
        (line,) = axes.plot(shift * k, final, label=label, linestyle=_dash(curve, look), **drawn)
        hover(line, _hover_texts(label, curve, "k", final))
        if "loss_low" in curve:
            axes.vlines(shift * k, curve["loss_low"], curve["loss_high"], color=look.colour, linewidth=1)
        if first.notna().any():
            dotted = ":" if len(curve) >= LEAST else "none"
            axes.plot(shift * k, first, linewidth=0.9, linestyle=dotted, markerfacecolor="white", **drawn)
    _finish_k(axes, curves)


def _draw_fall(axes: Axes, curves: Curves) -> None:
    for label, curve, look, shift in _with_looks(curves):
        drawn = {"color": look.colour, "marker": look.marker, "linestyle": _dash(curve, look)}
        axes.plot(shift * curve["k"].astype(float), curve["fall"], label=label, **drawn)
    axes.axhline(0, color=GREY, linewidth=0.8)
    _finish_k(axes, curves)


def _draw_steps(axes: Axes, curves: Curves) -> None:
    """Draw means over seeds, and each seed as a thin line."""
    for label, look in model_looks(curves).items():
        curve = curves[label]
        axes.plot(
            curve["step"], curve["value"], color=look.colour, marker=look.marker, linestyle=look.dash, markersize=4,
            label=label, zorder=3,
        )  # fmt: skip
        seeds = np.array(curve["values"].tolist())
        if seeds.shape[1] > 1:
            axes.plot(curve["step"], seeds, color=look.colour, linewidth=0.5, alpha=0.5)
    axes.set_xlabel("step")


def _draw_curves(axes: Axes, curves: Curves, x: str) -> None:
    """Draw means over seeds with their intervals, and each seed as a small point."""
    for label, curve, look, shift in _with_looks(curves):
        at = shift * curve[x].astype(float)
        bars = [curve["value"] - curve["low"], curve["high"] - curve["value"]]
        line, _, _ = axes.errorbar(
            at, curve["value"], yerr=bars, color=look.colour, marker=look.marker, linestyle=_dash(curve, look),
            markersize=5, elinewidth=1, capsize=2.5, label=label, zorder=3,
        )  # fmt: skip
        hover(line, _hover_texts(label, curve, x, curve["value"]))
        for position, values in zip(at, curve["values"], strict=True):
            if len(values) > 1:
                axes.plot([position] * len(values), values, ".", color=look.colour, markersize=3, alpha=0.7)


def _draw_heat(axes: Axes, cells: pd.DataFrame, names: Sequence[str], extent: tuple[float, float]) -> None:
    rows = [name for name in names if name in set(cells["dataset"])]
    low, high = extent
    values = cells.pivot(index="dataset", columns="evaluated_on", values="value").reindex(index=rows, columns=names)
    axes.pcolormesh(values.to_numpy(dtype=float), cmap=HEAT, vmin=low, vmax=max(high, low + 1e-9))
    for cell in cells.replace(np.nan, None).itertuples():
        x, y = names.index(cell.evaluated_on) + 0.5, rows.index(cell.dataset)
        look = {"ha": "center", "va": "center", "color": DARK if cell.value > (low + high) / 2 else "white"}
        axes.text(x, y + 0.38, f"{cell.value:.3f}", **look)
        axes.text(x, y + 0.66, interval(cell.low, cell.high), **look)
    axes.set_xticks(
        np.arange(len(names)) + 0.5, [short(name) for name in names], rotation=30 * (max(map(len, names)) > 8)
    )
    axes.set_yticks(np.arange(len(rows)) + 0.5, [short(name) for name in rows])
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_ylabel("trained on")
    axes.set_xlabel("evaluated on")


def _levels(others: pd.DataFrame, names: Iterable[str], groups: float) -> dict[str, float]:
    """Model -> its value at ``groups`` training groups, or else its first value, as baselines have no such number."""
    levels = {}
    for name in names:
        rows = others[(others["model"] == name) & (others["free"] == "")]
        same = rows[rows["train_groups"].isna() if pd.isna(groups) else (rows["train_groups"] == groups).fillna(False)]
        if len(rows):
            levels[name] = float((same if len(same) else rows)["value"].iloc[0])
    return levels


def _draw_levels(axes: Axes, levels: Mapping[str, float]) -> None:
    for name, value in levels.items():
        label, dash = LEVELS[name]
        axes.axhline(value, color=METHODS[name], linestyle=dash, linewidth=1.4, label=label)


def _finish_k(axes: Axes, curves: Curves) -> None:
    log_ticks(axes, pd.concat(list(curves.values()))["k"])
    axes.set_xlabel("negatives per group K (log scale)")


def _with_looks(curves: Curves) -> list[tuple[str, pd.DataFrame, Look, float]]:
    """Label, points, look and the factor by which the curve is drawn beside the others."""
    of_curve = model_looks(curves)
    return [(label, curve, of_curve[label], APART**i) for i, (label, curve) in enumerate(curves.items())]


def _dash(curve: pd.DataFrame, look: Look) -> str:
    """Two points are no curve."""
    return look.dash if len(curve) >= LEAST else "none"


def _hover_texts(label: str, curve: pd.DataFrame, x: str, values: pd.Series) -> list[str]:
    return [f"{label}, {at:g}: {value:.4g}" for at, value in zip(curve[x].astype(float), values, strict=True)]


def _alt(title: str, curves: Curves, x: str, column: str, levels: Mapping[str, float] | None = None) -> str:
    words = [
        f"{label}: " + ", ".join(f"{value:.3f} at {at:g}" for at, value in zip(curve[x], curve[column], strict=True))
        for label, curve in curves.items()
    ]
    words += [f"{LEVELS[name][0]}: {value:.3f}" for name, value in (levels or {}).items()]
    return f"{title}. {'; '.join(words)}"


def _label(model: str, k: float | None, free: str) -> str:
    return short(model + (f", K={int(k)}" if k is not None else "")) + (f", {free}" if free else "")
