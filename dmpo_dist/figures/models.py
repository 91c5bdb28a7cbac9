"""The look of each model: a model keeps its colour in every figure, on a page and in PNG files."""

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping

from dmpo_dist.figures.style import (
    BLACK,
    BLUE,
    BROWN,
    CYAN,
    DASHES,
    GREEN,
    GREY,
    INDIGO,
    MARKERS,
    OLIVE,
    ORANGE,
    PALE,
    ROSE,
    WINE,
    Look,
)  # fmt: skip

METHODS = {
    "dmpo": BLUE, "dmpo_likelihood": INDIGO, "dmpo_released": CYAN, "sdpo": GREEN, "dpo": ROSE, "dpo_pairs": ROSE,
    "sft": ORANGE, "sft_continued": WINE, "sft_continued_compute": WINE, "untuned": PALE, "zero_shot": PALE,
    "oracle": BLACK, "random": PALE, "popularity": GREY, "pop_fitted": GREY, "item_knn": GREY, "ease": GREY,
    "sasrec": GREY, "bert4rec": GREY,
}  # fmt: skip
"""Colours of the names that methods and baselines have in tables; ``dmpo-2`` and ``dmpo, K=3`` have that of dmpo."""
FREE = (BROWN, OLIVE, CYAN)
"""For names that are no method's, then the others."""
OTHERS = (INDIGO, ROSE, WINE, GREEN, ORANGE, BLUE)


def model_look(name: str) -> Look:
    """The look of a model that is drawn alone."""
    return model_looks([name])[name]


def model_looks(names: Iterable[str]) -> dict[str, Look]:
    """A look for each model of a page or a figure; see ``looks_of``."""
    return looks_of({name: name for name in names})


def looks_of(models: Mapping[str, str]) -> dict[str, Look]:
    """Name of a series -> its look.

    The name of a method decides the colour alone, in every figure and file. Any other name prefers a colour by its
    letters and takes another where that is in use by more models, so figures of one page are given all names at once.
    Series of one colour differ in markers and dashes.

    Args:
        models: name of a series -> the model that it shows, such as a run and the name of its model in tables.
    """
    used: Counter[str] = Counter()
    colours: dict[str, str] = {}
    for model in dict.fromkeys(models.values()):
        colours[model] = _method_colour(model) or _free_colour(model, used)
        used[colours[model]] += 1
    drawn: Counter[str] = Counter()
    looks = {}
    for name, model in models.items():
        colour = colours[model]
        count = drawn[colour]
        looks[name] = Look(colour, MARKERS[count % len(MARKERS)], DASHES[count % len(DASHES)])
        drawn[colour] += 1
    return looks


def model_of_run(folder: str, objective: str, likelihood: bool) -> str:
    """The model that a run makes: the name of its folder where that is a method's, else that of its objective.

    Args:
        objective: its name, ``sft`` for SFT.
        likelihood: whether the objective has a likelihood term.
    """
    if _method_colour(folder):
        return folder
    named = f"{objective}_likelihood"
    return named if likelihood and named in METHODS else objective


def _method_colour(model: str) -> str | None:
    """The colour of the method whose name ``model`` is or begins with; the folders before it do not count."""
    name = model.rpartition("/")[2]
    found = [method for method in METHODS if re.match(rf"{method}(?![A-Za-z_])", name)]
    return METHODS[max(found, key=len)] if found else None


def _free_colour(model: str, used: Counter[str]) -> str:
    """The colour that fewest models have, first the one that the name prefers."""
    first = zlib.crc32(model.encode("utf-8", errors="replace")) % len(FREE)
    return min([*FREE[first:], *FREE[:first], *OTHERS], key=used.__getitem__)
