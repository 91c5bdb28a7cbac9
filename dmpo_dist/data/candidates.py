"""Prompts that list the candidates: the order of such a list, and where the positive stands in it."""

from collections.abc import Iterable, Sequence
from hashlib import blake2b

from dmpo_dist.config import TemplateConfig
from dmpo_dist.data.schema import PreferenceGroup
from dmpo_dist.data.store import PreparedData
from dmpo_dist.data.template import Template
from dmpo_dist.errors import UserError


def list_order(titles: Iterable[str], seed: int, user: str, timestamp: int, draw: int) -> tuple[str, ...]:
    """Distinct ``titles`` in the order in which a prompt lists them, a function of the arguments alone.

    Titles are sorted by a hash of all of it. So each order is equally likely, and the order in which titles are given,
    of which the positive is usually the first, has no part in it.

    Args:
        draw: epoch in training, else the number of the order where several are drawn for a request.
    """
    request = f"{seed}\0{user}\0{timestamp}\0{draw}\0"
    return tuple(sorted(dict.fromkeys(titles), key=lambda title: blake2b(f"{request}{title}".encode()).digest()))


def lists_as_stored(data: PreparedData) -> bool:
    """Whether rows came with a list of candidates that belongs to the prompt, as S-DPO's ``itemList`` does."""
    return data.card.config.get("source", {}).get("kind") == "sdpo"


def place_of(group: PreferenceGroup, listed: Iterable[str], seed: int, draw: int) -> tuple[int, int]:
    """(Place from 0 of the positive of ``group``, length) of the list that its prompt shows of ``listed``."""
    order = list_order(listed, seed, group.user, group.timestamp, draw)
    return order.index(group.positive), len(order)


def balance_line(places: Sequence[tuple[int, int]]) -> str:
    """A sentence on where positives stand in the lists of prompts.

    Args:
        places: (place of the positive from 0, length of the list) of each.
    """
    count = len(places)
    first, last = sum(place == 0 for place, _ in places), sum(place == size - 1 for place, size in places)
    middle = sum((place + 0.5) / size for place, size in places)
    chance = sum(1 / size for _, size in places)
    return (
        f"in {count} lists of candidates the positive stands first in {first / count:.1%} and last in "
        f"{last / count:.1%} ({chance / count:.1%} by chance), on average {middle / count:.3f} of the way down "
        "(.500 by chance)"
    )


def require_no_finished_prompts(template: TemplateConfig | Template, prompts: Iterable[str | None], where: str) -> None:
    """Raise UserError where ``template`` lists candidates and a row of ``where`` has a finished prompt."""
    if template.lists_candidates and any(prompt is not None for prompt in prompts):
        raise UserError(
            f"template.request lists {{candidates}}, but {where} holds finished prompts, to which no list can be "
            "added; take {candidates} out of template.request, or prepare data that has histories"
        )


def require_given_candidates(template: TemplateConfig | Template, model: str, how: str) -> None:
    """Raise UserError where ``template`` lists candidates and a whole catalogue is to be ranked, which no prompt holds.

    Args:
        model: whose template it is.
        how: what asked for the whole catalogue, and what to do instead.
    """
    if template.lists_candidates:
        raise UserError(
            f"{model} has a template that lists the {{candidates}} in the prompt, where a whole catalogue has no room: "
            f"{how}"
        )
