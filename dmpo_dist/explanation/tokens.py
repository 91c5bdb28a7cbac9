"""A title token by token: which of its characters a token stands for, and numbers summed over the parts of a title."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dmpo_dist.explanation.words import END


@dataclass(frozen=True)
class Piece:
    """A readable part of a response and the tokens, counted from the first scored one, that stand for it."""

    text: str
    tokens: slice


def readable_pieces(text: str, spans: Sequence[tuple[int, int]], start: int, end: int) -> list[Piece]:
    """Divide ``text[start:end]`` among tokens; joined, the pieces but ``END`` are that text again.

    A token that adds no whole character, as where several bytes spell one, belongs to the piece before it; one that
    lies in the prompt, as after a merge over the boundary, to the piece behind it.

    Args:
        text: prompt and response.
        spans: for each scored token the characters of ``text`` that it covers, as a fast tokenizer gives them.
        start, end: where the response begins and where its terminator does.
    """
    pieces: list[Piece] = []
    done, first, ended = start, 0, False
    for index, (_, stop) in enumerate(spans):
        piece = text[done : min(stop, end)]
        ends = stop > end and not piece and not ended
        if piece or ends:
            pieces.append(Piece(piece or END, slice(first, index + 1)))
        elif pieces:
            pieces[-1] = Piece(pieces[-1].text, slice(pieces[-1].tokens.start, index + 1))
        if pieces:
            first = index + 1
        done, ended = max(done, min(stop, end)), ended or ends
    return pieces


def sum_pieces(pieces: Sequence[Piece], of_tokens: np.ndarray) -> np.ndarray:
    """(N,) numbers of the tokens -> (pieces,) sums; their total is that of all tokens."""
    return np.array([of_tokens[piece.tokens].sum() for piece in pieces])
