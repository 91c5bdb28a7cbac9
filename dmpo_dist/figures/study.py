"""The pictures of an experiment: few-shot curves, the sweep over K, the cross-domain matrix."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dmpo_dist.figures.curves import BLUE, GREEN, GREY, ORANGE, PURPLE

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, "#E69F00", "#56B4E9", "#000000")  # Okabe-Ito
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
ARMS = {"sft": ("SFT", "--"), "sft_continued": ("SFT continued", ":")}
BASELINES = {"popularity": (0, (6, 2)), "random": (0, (1, 2))}
METRIC_TITLES = {"hr@1": "HR@1", "ndcg@10": "NDCG@10"}
HEAT = "cividis"
BELOW_K = "negatives per group K (log scale)"
MOST_PANELS = 12
APART = 1.03  # factor on the logarithmic axis
FEW_SHOT_FILE, K_SWEEP_FILE, MATRIX_FILE = "few_shot.png", "k_sweep.png", "cross_domain.png"


def draw_few_shot(points: pd.DataFrame, output: Path) -> bool:
    """HR@1 and NDCG@10 over the number of training groups, a column for each dataset; False where there is no such curve."""
    own = points[points["dataset"] == points["evaluated_on"]]
    cells = own[own["k"].notna()]
    datasets = [name for name, group in cells.groupby("dataset", sort=False) if group["train_groups"].nunique() > 1]
    if not datasets:
        return False
    figure = Figure(figsize=(1.2 + 4.6 * len(datasets), 7.4), dpi=160, layout="constrained")
    panels = figure.subplots(2, len(datasets), squeeze=False, sharex="col")
    for column, dataset in enumerate(datasets):
        for axes, metric in zip(panels[:, column], METRIC_TITLES, strict=True):
            here = own[(own["dataset"] == dataset) & (own["metric"] == metric)]
            curves = here[here["k"].notna()].groupby(["model", "k", "free"], sort=False)
            several_k = here["k"].nunique() > 1
            curves = [(_label(m, k if several_k else None, free), g) for (m, k, free), g in curves if len(g) > 1]
            for style, (label, group) in enumerate(curves):
                _draw_curve(axes, group.sort_values("train_groups"), "train_groups", label, style)
            _draw_arms(axes, here, "train_groups")
            _draw_baselines(axes, here)
            _finish(axes, f"{dataset}: {METRIC_TITLES[metric]}", "", here["train_groups"])
        panels[-1, column].set_xlabel("training groups (log scale)", fontsize=9)
    _legend(figure)
    figure.savefig(output, format="png")
    return True


def draw_k_sweep(points: pd.DataFrame, output: Path) -> bool:
    """HR@1, the preference loss and how far it fell, over K; a row for each dataset and number of groups. False without a sweep."""
    own = points[(points["dataset"] == points["evaluated_on"]) & (points["metric"] == "hr@1")]
    cells = own[own["k"].notna()]
    groups = cells.groupby(["dataset", "train_groups"], sort=False)
    rows = [(key, group) for key, group in groups if group["k"].nunique() > 1]
    if not rows:
        return False
    figure = Figure(figsize=(13.2, 0.9 + 3.7 * len(rows)), dpi=160, layout="constrained")
    panels = figure.subplots(len(rows), 3, squeeze=False)
    for ((dataset, n), group), (left, loss, fall) in zip(rows, panels, strict=True):
        title = f"{dataset}, {n} training groups"
        for style, ((model, free), curve) in enumerate(group.groupby(["model", "free"], sort=False)):
            curve = curve.sort_values("k")
            _draw_curve(left, curve, "k", _label(model, None, free), style)
            colour, marker = _look(style)
            look = {"color": colour, "marker": marker, "markersize": 5}
            k = curve["k"].astype(float) * APART**style
            first, final = curve["first_preference_loss"], curve["final_preference_loss"]
            loss.plot(k, final, linewidth=1.8, **look)
            loss.plot(k, first, linewidth=0.9, linestyle=":", markerfacecolor="white", **look)
            fall.plot(k, final - first, linewidth=1.8, **look)
        levels = own[(own["dataset"] == dataset) & own["k"].isna()]
        for arm, (label, line) in ARMS.items():
            mine = levels[(levels["model"] == arm) & (levels["free"] == "")]
            same = mine[mine["train_groups"] == n]
            if len(mine):
                _draw_level(left, (same if len(same) else mine).iloc[0], label, line)
        _draw_baselines(left, levels, ["popularity"])
        fall.axhline(0, color=GREY, linewidth=0.8)
        _finish(left, f"HR@1: {title}", BELOW_K, group["k"])
        _finish(loss, "Preference loss: filled at the end, hollow at the start", BELOW_K, group["k"])
        _finish(fall, "Preference loss: end minus start", BELOW_K, group["k"])
    _legend(figure)
    figure.savefig(output, format="png")
    return True


def draw_matrix(points: pd.DataFrame, output: Path, metric: str = "ndcg@10") -> bool:
    """Trained on (rows) against evaluated on (columns), a panel for each of the first models at the most shots; False without
    a matrix."""
    trained = points[(points["metric"] == metric) & points["train_groups"].notna()]
    if not (trained["dataset"] != trained["evaluated_on"]).any():
        return False
    most = trained.groupby("dataset")["train_groups"].transform("max")
    trained = trained[trained["train_groups"] == most]
    several_k = trained["k"].nunique() > 1
    panels = [
        (_label(model, None if pd.isna(k) or not several_k else k, free), group)
        for (model, k, free), group in trained.groupby(["model", "k", "free"], dropna=False, sort=False)
    ]
    panels = panels[:MOST_PANELS]
    names = list(dict.fromkeys(trained["evaluated_on"]))
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    lines = -(-len(panels) // columns)
    size = 1.5 + 0.95 * len(names)
    figure = Figure(figsize=(columns * (size + 0.5), lines * size + 1.0), dpi=160, layout="constrained")
    low, high = trained["value"].min(), trained["value"].max()
    image = None
    for place, (label, group) in enumerate(panels, start=1):
        axes = figure.add_subplot(lines, columns, place)
        image = _draw_heat(axes, group, names, low, high)
        axes.set_title(label, fontsize=10, loc="left")
        axes.set_ylabel("trained on", fontsize=9)
        axes.set_xlabel("evaluated on", fontsize=9)
    figure.colorbar(image, ax=figure.axes, shrink=0.8, label=METRIC_TITLES.get(metric, metric))
    chance = points[(points["metric"] == metric) & (points["model"] == "random")]["value"]
    note = f"; a random order has {chance.mean():.3f}" if len(chance) else ""
    figure.suptitle(
        f"{METRIC_TITLES.get(metric, metric)}, mean over seeds [95 % over users and seeds]{note}", fontsize=10
    )
    figure.savefig(output, format="png")
    return True


def _draw_heat(axes: Axes, group: pd.DataFrame, names: Sequence[str], low: float, high: float) -> object:
    cells = group.set_index(["dataset", "evaluated_on"])[["value", "low", "high"]]
    rows = [name for name in names if name in set(group["dataset"])]
    values = cells["value"].unstack().reindex(index=rows, columns=list(names)).to_numpy(dtype=float)
    image = axes.imshow(values, cmap=HEAT, vmin=low, vmax=max(high, low + 1e-9))
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            cell = cells.loc[(rows[i], names[j])]
            colour = "black" if value > (low + high) / 2 else "white"
            text = f"{value:.3f}\n[{cell['low']:.3f}, {cell['high']:.3f}]"
            axes.text(j, i, text, ha="center", va="center", fontsize=7.5, color=colour)
    axes.set_xticks(range(len(names)), names, fontsize=8, rotation=30 if max(map(len, names)) > 8 else 0)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    return image


def _draw_curve(axes: Axes, curve: pd.DataFrame, x: str, label: str, style: int) -> None:
    """Mean over seeds with its interval, and each seed as a small point; curves stand a little apart, to be told apart."""
    colour, marker = _look(style)
    at = curve[x].astype(float) * APART**style
    bars = [curve["value"] - curve["low"], curve["high"] - curve["value"]]
    axes.errorbar(
        at, curve["value"], yerr=bars, color=colour, marker=marker, markersize=5, linewidth=1.8, elinewidth=1, capsize=2.5,
        label=label, zorder=3,
    )  # fmt: skip
    for place, values in zip(at, curve["values"], strict=True):
        if len(values) > 1:
            axes.plot([place] * len(values), values, ".", color=colour, markersize=3, alpha=0.7)


def _draw_arms(axes: Axes, here: pd.DataFrame, x: str) -> None:
    for arm, (label, line) in ARMS.items():
        mine = here[(here["model"] == arm) & (here["free"] == "")].sort_values(x)
        if len(mine) > 1:
            axes.plot(mine[x].astype(float), mine["value"], color=GREY, linestyle=line, linewidth=1.6, label=label)
        elif len(mine):
            _draw_level(axes, mine.iloc[0], label, line)


def _draw_level(axes: Axes, row: pd.Series, label: str, line: object, colour: str = GREY) -> None:
    axes.axhline(row["value"], color=colour, linestyle=line, linewidth=1.4, label=label)


def _draw_baselines(axes: Axes, here: pd.DataFrame, names: Sequence[str] = tuple(BASELINES)) -> None:
    for name, line in ((name, BASELINES[name]) for name in names):
        mine = here[here["model"] == name]
        if len(mine):
            _draw_level(axes, mine.iloc[0], name, line, "#999999")


def _finish(axes: Axes, title: str, below: str, ticks: pd.Series) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(below, fontsize=9)
    axes.set_xscale("log", base=2)
    at = sorted({int(value) for value in ticks.dropna()})
    axes.set_xticks(at, [str(value) for value in at], minor=False)
    axes.minorticks_off()
    axes.tick_params(labelsize=8)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.1)


def _legend(figure: Figure) -> None:
    handles = {label: h for axes in figure.axes for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)


def _look(style: int) -> tuple[str, str]:
    """Colour and marker, together different for 49 curves."""
    return COLOURS[style % len(COLOURS)], MARKERS[(style + style // len(COLOURS)) % len(MARKERS)]


def _label(model: str, k: float | None, free: str) -> str:
    return model + (f", K={int(k)}" if k is not None else "") + (f", {free}" if free else "")
