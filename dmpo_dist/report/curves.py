"""Training curves: of each run, and of runs of one kind side by side."""

import pandas as pd

from dmpo_dist.figures.curves import BLUE, GREEN, GREY, ORANGE, PURPLE, TRAIN_PANELS, VALIDATION_COLOURS, has_values
from dmpo_dist.records.read import Run
from dmpo_dist.report.svg import COLOURS, DASHES, Figure, Line, Panel, line_chart
from dmpo_dist.report.words import metric_name

STYLES = {BLUE: 0, ORANGE: 1, GREEN: 2, PURPLE: 3, GREY: 4}  # the style sheet's classes, in this order
NOISY = 50  # log lines from which a running mean is drawn over them
MOST_POINTS = 240  # of a line on the page
MOST_RUNS = COLOURS * DASHES
SIDE_BY_SIDE = {
    "loss": "Loss",
    "margin": "Margin: positive minus negatives",
    "logp_positive": "Log-probability of positives",
    "logp_negative": "Log-probability of negatives",
}
PREFERENCE_PANEL = {"Preference loss, without the likelihood term": {"preference_loss": ("preference loss", BLUE)}}
X_NAME = "optimizer step"


def run_figures(run: Run) -> list[Figure]:
    """A figure per quantity that the run logged; positive and negative log-probs as two lines of one."""
    panels = TRAIN_PANELS
    if _has_likelihood_term(run.train):
        panels = {"Loss": TRAIN_PANELS["Loss"], **PREFERENCE_PANEL, **TRAIN_PANELS}
    figures = [_figure(title, run.train, columns) for title, columns in panels.items()]
    metrics = {name: (metric_name(name), colour) for name, colour in VALIDATION_COLOURS.items()}
    note = f"The line is step {run.best_step}, whose weights are the result." if run.best_step is not None else ""
    figures.append(_figure("Validation", run.validation, metrics, run.best_step, note))
    return [figure for figure in figures if figure is not None]


def side_by_side(runs: dict[str, Run]) -> list[Figure]:
    """A figure per quantity with a line per run, the first MOST_RUNS of them; for runs of one stage."""
    shown = dict(list(runs.items())[:MOST_RUNS])
    frames = {title: _columns({n: r.train for n, r in shown.items()}, c) for c, title in SIDE_BY_SIDE.items()}
    metric = next(iter(shown.values())).metric
    frames[f"Validation {metric_name(metric)}"] = _columns({n: r.validation for n, r in shown.items()}, metric)
    lines = {name: (name, number) for number, name in enumerate(shown)}
    note = f"The first {MOST_RUNS} of {len(runs)} runs." if len(runs) > MOST_RUNS else ""
    figures = [_lines_figure(title, frame, lines, None, note, raw=False) for title, frame in frames.items()]
    return [figure for figure in figures if figure is not None and len(figure.legend) > 1]


def _figure(
    title: str, frame: pd.DataFrame, columns: dict[str, tuple[str, str]], mark: int | None = None, note: str = ""
) -> Figure | None:
    lines = {column: (label, STYLES[colour]) for column, (label, colour) in columns.items()}
    return _lines_figure(title, frame, lines, mark, note)


def _lines_figure(
    title: str, frame: pd.DataFrame, lines: dict[str, tuple[str, int]], mark: int | None, note: str, raw: bool = True
) -> Figure | None:
    """A line per column; where there are many points their running mean, over themselves if ``raw``."""
    shown = {column: look for column, look in lines.items() if has_values(frame, column)}
    drawn = [_line(frame[column].dropna(), label, style, raw) for column, (label, style) in shown.items()]
    if not drawn:
        return None
    if any(frame[column].count() >= NOISY for column in shown):
        note = f"{note} Running means{'; pale: each log line' if raw else ''}.".strip()
    alt = f"{title}, by optimizer step: " + "; ".join(_in_words(line) for line in drawn)
    chart = line_chart([Panel(drawn, mark=mark)], alt, X_NAME)
    return Figure(title, chart, [(line.label, line.style) for line in drawn] if len(drawn) > 1 else (), note)


def _line(values: pd.Series, label: str, style: int, raw: bool) -> Line:
    if len(values) < NOISY:
        return Line(label, _points(values), style)
    smooth = values.ewm(span=max(5, len(values) / 20)).mean()
    return Line(label, _points(_thinned(smooth)), style, raw=_points(_thinned(values)) if raw else ())


def _thinned(values: pd.Series) -> pd.Series:
    """At most MOST_POINTS of a long series: the smallest and the largest of each stretch, so that no spike is lost."""
    if len(values) <= MOST_POINTS:
        return values
    stretches = values.groupby([i * (MOST_POINTS // 2) // len(values) for i in range(len(values))])
    places = {*stretches.idxmin(), *stretches.idxmax(), values.index[0], values.index[-1]}
    return values.loc[sorted(places)]


def _points(values: pd.Series) -> list[tuple[float, float]]:
    return [(float(step), float(value)) for step, value in values.items()]


def _in_words(line: Line) -> str:
    (first, start), (last, end) = line.points[0], line.points[-1]
    lowest, highest = (pick(line.points, key=lambda point: point[1]) for pick in (min, max))
    return (
        f"{line.label} {start:.4g} at step {first:g}, {end:.4g} at step {last:g}, "
        f"lowest {lowest[1]:.4g} at {lowest[0]:g}, highest {highest[1]:.4g} at {highest[0]:g}"
    )


def _columns(frames: dict[str, pd.DataFrame], column: str) -> pd.DataFrame:
    return pd.DataFrame({name: frame[column] for name, frame in frames.items() if has_values(frame, column)})


def _has_likelihood_term(train: pd.DataFrame) -> bool:
    """Whether the loss is more than the preference loss."""
    if not has_values(train, "preference_loss"):
        return False
    return bool((train["loss"] - train["preference_loss"]).abs().max() > 1e-6)


def runs_by_stage(runs: dict[str, Run]) -> dict[str, dict[str, Run]]:
    """Stage -> its runs, where there are two or more."""
    stages: dict[str, dict[str, Run]] = {}
    for name, run in runs.items():
        if run.stage:
            stages.setdefault(run.stage, {})[name] = run
    return {stage: of_stage for stage, of_stage in stages.items() if len(of_stage) > 1}
