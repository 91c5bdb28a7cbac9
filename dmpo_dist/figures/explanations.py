"""Deletion curves and their areas in one picture."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dmpo_dist.figures.curves import BLUE, GREEN, GREY, ORANGE

CURVES = {
    "attribution": ("largest contribution first", BLUE, "-"),
    "recent": ("most recent first", GREEN, "--"),
    "random": ("random order", GREY, "-"),
    "inverse": ("smallest contribution first", ORANGE, "-."),
}
AREAS = {
    "attribution_vs_random": ("contributions\nagainst random", BLUE),
    "attribution_vs_random_after_first": ("the same without\nthe first step", BLUE),
    "attribution_vs_recent": ("contributions\nagainst recent", BLUE),
    "recent_vs_random": ("recent\nagainst random", GREEN),
    "inverse_vs_random": ("inverse order\nagainst random", ORANGE),
}


def plot_faithfulness(result: dict[str, Any], output: Path) -> None:
    """Draw what ``faithfulness.summarise`` returns.

    Args:
        result: with ``value``, what the curves show.
        output: the PNG; its folder exists.
    """
    figure = Figure(figsize=(10.5, 4.4), dpi=160, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.35, 1])
    _curves(left, result)
    _areas(right, result)
    figure.savefig(output, format="png")


def _curves(axes: Axes, result: dict[str, Any]) -> None:
    share = [100 * x for x in result["curves"]["share_removed"]]
    for name, (label, colour, style) in CURVES.items():
        axes.plot(share, result["curves"][name], style, color=colour, label=label, linewidth=1.8)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_title("History items taken away one after another", fontsize=10, loc="left")
    axes.set_xlabel("% of the history removed (the last item stays)", fontsize=9)
    axes.set_ylabel(f"change in nats of the title's\n{result['value']}", fontsize=9)
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    _plain(axes)


def _areas(axes: Axes, result: dict[str, Any]) -> None:
    shown = {name: of_name for name, of_name in AREAS.items() if name in result["areas"]}
    for place, (name, (_, colour)) in enumerate(shown.items()):
        area = result["areas"][name]
        axes.plot([area["low"], area["high"]], [place, place], color=colour, linewidth=2.2)
        axes.plot(area["area"], place, "o", color=colour)
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set_yticks(range(len(shown)), [label for label, _ in shown.values()], fontsize=8)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_title(f"Area between curves, {result['users']} users", fontsize=10, loc="left")
    axes.set_xlabel("nats, 95 % interval; above 0: pulls down faster", fontsize=9)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.tick_params(labelsize=8)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
