"""What is to be explained: a user's history, the titles to choose from, and the one asked about."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dmpo_dist.data.matching import TitleLookup
from dmpo_dist.data.requests import Catalogue, RankingRequest
from dmpo_dist.data.store import PreparedData
from dmpo_dist.errors import UserError


@dataclass(frozen=True)
class Question:
    """Why is a title at its rank for a user?

    Attributes:
        user: of the request.
        history: titles, oldest first.
        history_items: their item ids; the titles themselves where there are none.
        candidates: distinct titles that are ranked.
        candidate_items: their item ids, likewise.
        item: index of the explained title among the candidates; None for the one ranked first.
        timestamp: of the request, 0 where there is none; it decides in which order a prompt lists candidates.
    """

    user: str
    history: tuple[str, ...]
    history_items: tuple[str, ...]
    candidates: tuple[str, ...]
    candidate_items: tuple[str, ...]
    item: int | None
    timestamp: int = 0


def questions_of_data(
    data: PreparedData, indices: Sequence[int], catalogue: Catalogue | None, exclude_taken: bool = True
) -> list[Question]:
    """Test requests of ``data`` and their positives.

    Args:
        indices: which test requests, see ``indices_of_user`` and ``sampled``.
        catalogue: rank among its titles; None for the request's own candidates.
        exclude_taken: leave the catalogue's titles out that the user took before.

    Raises:
        UserError: rows that are finished prompts without a history.
    """
    rows = data.test.select(indices).to_list()
    if any(row["prompt"] is not None for row in rows):
        raise UserError(
            f"{data.path} was made from ready preferences: their prompts are finished texts without a list of history "
            "items, so there is nothing to leave out; give --requests with the columns user, history and candidates"
        )
    questions = [_of_row(row) for row in rows]
    if catalogue is None:
        return questions
    return [
        _among(question, catalogue, data, _taken(row, data) if exclude_taken else set())
        for question, row in zip(questions, rows, strict=True)
    ]


def questions_of_requests(
    requests: Sequence[RankingRequest], catalogue: Catalogue | None, exclude_taken: bool = True
) -> list[Question]:
    """Requests as ``dmpo rank`` reads them; each is about the title ranked first until ``asked`` names one.

    Args:
        catalogue: what requests without candidates choose from.
        exclude_taken: leave the catalogue's titles out that are in the history.

    Raises:
        UserError: a request without candidates and no catalogue, or with fewer than two candidates.
    """
    out = []
    item_of = dict(zip(catalogue.titles, catalogue.ids, strict=True)) if catalogue and catalogue.ids else {}
    for request in requests:
        if request.candidates is None and catalogue is None:
            raise UserError(
                "--requests has no column 'candidates': give --catalogue a file with a column title, or prepared data"
            )
        taken = set(request.history) if exclude_taken else set()
        candidates = request.candidates or tuple(t for t in catalogue.titles if t not in taken)  # pyrefly: ignore
        if len(candidates) < 2:
            raise UserError(
                f"--requests: user {request.user!r} has fewer than two titles to choose from ({len(candidates)}), so "
                "there is no ranking to explain; give more candidates"
            )
        history_items, items = (
            tuple(item_of.get(title, title) for title in titles) for titles in (request.history, candidates)
        )
        out.append(Question(request.user, request.history, history_items, candidates, items, None))
    return out


def among(question: Question, indices: Sequence[int]) -> Question:
    """``question``, whose item is known, with no candidates but those at ``indices``, the item's one of them."""
    return replace(
        question,
        candidates=tuple(question.candidates[index] for index in indices),
        candidate_items=tuple(question.candidate_items[index] for index in indices),
        item=list(indices).index(question.item),  # pyrefly: ignore
    )


