"""The figures of an experiment: few-shot curves, the sweep over K, the cross-domain matrix; as PNG and as charts of a page.

All take *points*: a row for each model, its training and a metric, with columns dataset, evaluated_on, train_groups, k, model,
free, metric, value, low, high, values (one per seed), first_preference_loss and final_preference_loss; charts of a page also
use loss_low and loss_high. k and the losses are missing for what has no negatives, train_groups for baselines.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from dmpo_dist.figures.style import (
    GREY,
    PALE,
    Chart,
    Look,
    add_legend,
    draw_chart,
    drawing,
    hover,
    log_ticks,
    looks,
    save_png,
    short,
)  # fmt: skip
from dmpo_dist.formats import interval, metric_name

FEW_SHOT_FILE, K_SWEEP_FILE, MATRIX_FILE = "few_shot.png", "k_sweep.png", "cross_domain.png"
MAIN_METRIC, SWEEP_METRIC = "ndcg@10", "hr@1"
ARMS = {"sft": ("SFT", "--"), "sft_continued": ("SFT continued", ":")}
BASELINES = {"popularity": (0, (6, 2)), "random": (0, (1, 2))}
HEAT, DARK = "cividis", "#111111"
BY_K, BY_GROUPS = "negatives per group K (log scale)", "training groups (log scale)"
MOST_PANELS = 12
APART = 1.03  # factor on the logarithmic axis between the points of two curves, to tell them apart


@dataclass(frozen=True)
class Sweep:
    """One dataset and number of training groups with more than one K: the cells, and what does not depend on K."""

    title: str
    cells: pd.DataFrame
    levels: pd.DataFrame

    @property
    def losses(self) -> int:
        """How many panels there are for the preference loss: its end, and its end minus its start."""
        return sum(bool(self.cells[name].notna().any()) for name in ("final_preference_loss", "first_preference_loss"))


@drawing()
def draw_few_shot(points: pd.DataFrame, output: Path) -> bool:
    """HR@1 and NDCG@10 over the number of training groups, a column per dataset; False where no dataset has several."""
    datasets = _few_shot_datasets(points)
    if not datasets:
        return False
    figure = Figure(figsize=(1.2 + 4.6 * len(datasets), 7.4))
    panels = figure.subplots(2, len(datasets), squeeze=False, sharex="col")
    for column, (dataset, own) in zip(panels.T, datasets.items(), strict=True):
        for axes, metric in zip(column, (SWEEP_METRIC, MAIN_METRIC), strict=True):
            _draw_few_shot(axes, own[own["metric"] == metric])
            axes.set_title(f"{dataset}: {metric_name(metric)}")
        column[-1].set_xlabel(BY_GROUPS)
    add_legend(figure, columns=4)
    save_png(figure, output)
    return True


@drawing()
def draw_k_sweep(points: pd.DataFrame, output: Path) -> bool:
    """HR@1, the preference loss and how far it fell, over K; a row per dataset and number of groups; False without a sweep."""
    sweeps = _sweeps(points, SWEEP_METRIC)
    if not sweeps:
        return False
    figure = Figure(figsize=(13.2, 0.9 + 3.7 * len(sweeps)))
    titles = ("Preference loss: filled at the end, hollow at the start", "Preference loss: end minus start")
    for sweep, row in zip(sweeps, figure.subplots(len(sweeps), 3, squeeze=False), strict=True):
        _draw_sweep(row, sweep)
        for axes, title in zip(row, (f"HR@1: {sweep.title}", *titles), strict=True):
            axes.set_title(title)
            axes.set_xlabel(BY_K)
    add_legend(figure, columns=4)
    save_png(figure, output)
    return True


@drawing()
def draw_matrix(points: pd.DataFrame, output: Path, metric: str = MAIN_METRIC) -> bool:
    """Trained on (rows) against evaluated on (columns), a panel for each of the first models at the most groups; False without
    a matrix."""
    panels = _matrix(points, metric)
    if not panels:
        return False
    panels = dict(list(panels.items())[:MOST_PANELS])
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    names, low, high = _extent(panels)
    size = 1.5 + 0.95 * len(names)
    figure = Figure(figsize=(columns * (size + 0.5), rows * size + 1.0))
    for place, (label, group) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, place)
        mesh = _draw_heat(axes, group, names, low, high)
        axes.set_title(label)
    figure.colorbar(mesh, ax=figure.axes, shrink=0.8, label=metric_name(metric))
    chance = points[(points["metric"] == metric) & (points["model"] == "random")]["value"]
    note = f"; a random order has {chance.mean():.3f}" if len(chance) else ""
    figure.suptitle(f"{metric_name(metric)}, mean over seeds [95 % over users and seeds]{note}", fontsize=10)
    save_png(figure, output)
    return True


def few_shot_charts(points: pd.DataFrame, note: str) -> list[Chart]:
    """NDCG@10 over the number of training groups, a chart per dataset that has several."""
    charts = []
    for dataset, own in _few_shot_datasets(points).items():
        own = own[own["metric"] == MAIN_METRIC]
        title = f"{dataset}: {metric_name(MAIN_METRIC)} by training examples"
        words = [
            f"{label}: {_in_words(curve, 'train_groups', 'value')}" for label, curve in _few_shot_curves(own).items()
        ]

        def draw(axes: Axes, own: pd.DataFrame = own) -> None:
            _draw_few_shot(axes, own)
            axes.set_xlabel(BY_GROUPS)

        charts.append(draw_chart(title, f"{title}. {'; '.join(words)}", draw, [3.0], note))
    return charts


def sweep_charts(points: pd.DataFrame, note: str) -> list[Chart]:
    """HR@1 and the preference loss over K, a chart per dataset and number of groups that has several K."""
    metric = SWEEP_METRIC if (points["metric"] == SWEEP_METRIC).any() else MAIN_METRIC
    charts = []
    for sweep in _sweeps(points, metric):
        names = [metric_name(metric), "loss at the end of training", "end minus start of it"][: 1 + sweep.losses]
        title = f"{sweep.title}: {metric_name(metric)}{' and loss' * bool(sweep.losses)} by negatives K"
        words = [
            f"{name}, {label}: {_in_words(curve, 'k', column)}"
            for name, column in zip(names, ("value", "final_preference_loss"), strict=False)
            for label, curve in _sweep_curves(sweep).items()
        ]

        def draw(*panels: Axes, sweep: Sweep = sweep, names: Sequence[str] = names) -> None:
            _draw_sweep(panels, sweep)
            for axes, name in zip(panels, names, strict=True):
                axes.set_title(name, fontsize=10)
            panels[-1].set_xlabel(BY_K)

        charts.append(draw_chart(title, f"{title}. {'; '.join(words)}", draw, [2.6, *[2.2] * sweep.losses], note))
    return charts


def matrix_charts(points: pd.DataFrame) -> list[Chart]:
    """NDCG@10 by data trained on (rows) and evaluated on (columns), a chart per model, at its most training groups."""
    panels = _matrix(points, MAIN_METRIC)
    if not panels:
        return []
    names, low, high = _extent(panels)
    charts = []
    for label, group in list(panels.items())[:MOST_PANELS]:
        words = [f"trained on {r.dataset}, evaluated on {r.evaluated_on} {r.value:.3f}" for r in group.itertuples()]
        alt = f"{metric_name(MAIN_METRIC)} of {label}: {'; '.join(words)}"
        draw = partial(_draw_heat, group=group, names=names, low=low, high=high)
        charts.append(draw_chart(label, alt, draw, [1.0 + 0.6 * group["dataset"].nunique()]))
    return charts


def _few_shot_datasets(points: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Dataset -> its points, for those with cells at several numbers of training groups."""
    own = points[points["dataset"] == points["evaluated_on"]]
    cells = own[own["k"].notna()]
    several = [name for name, group in cells.groupby("dataset", sort=False) if group["train_groups"].nunique() > 1]
    return {str(name): own[own["dataset"] == name] for name in several}


