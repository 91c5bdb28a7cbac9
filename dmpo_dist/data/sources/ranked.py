"""Responses in levels in a user's rows: ``ranked``, a list of levels, best first, each a list of responses."""

import math
from dataclasses import dataclass
from typing import Any

from dmpo_dist.data.sources.conversations import only_message
from dmpo_dist.data.sources.rowfiles import shorten
from dmpo_dist.data.titles import as_in_data
from dmpo_dist.errors import UserError

FORM = 'a list of levels, best first, each a list of responses, as in [["a"], ["b", "c"]]'


@dataclass(frozen=True)
class RankedResponses:
    """The responses of a row, level by level.

    Attributes:
        responses: distinct texts.
        levels: of each, 0 the best; () for one best response against one level, which are a positive and its negatives.
        scores: of each; () where the row has none.
    """

    responses: tuple[str, ...]
    levels: tuple[int, ...]
    scores: tuple[float, ...]


def ranked_of(row: dict[str, Any], where: str) -> RankedResponses:
    """``row["ranked"]`` and, if any, ``row["scores"]``; titles are decoded where there is a history.

    Raises:
        UserError: not a list of lists of texts, one level, an empty one, a response that stands twice, or scores of
            another form or not above 0.
    """
    ranked, titles = row["ranked"], row.get("prompt") is None
    if not isinstance(ranked, list) or not all(isinstance(level, list) for level in ranked):
        raise UserError(f"{where}: 'ranked' is {shorten(ranked)}; it must be {FORM}")
    if len(ranked) < 2:
        raise UserError(f"{where}: 'ranked' has {len(ranked)} of the two or more levels that make a preference")
    levels: dict[str, int] = {}
    for number, level in enumerate(ranked):
        if not level:
            raise UserError(f"{where}: level {number + 1} of 'ranked' is empty; remove it")
        for value in level:
            response = _text(only_message(value, "assistant", "ranked", where), titles, where)
            if response in levels:
                at = levels[response] + 1
                stands = "twice in" if at == number + 1 else f"in level {at} and in"
                raise UserError(
                    f"{where}: {shorten(response)} stands {stands} level {number + 1} of 'ranked'; keep it once"
                )
            levels[response] = number
    plain = len(ranked) == 2 and len(ranked[0]) == 1
    return RankedResponses(tuple(levels), () if plain else tuple(levels.values()), _scores(row, ranked, where))


def history_of(row: dict[str, Any], where: str) -> tuple[str, ...]:
    """The titles of ``row["history"]``, oldest first.

    Raises:
        UserError: there is neither a prompt nor a history, or it is no list of titles.
    """
    history = row.get("history")
    if not isinstance(history, list) or not history:
        raise UserError(
            f"{where}: 'ranked' without a prompt; write a finished 'prompt', or 'history', a list of titles for the "
            "template"
        )
    return tuple(_text(title, True, where, "history") for title in history)


def _text(value: Any, title: bool, where: str, key: str = "ranked") -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {key!r} holds {shorten(value)}; each of it must be a text")
    return as_in_data(value) if title else value


def _scores(row: dict[str, Any], ranked: list[list[Any]], where: str) -> tuple[float, ...]:
    """How much each response is preferred, level by level; () where the row does not say."""
    given = row.get("scores")
    if given is None:
        return ()
    form = [len(level) if isinstance(level, list) else None for level in given] if isinstance(given, list) else None
    if form != [len(level) for level in ranked]:
        raise UserError(f"{where}: 'scores' is {shorten(given)}; it must hold a number for each response of 'ranked'")
    flat = [score for level in given for score in level]
    for score in flat:
        number = not isinstance(score, bool) and isinstance(score, int | float)
        if not number or not math.isfinite(score) or score <= 0:
            raise UserError(f"{where}: 'scores' holds {shorten(score)}; scores are numbers above 0")
    return tuple(map(float, flat))
