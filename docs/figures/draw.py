"""Draw the figures of RESULTS.md from results.csv: `python docs/figures/draw.py`, in the folder of the repository.

results.csv holds the figures that RESULTS.md tells, and from the logs of the runs, by step, the training loss of DMPO
and HR@1 on validation (mean of three seeds).
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dmpo_dist.figures.intervals import IntervalRow, interval_drawing
from dmpo_dist.figures.models import model_looks
from dmpo_dist.figures.style import GREY, PALETTE, Drawing, add_legend, drawing, log_ticks

HERE = Path(__file__).parent
WIDTH = 4.3  # inches of a panel
NAMES = {
    "SFT continued": "sft_continued", "DMPO": "dmpo", "DMPO, boundary negatives": "dmpo-boundary", "S-DPO": "sdpo",
    "DPO on 7 pairs": "dpo_pairs", "IPO": "ipo", "SimPO": "simpo",
}  # fmt: skip
LOOKS = dict(zip(NAMES, model_looks(NAMES.values()).values(), strict=True))


def main() -> None:
    results = pd.read_csv(HERE / "results.csv")
    panels = dict(iter(results.groupby("panel", sort=False)))
    levels = panels["levels"].set_index("series")["value"].to_dict()  # what depends on neither examples nor negatives
    negatives, examples = (panels["negatives"], levels), (panels["examples"], {"zero-shot": levels["zero-shot"]})
    difference = "NDCG@10 minus SFT continued, 95 % intervals"
    save(
        "claim.svg",
        [
            interval_drawing("DMPO, 100 examples", _rows(panels["datasets"]), zero=True, unit=difference),
            interval_drawing("ML-100K, seed 1", _rows(panels["losses"]), zero=True, unit=difference),
        ],
    )
    save(
        "curves.svg",
        [
            Drawing("ML-100K, by number of examples", "", partial(_by, of=examples, unit="examples")),
            Drawing("ML-100K, by number of negatives", "", partial(_by, of=negatives, unit="negatives")),
            Drawing("DMPO's training loss", "", lambda axes: _losses(axes, panels["training"])),
        ],
    )
    steps = {name.removeprefix("steps, "): panel for name, panel in panels.items() if name.startswith("steps")}
    save("objectives.svg", [Drawing(name, "", partial(_steps, panel=panel)) for name, panel in steps.items()])


@drawing()
def save(name: str, drawings: Sequence[Drawing]) -> None:
    """The drawings side by side, on white, as a picture of this folder."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dmpo", "font.family": "sans-serif"}):
        figure = Figure(figsize=(WIDTH * len(drawings), max(drawn.height for drawn in drawings) + 0.5))
        panels = figure.subfigures(1, len(drawings))
        for panel, drawn in zip(panels, drawings, strict=True):
            drawn.draw(panel.subplots())
            panel.axes[0].set_title(drawn.title)
        labels = [panel.axes[0].get_legend_handles_labels()[1] for panel in panels]
        shared = all(found == labels[0] for found in labels)
        for where, found in [(figure, labels[0])] if shared else zip(panels, labels, strict=True):
            if len(found) > 1:
                add_legend(where, len(found) if shared else 3)
        figure.savefig(HERE / name, metadata={"Date": None})


def _rows(panel: pd.DataFrame) -> list[IntervalRow]:
    """A row for each figure, hollow where its interval holds 0."""
    colours = {True: GREY, False: LOOKS["DMPO"].colour}
    return [
        IntervalRow(row.series, row.value, row.low, row.high, colours[row.low <= 0], hollow=row.low <= 0)
        for row in panel.itertuples()
    ]


def _line(axes: Axes, series: str, points: pd.DataFrame) -> None:
    look = LOOKS[series]
    axes.plot(points["x"], points["value"], color=look.colour, marker=look.marker, linestyle=look.dash, label=series)


def _by(axes: Axes, of: tuple[pd.DataFrame, dict[str, float]], unit: str) -> None:
    """A line for each series of a panel over ``x``, and a level for what does not depend on it."""
    panel, levels = of
    for name, points in panel.groupby("series"):
        _line(axes, str(name), points)
    for name, level in sorted(levels.items()):
        look = LOOKS.get(name)
        axes.axhline(level, color=look.colour if look else GREY, linestyle="--" if look else ":", label=name)
    log_ticks(axes, panel["x"])
    axes.set_xlabel(unit)
    axes.set_ylabel("NDCG@10")


def _steps(axes: Axes, panel: pd.DataFrame) -> None:
    for name, points in panel.groupby("series", sort=False):
        _line(axes, str(name), points)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("HR@1 on validation")


def _losses(axes: Axes, panel: pd.DataFrame) -> None:
    for (name, points), colour in zip(panel.groupby("series", sort=False), PALETTE, strict=False):
        axes.plot(points["x"], points["value"], color=colour, label=name)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, from log 2")


if __name__ == "__main__":
    main()