def _few_shot_curves(own: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Label -> the points of one model over the number of groups; a model with one point is none."""
    cells = own[own["k"].notna() & own["train_groups"].notna()]
    several_k = own["k"].nunique() > 1
    return {
        _label(model, k if several_k else None, free): curve.sort_values("train_groups")
        for (model, k, free), curve in cells.groupby(["model", "k", "free"], sort=False)
        if len(curve) > 1
    }


def _draw_few_shot(axes: Axes, own: pd.DataFrame) -> None:
    """``own``: points of one dataset and metric."""
    curves = _few_shot_curves(own)
    for (label, curve), (style, look) in zip(curves.items(), enumerate(looks(curves).values()), strict=True):
        _draw_curve(axes, curve, "train_groups", label, look, APART**style)
    for arm, (label, dash) in ARMS.items():
        rows = own[(own["model"] == arm) & (own["free"] == "")].sort_values("train_groups")
        if rows["train_groups"].notna().sum() > 1:
            axes.plot(rows["train_groups"].astype(float), rows["value"], color=GREY, linestyle=dash, label=label)
        elif len(rows):
            _draw_level(axes, rows, label, dash)
    for name, dash in BASELINES.items():
        _draw_level(axes, own[own["model"] == name], name, dash, PALE)
    log_ticks(axes, own["train_groups"].dropna())
    axes.margins(y=0.1)


def _sweeps(points: pd.DataFrame, metric: str) -> list[Sweep]:
    own = points[(points["dataset"] == points["evaluated_on"]) & (points["metric"] == metric)]
    sweeps = []
    for (dataset, groups), cells in own[own["k"].notna()].groupby(
        ["dataset", "train_groups"], sort=False, dropna=False
    ):
        if cells["k"].nunique() > 1:
            others = own[(own["dataset"] == dataset) & own["k"].isna()]
            same = others["train_groups"].isna() if pd.isna(groups) else others["train_groups"] == groups
            # an arm that was not trained on as many groups is shown at what it has; a baseline knows no groups
            levels = pd.concat([others[same.fillna(False).astype(bool)], others]).drop_duplicates(["model", "free"])
            amount = "all" if pd.isna(groups) else f"{groups:g}"
            sweeps.append(Sweep(f"{dataset}, {amount} training groups", cells, levels))
    return sweeps


def _sweep_curves(sweep: Sweep) -> dict[str, pd.DataFrame]:
    return {
        _label(model, None, free): curve.sort_values("k")
        for (model, free), curve in sweep.cells.groupby(["model", "free"], sort=False)
    }


def _draw_sweep(panels: Sequence[Axes], sweep: Sweep) -> None:
    """On the first panel the metric, then the preference loss and how far it fell, where there are panels for them."""
    curves = _sweep_curves(sweep)
    for (label, curve), (style, look) in zip(curves.items(), enumerate(looks(curves).values()), strict=True):
        _draw_curve(panels[0], curve, "k", label, look, APART**style)
        drawn = {"color": look.colour, "marker": look.marker, "markersize": 5}
        k, first, final = (curve[c].astype(float) for c in ("k", "first_preference_loss", "final_preference_loss"))
        k *= APART**style
        if len(panels) > 1:
            (line,) = panels[1].plot(k, final, **drawn)
            hover(line, _hover_texts(label, curve, "k", final))
            if "loss_low" in curve:
                panels[1].vlines(k, curve["loss_low"], curve["loss_high"], color=look.colour, linewidth=1)
            if first.notna().any():
                panels[1].plot(k, first, linewidth=0.9, linestyle=":", markerfacecolor="white", **drawn)
        if len(panels) > 2:
            panels[2].plot(k, final - first, **drawn)
    for arm, (label, dash) in ARMS.items():
        _draw_level(panels[0], sweep.levels[(sweep.levels["model"] == arm) & (sweep.levels["free"] == "")], label, dash)
    _draw_level(
        panels[0], sweep.levels[sweep.levels["model"] == "popularity"], "popularity", BASELINES["popularity"], PALE
    )
    if len(panels) > 2:
        panels[2].axhline(0, color=GREY, linewidth=0.8)
    for axes in panels:
        log_ticks(axes, sweep.cells["k"])
        axes.margins(y=0.1)


def _matrix(points: pd.DataFrame, metric: str) -> dict[str, pd.DataFrame]:
    """Label -> points of one model at the most training groups of each dataset; empty where nothing was evaluated elsewhere."""
    trained = points[points["metric"] == metric]
    away = trained.loc[trained["dataset"] != trained["evaluated_on"], "model"].unique()
    trained = trained[trained["model"].isin(away)]  # a baseline knows no other data
    most = trained["train_groups"].astype(float).fillna(float("inf"))
    trained = trained[most == most.groupby(trained["dataset"]).transform("max")]
    several_k = trained["k"].nunique() > 1
    return {
        _label(model, None if pd.isna(k) or not several_k else k, free): group
        for (model, k, free), group in trained.groupby(["model", "k", "free"], dropna=False, sort=False)
    }


def _extent(panels: Mapping[str, pd.DataFrame]) -> tuple[list[str], float, float]:
    """Names of the columns, and the smallest and the largest value, of all panels."""
    shown = pd.concat(list(panels.values()))
    return list(dict.fromkeys(shown["evaluated_on"])), shown["value"].min(), shown["value"].max()


def _draw_heat(axes: Axes, group: pd.DataFrame, names: Sequence[str], low: float, high: float) -> QuadMesh:
    cells = group.set_index(["dataset", "evaluated_on"])[["value", "low", "high"]]
    rows = [name for name in names if name in set(group["dataset"])]
    values = cells["value"].unstack().reindex(index=rows, columns=list(names)).to_numpy(dtype=float)
    mesh = axes.pcolormesh(values, cmap=HEAT, vmin=low, vmax=max(high, low + 1e-9))
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            cell = cells.loc[(rows[i], names[j])]
            look = {
                "ha": "center",
                "va": "center",
                "color": DARK if value > (low + high) / 2 else "white",
                "fontsize": 8,
            }
            axes.text(j + 0.5, i + 0.38, f"{value:.3f}", **look)
            axes.text(j + 0.5, i + 0.64, interval(*cell[["low", "high"]].replace(np.nan, None)), **look)
    turned = 30 if max(map(len, names)) > 8 else 0
    axes.set_xticks(np.arange(len(names)) + 0.5, map(short, names), rotation=turned)
    axes.set_yticks(np.arange(len(rows)) + 0.5, map(short, rows))
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_ylabel("trained on")
    axes.set_xlabel("evaluated on")
    return mesh


def _draw_curve(axes: Axes, curve: pd.DataFrame, x: str, label: str, look: Look, shift: float) -> None:
    """Mean over seeds with its interval, and each seed as a small point."""
    at = curve[x].astype(float) * shift
    bars = [curve["value"] - curve["low"], curve["high"] - curve["value"]]
    line, _, _ = axes.errorbar(
        at, curve["value"], yerr=bars, color=look.colour, marker=look.marker, markersize=5, elinewidth=1, capsize=2.5,
        label=label, zorder=3,
    )  # fmt: skip
    hover(line, _hover_texts(label, curve, x, curve["value"]))
    for place, values in zip(at, curve["values"], strict=True):
        if len(values) > 1:
            axes.plot([place] * len(values), values, ".", color=look.colour, markersize=3, alpha=0.7)


def _draw_level(axes: Axes, rows: pd.DataFrame, label: str, dash: object, colour: str = GREY) -> None:
    """A level line at the first of ``rows``, where there is one."""
    if len(rows):
        axes.axhline(rows["value"].iloc[0], color=colour, linestyle=dash, linewidth=1.4, label=label)


def _hover_texts(label: str, curve: pd.DataFrame, x: str, values: pd.Series) -> list[str]:
    return [f"{label}, {at:g}: {value:.4g}" for at, value in zip(curve[x].astype(float), values, strict=True)]


def _in_words(curve: pd.DataFrame, x: str, column: str) -> str:
    return ", ".join(f"{value:.3f} at {at:g}" for at, value in zip(curve[x], curve[column], strict=True))


def _label(model: str, k: float | None, free: str) -> str:
    return short(model + (f", K={int(k)}" if k is not None else "")) + (f", {free}" if free else "")
