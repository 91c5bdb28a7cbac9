"""Training curves of one run as a PNG."""

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dmpo_dist.artifacts.log import StepRecord, ValidationRecord, by_step, read_log

# Okabe-Ito: told apart by colour-blind readers and in grey.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#555555"
VALIDATION_COLOURS = {"ndcg@10": BLUE, "hr@1": ORANGE, "mrr": GREEN, "auc": PURPLE}

# Panel title, and its series: column -> (label, colour). A panel is drawn when one of its series has a value.
TRAIN_PANELS = {
    "Loss": {"loss": ("loss", BLUE)},
    "Margin: positive minus negatives": {"margin": ("margin", BLUE)},
    "Accuracy: positive preferred": {"accuracy": ("accuracy", BLUE)},
    "Log-probability of responses": {"logp_positive": ("positive", GREEN), "logp_negative": ("negatives", ORANGE)},
    "Gradient norm": {"grad_norm": ("gradient norm", GREY)},
}
VALIDATION_PANEL = "Validation"
CURVES_FILE = "curves.png"


def plot_curves(metrics_file: Path, output: Path, select_metric: str | None = "ndcg@10") -> None:
    """Draw the series of a metrics.jsonl that has them: loss, margin, accuracy, log-probs, gradient norm, validation.

    Positive and negative log-probs share a panel, so that a margin that grows while the positive falls is seen.

    Args:
        metrics_file: a run's metrics.jsonl; null and NaN are gaps.
        output: the PNG; its folder is made.
        select_metric: the best step of this validation metric is marked; None marks none.
    """
    records = read_log(metrics_file).records
    train, validation = by_step(records, StepRecord), by_step(records, ValidationRecord)
    panels = {title: s for title, s in TRAIN_PANELS.items() if any(has_values(train, column) for column in s)}
    metrics = {name: (name, colour) for name, colour in VALIDATION_COLOURS.items() if has_values(validation, name)}
    if metrics:
        panels[VALIDATION_PANEL] = metrics

    columns = {0: 1, 4: 2}.get(len(panels), min(len(panels), 3))
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(4.4 * columns, 3.2 * rows), dpi=160, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    last_step = max([1, *train.index, *validation.index])
    for place, (title, lines) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, place)
        draw_panel(axes, title, validation if title == VALIDATION_PANEL else train, lines)
        if len(lines) > 1:
            axes.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, -0.34), ncols=4)
        if title == VALIDATION_PANEL:
            _mark_best(axes, validation, select_metric)
        axes.set_xlim(0, 1.02 * last_step)
    if not panels:
        figure.text(0.5, 0.5, "no metrics were logged", ha="center", va="center", color=GREY)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, format="png")


def has_values(frame: pd.DataFrame, column: str) -> bool:
    """Whether ``column`` is there and not all gaps."""
    return column in frame and bool(frame[column].notna().any())


def draw_panel(axes: Axes, title: str, frame: pd.DataFrame, lines: dict[str, tuple[str, str]]) -> None:
    """Draw columns of ``frame``, which is indexed by step: column -> (label, colour); long ones with a running mean."""
    for column, (label, colour) in lines.items():
        if not has_values(frame, column):
            continue
        values = frame[column].dropna()
        marker = "o" if len(values) <= 25 else None
        if len(values) >= 50:  # noisy training series: the raw values pale, their running mean on top
            axes.plot(values.index, values, color=colour, linewidth=0.8, alpha=0.3)
            values = values.ewm(span=max(5, len(values) / 20)).mean()
        axes.plot(values.index, values, color=colour, linewidth=1.6, marker=marker, markersize=3.5, label=label)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("optimizer step", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.08)


def _mark_best(axes: Axes, validation: pd.DataFrame, select_metric: str | None) -> None:
    if select_metric is None or not has_values(validation, select_metric):
        return
    step = validation[select_metric].idxmax()
    axes.axvline(step, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    colour = VALIDATION_COLOURS.get(select_metric, GREY)
    axes.plot(
        step, validation.loc[step, select_metric], "*", markersize=13, color=colour, mec="black", mew=0.7, zorder=5
    )
    axes.set_title(f"best {select_metric}: step {step:g}", fontsize=8, loc="right", color=GREY)
