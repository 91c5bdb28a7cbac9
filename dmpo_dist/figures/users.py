"""One model against another, user by user."""

from collections.abc import Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes

from dmpo_dist.figures.style import PALE, Drawing, short

MOST_BARS = 41


def rank_changes_drawing(
    names: tuple[str, str], ranks: tuple[Sequence[float], Sequence[float]], colours: tuple[str, str]
) -> Drawing:
    """How many ranks each user's target stands higher by the first model than by the second, as counts of users.

    Args:
        names: of the two models.
        ranks: by each, (n_users,) of the same users in one order; 1 is the best.
        colours: of users for whom the first model is better, and of those for whom the second is.
    """
    gained = np.asarray(ranks[1], dtype=float) - np.asarray(ranks[0], dtype=float)
    better, worse = int((gained > 0).sum()), int((gained < 0).sum())
    same = len(gained) - better - worse
    title = f"{names[0]} against {names[1]}, user by user"
    counts = f"higher by {names[0]} for {better} users, by {names[1]} for {worse}, at the same rank for {same}"
    draw = partial(_draw, gained=gained, colours=colours, names=names)
    return Drawing(title, f"{title}: the target stands {counts}", draw, 2.6, f"The target stands {counts}.")


def _draw(axes: Axes, gained: np.ndarray, colours: tuple[str, str], names: tuple[str, str]) -> None:
    """Bars of equal width, the middle one for users whose target does not move."""
    farthest = max(1.0, float(np.abs(gained).max(initial=0)))
    width = max(1, int(np.ceil(2 * farthest / MOST_BARS)))
    bars = np.sign(gained) * np.ceil(np.abs(gained) / width)  # 0 for no change at all, half ranks of ties count as one
    for sign, colour, label in ((0, PALE, "same rank"), (1, colours[0], names[0]), (-1, colours[1], names[1])):
        at, users = np.unique(bars[np.sign(bars) == sign], return_counts=True)
        if len(at):
            label = label if sign == 0 else f"higher by {short(label)}"
            axes.bar(at * width, users, width=0.85 * width, color=colour, label=label)
    axes.axvline(0, color=PALE, linewidth=0.8)
    axes.set_xlabel(f"ranks that the target stands higher by {names[0]}")
    axes.set_ylabel("users")
    axes.margins(y=0.08)
