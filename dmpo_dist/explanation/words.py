"""Tokens joined to the words of a title, and how their numbers are written."""

import math
from collections.abc import Iterable

END = "(end)"
"""Shown for the tokens that end a response."""


def by_word(tokens: Iterable[tuple[str, float]]) -> list[tuple[str, float]]:
    """(text, number) of tokens -> the same of words, numbers summed; what marks the end stays a word of its own."""
    joined: list[tuple[str, float]] = []
    apart = True
    for text, number in tokens:
        word = text.strip()
        if apart or not joined or text == END or text[:1].isspace():
            joined.append((word, number))
        else:
            joined[-1] = joined[-1][0] + word, joined[-1][1] + number
        apart = bool(word) and text[-1:].isspace()  # a space alone goes with the word after it
    return joined


def signed(largest: float) -> str:
    """The format of numbers of which ``largest`` is the largest in size: two decimals, or as many as show it."""
    places = 2 if largest >= 0.1 or not largest else min(6, 1 - math.floor(math.log10(largest)))
    return f"+.{places}f"
