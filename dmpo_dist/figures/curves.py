"""Training curves: of one run, and of several side by side, as PNG files and as charts of a web page."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dmpo_dist.figures.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    Chart,
    Look,
    add_legend,
    draw_chart,
    drawing,
    hover,
    looks,
    save_png,
    short,
)  # fmt: skip
from dmpo_dist.formats import metric_name

CURVES_FILE = "curves.png"
TRAIN_PANELS = {
    "Loss": {"loss": ("loss", BLUE)},
    "Preference loss, without the likelihood term": {"preference_loss": ("preference loss", BLUE)},
    "Margin: positive minus negatives": {"margin": ("margin", BLUE)},
    "Accuracy: positive preferred": {"accuracy": ("accuracy", BLUE)},
    "Log-probability of responses": {"logp_positive": ("positive", GREEN), "logp_negative": ("negatives", ORANGE)},
    "Gradient norm": {"grad_norm": ("gradient norm", GREY)},
}
"""Title -> column -> (label, colour). Positive and negative log-probs share a panel, so that a margin that grows while the
positive falls is seen."""
VALIDATION_COLOURS = {"ndcg@10": BLUE, "hr@1": ORANGE, "mrr": GREEN, "auc": PURPLE}
VALIDATION_PANEL = "Validation"
SIDE_BY_SIDE = {
    "loss": "Loss",
    "margin": "Margin: positive minus negatives",
    "logp_positive": "Log-probability of positives",
    "logp_negative": "Log-probability of negatives",
}
NOISY = 50  # log lines from which a running mean is drawn over them
FEW = 25  # points up to which each has a marker
MOST_RUNS = 21  # side by side on a page: as many looks there are without markers
PANEL_HEIGHT = 2.6  # inches, on a page


@dataclass(frozen=True)
class Panel:
    """Columns of a frame that is indexed by step.

    Attributes:
        lines: column -> (label, look), those with values.
        raw: whether a noisy series is shown pale behind its running mean.
        mark: a step to mark, and the column whose value at that step gets a star.
    """

    title: str
    frame: pd.DataFrame
    lines: Mapping[str, tuple[str, Look]]
    raw: bool = True
    mark: tuple[int, str] | None = None


@drawing()
def plot_curves(metrics_file: Path, output: Path, select_metric: str | None = "ndcg@10") -> None:
    """Draw the series of a metrics.jsonl that has them: loss, margin, accuracy, log-probs, gradient norm, validation.

    Args:
        metrics_file: JSON lines with ``kind`` ("train" or "validation"), ``step`` and numbers; null and NaN are gaps.
        output: the PNG; its folder is made.
        select_metric: the best step of this validation metric is marked; None marks none.
    """
    train, validation = series(read_records(Path(metrics_file)))
    best = None
    if select_metric is not None and has_values(validation, select_metric):
        best = int(validation[select_metric].idxmax())
    panels = run_panels(train, validation, best, select_metric)
    columns = {0: 1, 4: 2}.get(len(panels), min(len(panels), 3))
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(4.4 * columns, 3.2 * rows))
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    for place, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, place)
        draw_panel(axes, panel)
        axes.set_title(panel.title)
        if len(panel.lines) > 1:
            axes.legend(loc="lower left", bbox_to_anchor=(0, -0.34), ncols=4)
        if panel.mark:
            axes.set_title(f"best {select_metric}: step {best}", fontsize=8, loc="right", color=GREY)
        axes.set_xlim(0, 1.02 * max([1, *train.index, *validation.index]))
    if not panels:
        figure.text(0.5, 0.5, "no metrics were logged", ha="center", va="center", color=GREY)
    save_png(figure, Path(output))


@drawing()
def plot_side_by_side(panels: Sequence[Panel], output: Path) -> None:
    """A PNG of what ``side_by_side_panels`` returns, with one legend."""
    runs = {label for panel in panels for label, _ in panel.lines.values()}
    figure = Figure(figsize=(4.6 * len(panels), 3.2 + 0.2 * len(runs)))
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw_panel(axes, panel)
        axes.set_title(panel.title)
    add_legend(figure, columns=2)
    save_png(figure, output)


def curve_charts(panels: Sequence[Panel], notes: Mapping[str, str]) -> list[Chart]:
    """A chart for each panel.

    Args:
        notes: by the panel's title, what to say below it.
    """
    charts = []
    for panel in panels:
        note = notes.get(panel.title, "")
        if any(panel.frame[column].count() >= NOISY for column in panel.lines):
            note = f"{note} Running means{'; pale: each log line' if panel.raw else ''}.".strip()
        words = [_in_words(panel.frame[column].dropna(), label) for column, (label, _) in panel.lines.items()]
        alt = f"{panel.title}, by optimizer step: {'; '.join(words)}"
        charts.append(draw_chart(panel.title, alt, lambda axes, p=panel: draw_panel(axes, p), [PANEL_HEIGHT], note))
    return charts


def run_panels(
    train: pd.DataFrame, validation: pd.DataFrame, best: int | None, best_metric: str | None = None
) -> list[Panel]:
    """One run: a panel for each quantity it logged.

    The preference loss has a panel where the loss is more than that.

    Args:
        train, validation: see ``series``.
        best: step to mark in the validation panel, at ``best_metric`` by a star.
    """
    panels = []
    for title, columns in TRAIN_PANELS.items():
        lines = {c: (label, Look(colour)) for c, (label, colour) in columns.items() if has_values(train, c)}
        if lines and not ("preference_loss" in lines and _same(train["loss"], train["preference_loss"])):
            panels.append(Panel(title, train, lines))
    metrics = {
        name: (metric_name(name), Look(colour))
        for name, colour in VALIDATION_COLOURS.items()
        if has_values(validation, name)
    }
    if metrics:
        mark = None if best is None else (best, best_metric or "")
        panels.append(Panel(VALIDATION_PANEL, validation, metrics, mark=mark))
    return panels


def side_by_side_panels(
    runs: Mapping[str, tuple[pd.DataFrame, pd.DataFrame]], metric: str, quantities: Mapping[str, str] = SIDE_BY_SIDE
) -> list[Panel]:
    """Several runs: a panel for each of ``quantities`` and the validation ``metric``, with a line per run that logged it.

    Args:
        runs: name -> its train and validation frames, see ``series``.
    """
    of_run = looks(runs)
    panels = []
    for column, title in {**quantities, metric: f"Validation {metric_name(metric)}"}.items():
        frames = {name: validation if column == metric else train for name, (train, validation) in runs.items()}
        there = {name: frame[column] for name, frame in frames.items() if has_values(frame, column)}
        if there:
            lines = {name: (short(name), of_run[name]) for name in there}
            panels.append(Panel(title, pd.DataFrame(there), lines, raw=False))
    return panels


def draw_panel(axes: Axes, panel: Panel) -> None:
    """Draw the panel's lines; long ones as their running mean."""
    if panel.mark:
        axes.axvline(panel.mark[0], color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    for column, (label, look) in panel.lines.items():
        values = panel.frame[column].dropna()
        marker = look.marker if len(values) <= FEW else None
        if len(values) >= NOISY:
            if panel.raw:
                axes.plot(values.index, values, color=look.colour, linewidth=0.8, alpha=0.35)
            values = values.ewm(span=max(5, len(values) / 20)).mean()
        (line,) = axes.plot(
            values.index, values, color=look.colour, linestyle=look.dash, marker=marker, markersize=3.5, label=label
        )
        if marker:
            hover(line, [f"{label}, {step:g}: {value:.4g}" for step, value in values.items()])
        if panel.mark and panel.mark[1] == column:
            place = (panel.mark[0], values[panel.mark[0]])
            axes.plot(*place, "*", markersize=13, color=look.colour, mec="black", mew=0.7, zorder=5)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_xlim(left=0)
    axes.margins(y=0.08)


def read_records(metrics_file: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl in order, without the half line that a run killed while writing leaves."""
    records = []
    for line in metrics_file.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and "kind" in record:
            records.append(record)
    return records


def series(records: Sequence[dict[str, Any]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train and validation figures by step; where a resumed run logged a step again, its last record counts."""
    stepped = [record for record in records if record.get("step") is not None]
    frame = pd.DataFrame(stepped, columns=sorted({"kind", "step"}.union(*stepped)))
    numbers = frame.drop(columns="kind").apply(pd.to_numeric, errors="coerce").replace([np.inf, -np.inf], np.nan)
    train, validation = (
        numbers[frame["kind"] == kind].drop_duplicates("step", keep="last").sort_values("step").set_index("step")
        for kind in ("train", "validation")
    )
    return train, validation


def has_values(frame: pd.DataFrame, column: str) -> bool:
    """Whether ``column`` is there and not all gaps."""
    return column in frame and bool(frame[column].notna().any())


def _same(one: pd.Series, other: pd.Series) -> bool:
    return not (one - other).abs().max() > 1e-6


def _in_words(values: pd.Series, label: str) -> str:
    low, high = values.idxmin(), values.idxmax()
    return (
        f"{label} {values.iloc[0]:.4g} at step {values.index[0]:g}, {values.iloc[-1]:.4g} at step {values.index[-1]:g}, "
        f"lowest {values[low]:.4g} at {low:g}, highest {values[high]:.4g} at {high:g}"
    )