def indices_of_user(user: str, users: Sequence[str], where: str) -> list[int]:
    """The indices of ``user`` among ``users``, those of the requests in ``where``.

    Raises:
        UserError: there is none (names the nearest).
    """
    indices = [index for index, one in enumerate(users) if one == user]
    if indices:
        return indices
    distinct = list(dict.fromkeys(users))
    raise UserError(
        f"--user {user}: not among the {len(distinct)} users of {where}, such as {', '.join(distinct[:5])}"
        f"{_nearest(user, distinct, '; the nearest name is')}"
    )


def sampled(count: int, total: int, seed: int) -> list[int]:
    """A seeded sample of at most ``count`` of ``total`` indices, ascending."""
    if count >= total:
        return list(range(total))
    return np.sort(np.random.default_rng(seed).choice(total, count, replace=False)).tolist()


def asked(question: Question, wanted: str, titles: dict[str, str]) -> Question:
    """``question`` about another title.

    Args:
        wanted: a title, whatever its case, or an item id.
        titles: item id -> title of everything known, candidates or not.

    Raises:
        UserError: there is no such item (names the nearest title), it is a title and the id of another item, or it is
            not among the candidates.
    """
    known = titles | dict(zip(question.candidate_items, question.candidates, strict=True))
    title = TitleLookup(Catalogue((*known.values(),), None, (*known,))).title(wanted)
    if title is None:
        either = (*question.candidates, *known.values())
        title = next((one for one in either if one.lower() == wanted.lower()), None)
    if title in question.candidates:
        return replace(question, item=question.candidates.index(title))
    if title is None:
        everything = [*titles.values(), *question.candidates]
        inside = [one for one in everything if wanted.lower() in one.lower()]
        advice = (
            f", the nearest is {min(inside, key=len)!r}" if inside else _nearest(wanted, everything, ", the nearest is")
        )
        raise UserError(f"--item {wanted!r}: no such title or item id{advice}")
    if title in question.history:
        raise UserError(
            f"--item {wanted!r}: user {question.user!r} has it in the history already, so it is not among the titles "
            "ranked; choose another"
        )
    few = ", ".join(repr(one) for one in question.candidates[:5])
    raise UserError(
        f"--item {wanted!r}: {title!r} is not among the {len(question.candidates)} candidates of user "
        f"{question.user!r}; choose one of them ({few} ...), or give --catalogue to rank among all titles the user has "
        "not taken"
    )


def _of_row(row: dict[str, Any]) -> Question:
    return Question(
        user=row["user"],
        history=tuple(row["history"]),
        history_items=tuple(row["history_items"]),
        candidates=(row["positive"], *row["negatives"]),
        candidate_items=(row["positive_item"], *row["negative_items"]),
        item=0,
        timestamp=row["timestamp"],
    )


def _taken(row: dict[str, Any], data: PreparedData) -> set[str]:
    """Items that the row's user took before its request."""
    taken = set(row["history_items"])
    if data.interactions is not None:
        log = data.interactions
        taken |= set(log[(log["user"] == row["user"]) & (log["timestamp"] < row["timestamp"])]["item"])
    return taken


def _among(question: Question, catalogue: Catalogue, data: PreparedData, taken: set[str]) -> Question:
    """``question`` with the catalogue's titles as candidates but those ``taken``, the positive first."""
    assert data.items is not None  # only ready preferences have none
    item_of = dict(zip(data.items["title"], data.items["item"], strict=True))
    item_of |= dict(zip(catalogue.titles, catalogue.ids or (), strict=False))
    positive, item = question.candidates[0], question.candidate_items[0]
    others = [t for t in catalogue.titles if t != positive and item_of.get(t, t) not in (taken | {item})]
    items = (item, *(item_of.get(title, title) for title in others))
    return replace(question, candidates=(positive, *others), candidate_items=items)


def _nearest(wanted: str, known: Sequence[str], introduction: str) -> str:
    lower = {one.lower(): one for one in known}
    near = difflib.get_close_matches(wanted.lower(), lower, n=1, cutoff=0.5)
    return f"{introduction} {lower[near[0]]!r}" if near else ""
