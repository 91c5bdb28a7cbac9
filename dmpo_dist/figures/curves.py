"""Training curves: of one run, and of several side by side, as PNG files and as charts of a web page."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from dmpo_dist.artifacts.log import StepRecord, ValidationRecord, by_step, read_log
from dmpo_dist.figures.models import model_look
from dmpo_dist.figures.style import GREY, MARKERS, Drawing, Look, hover, save_grid, short
from dmpo_dist.formats import metric_name

CURVES_FILE = "curves.png"
TRAIN_PANELS = {
    "Loss": {"loss": "loss"},
    "Preference loss, without the likelihood term": {"preference_loss": "preference loss"},
    "Rewards of the positive and of negatives": {"reward_positive": "positive", "reward_negative": "negatives"},
    "Margin: positive minus negatives": {"margin": "margin"},
    "Accuracy: positive preferred": {"accuracy": "accuracy"},
    "Log-probability of responses": {"logp_positive": "positive", "logp_negative": "negatives"},
    "Gradient norm": {"grad_norm": "gradient norm"},
    "Learning rate": {"learning_rate": "learning rate"},
    "Throughput: groups per second": {"groups_per_second": "groups/s"},
    "Memory: GiB of rank 0": {"memory_gib": "GiB"},
}
"""Title -> column -> label. All lines have the colour of the run's model; the second is dashed.

Positive and negative rewards and log-probs share a plot, because a margin can grow while both of them fall.
"""
VALIDATION_METRICS = ("ndcg@10", "hr@1", "mrr", "auc")
VALIDATION_PANEL = "Validation"
LINE_DASHES = ("-", "--", ":", "-.")
"""Of the lines of one run in one plot."""
SIDE_BY_SIDE = {
    "sft_loss": "Loss of SFT",
    "preference_loss": "Preference loss, without the likelihood term",
    "margin": "Margin: positive minus negatives",
    "reward_positive": "Reward of positives",
    "reward_negative": "Reward of negatives",
    "logp_positive": "Log-probability of positives",
    "logp_negative": "Log-probability of negatives",
}
"""Column of ``losses_apart`` -> title."""
NOISY = 50  # series of at least so many log lines are drawn with a running mean
FEW = 25  # series of at most so many points have markers
EXACT = ("learning_rate", "memory_gib")  # columns without noise, which no running mean should blur
LEAST = 3  # fewer points than these are drawn without a line between them
MOST_RUNS = 21  # side by side on a page: so many looks can be told apart without markers

Lines = Mapping[str, tuple[str, Look]]
"""Column -> label and look."""


def plot_curves(metrics_file: Path, output: Path, select_metric: str | None = "ndcg@10", model: str = "dmpo") -> None:
    """Draw what a metrics.jsonl holds of the quantities in ``TRAIN_PANELS`` and of validation metrics.

    Args:
        metrics_file: a run's metrics.jsonl; null and NaN are gaps in a line.
        output: the PNG; its folder is made.
        select_metric: the validation metric whose best step is marked; None marks no step.
        model: whose colour the lines have, see ``figures.models``.
    """
    records = read_log(metrics_file).records
    train, validation = by_step(records, StepRecord), by_step(records, ValidationRecord)
    best = None
    if select_metric is not None and has_values(validation, select_metric):
        best = int(validation[select_metric].idxmax())
    drawings = run_drawings(train, validation, best, select_metric or "", model_look(model))
    columns = {0: 1, 4: 2}.get(len(drawings), min(len(drawings), 3))
    save_grid(drawings, Path(output), columns, heading="" if drawings else "no metrics were logged")


def run_drawings(
    train: pd.DataFrame, validation: pd.DataFrame, best: int | None, metric: str, look: Look
) -> list[Drawing]:
    """A drawing of each quantity that a run logged, in the colour of its model.

    The preference loss has its own drawing only where the loss has a further term.

    Args:
        train, validation: see ``artifacts.log.by_step``.
        best: the step whose weights are kept, which is marked; it is the best by the validation ``metric``.
    """
    drawings = []
    for title, columns in TRAIN_PANELS.items():
        lines = _lines_of_run({c: label for c, label in columns.items() if has_values(train, c)}, look)
        if lines and not ("preference_loss" in lines and _same(train["loss"], train["preference_loss"])):
            drawings.append(_drawing(title, train, lines))
    metrics = {name: metric_name(name) for name in VALIDATION_METRICS if has_values(validation, name)}
    if metrics:
        note = "" if best is None else f"The line is step {best}, whose weights are the result."
        drawings.append(_drawing(VALIDATION_PANEL, validation, _lines_of_run(metrics, look), note, mark=(best, metric)))
    return drawings


def losses_apart(train: pd.DataFrame, stage: str) -> pd.DataFrame:
    """``train`` with its loss named by its stage, so that losses of SFT and of preferences never share an axis.

    A preference run's is its preference loss, which further terms of the loss do not move; earlier versions logged the
    loss alone.

    Args:
        stage: ``sft`` or ``train``.
    """
    if "loss" not in train:
        return train
    if stage == "sft":
        return train.drop(columns="preference_loss", errors="ignore").rename(columns={"loss": "sft_loss"})
    return (
        train.drop(columns="loss") if "preference_loss" in train else train.rename(columns={"loss": "preference_loss"})
    )


def side_by_side_drawings(
    runs: Mapping[str, tuple[pd.DataFrame, pd.DataFrame]],
    metric: str,
    looks: Mapping[str, Look],
    quantities: Mapping[str, str] = SIDE_BY_SIDE,
    note: str = "",
    fewest: int = 1,
) -> list[Drawing]:
    """A drawing of each of ``quantities`` and of the validation ``metric``, with a line for each run that logged it.

    Args:
        runs: name -> its train frame, see ``losses_apart``, and its validation frame.
        looks: name -> the look of its lines.
        fewest: quantities logged by fewer runs than this are left out.
    """
    drawings = []
    for column, title in {**quantities, metric: f"Validation {metric_name(metric)}"}.items():
        frames = {name: validation if column == metric else train for name, (train, validation) in runs.items()}
        there = {name: frame[column] for name, frame in frames.items() if has_values(frame, column)}
        if len(there) >= fewest:
            lines = {name: (short(name), looks[name]) for name in there}
            drawings.append(_drawing(title, pd.DataFrame(there), lines, note, raw=False))
    return drawings


def _drawing(
    title: str,
    frame: pd.DataFrame,
    lines: Lines,
    note: str = "",
    raw: bool = True,
    mark: tuple[int | None, str] = (None, ""),
) -> Drawing:
    if any(_noisy(frame[column].dropna()) for column in lines):
        note = f"{note} Running means{'; pale: each log line' if raw else ''}.".strip()
    words = [_in_words(_smooth(frame[column].dropna()), label) for column, (label, _) in lines.items()]
    alt = f"{title}, by optimizer step: {'; '.join(words)}"
    return Drawing(title, alt, partial(_draw_lines, frame=frame, lines=lines, raw=raw, mark=mark), note=note)


def _draw_lines(axes: Axes, frame: pd.DataFrame, lines: Lines, raw: bool, mark: tuple[int | None, str]) -> None:
    """Draw columns of ``frame``, which is indexed by step; long ones as running means, with all values if ``raw``."""
    for column, (label, look) in lines.items():
        values = frame[column].dropna()
        marker = look.marker if len(values) <= FEW else None
        dash = look.dash if len(values) >= LEAST else "none"
        if raw and _noisy(values):
            axes.plot(values.index, values, color=look.colour, linewidth=0.8, alpha=0.35)
        values = _smooth(values)
        (line,) = axes.plot(
            values.index, values, color=look.colour, linestyle=dash, marker=marker, markersize=3.5, label=label
        )
        if marker:
            hover(line, [f"{label}, {step:g}: {value:.4g}" for step, value in values.items()])
    best, metric = mark
    if best is not None:
        axes.axvline(best, color=GREY, linewidth=1, linestyle=(0, (4, 3)))
        if metric in lines and best in frame.index:
            axes.plot(
                best, frame.loc[best, metric], "*", markersize=13, color=lines[metric][1].colour, mec="black", zorder=5
            )
        axes.set_title(f"best {metric}: step {best}", fontsize="medium", loc="right", color=GREY)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_xlim(left=0)
    axes.margins(y=0.08)


def _lines_of_run(columns: Mapping[str, str], look: Look) -> dict[str, tuple[str, Look]]:
    """Lines of one colour, told apart by dashes and markers."""
    return {
        column: (label, Look(look.colour, marker, dash))
        for (column, label), marker, dash in zip(columns.items(), MARKERS, LINE_DASHES, strict=False)
    }


def has_values(frame: pd.DataFrame, column: str) -> bool:
    """Whether ``frame`` has ``column`` with at least one value."""
    return column in frame and bool(frame[column].notna().any())


def _smooth(values: pd.Series) -> pd.Series:
    """The running mean of a long noisy series; any other one unchanged."""
    return values.ewm(span=max(5, len(values) / 20)).mean() if _noisy(values) else values


def _noisy(values: pd.Series) -> bool:
    return len(values) >= NOISY and values.name not in EXACT


def _same(one: pd.Series, other: pd.Series) -> bool:
    return not (one - other).abs().max() > 1e-6


def _in_words(values: pd.Series, label: str) -> str:
    low, high = values.idxmin(), values.idxmax()
    return (
        f"{label} {values.iloc[0]:.4g} at step {values.index[0]:g}, "
        f"{values.iloc[-1]:.4g} at step {values.index[-1]:g}, "
        f"lowest {values[low]:.4g} at {low:g}, highest {values[high]:.4g} at {high:g}"
    )
