"""Requests against a catalogue: ids and titles are looked up, and what is in neither is named before any work."""

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from dmpo_dist.data.requests import NAMED, Catalogue, RankingRequest
from dmpo_dist.data.splits import likes
from dmpo_dist.data.store import PreparedData
from dmpo_dist.errors import UserError

TAKEN_AS_TITLES = "no catalogue, so histories and candidates are taken as titles, as they stand"
IN_FILES = "correct them (in a CSV write | within a title as \\|), or keep them as they are by --keep-unknown"


@dataclass(frozen=True)
class TitleLookup:
    """Finds the titles of a catalogue by title or item id."""

    catalogue: Catalogue

    @cached_property
    def _titles(self) -> set[str]:
        return set(self.catalogue.titles)

    @cached_property
    def _title_of_id(self) -> Mapping[str, str]:
        return dict(zip(self.catalogue.ids or (), self.catalogue.titles, strict=False))

    def title(self, named: str) -> str | None:
        """The title that is, or whose item id is, ``named``; None where there is neither.

        Raises:
            UserError: it is a title, and the id of another item.
        """
        of_id = self._title_of_id.get(named)
        if named not in self._titles:
            return of_id
        if of_id not in (None, named):
            own = (self.catalogue.ids or ())[self.catalogue.titles.index(named)]
            raise UserError(
                f"{named!r} is a title, and the id of another item, {of_id!r}: write {own!r}, the title's own id, or "
                f"{of_id!r}"
            )
        return named

    def nearest(self, named: str) -> str:
        """A remark that names the nearest title, or "" where none is near."""
        lower = {title.lower(): title for title in self.catalogue.titles}
        inside = [title for low, title in lower.items() if named.lower() in low]
        near = difflib.get_close_matches(named.lower(), lower, n=1, cutoff=0.5)
        if inside or near:
            return f" (nearest: {min(inside, key=len) if inside else lower[near[0]]!r})"
        return ""


def matched(
    requests: Sequence[RankingRequest],
    catalogue: Catalogue,
    where: str,
    keep_unknown: bool = False,
    advice: str = IN_FILES,
) -> list[RankingRequest]:
    """``requests`` with the titles of their histories and candidates, each of which may be given as an item id.

    Candidates that the catalogue does not have stay as they are: see ``check_against``.

    Args:
        where: the file or option they come from, for the message of an error.
        keep_unknown: leave what the catalogue does not have in histories as it is.
        advice: how the message of an error ends.

    Raises:
        UserError: a title or id of a history is not in the catalogue (names the nearest titles), a name means two
            items, or two candidates are one item.
    """
    lookup, unknown, out = TitleLookup(catalogue), [], []
    for request in requests:
        history = [lookup.title(named) for named in request.history]
        unknown += [
            f"{named!r} of user {request.user!r}{lookup.nearest(named) if len(unknown) < NAMED else ''}"
            for named, title in zip(request.history, history, strict=True)
            if title is None
        ]
        candidates = request.candidates and tuple(lookup.title(named) or named for named in request.candidates)
        if candidates and len(set(candidates)) < len(candidates):
            title = Counter(candidates).most_common(1)[0][0]
            raise UserError(
                f"{where}: user {request.user!r} has the candidate {title!r} twice, as title or id; keep one"
            )
        titles = tuple(title or named for title, named in zip(history, request.history, strict=True))
        out.append(replace(request, history=titles, candidates=candidates))
    if unknown and not keep_unknown:
        more = f" and {len(unknown) - NAMED} more" if len(unknown) > NAMED else ""
        raise UserError(
            f"{where}: {len(unknown)} titles or ids of histories are not in the catalogue: "
            f"{', '.join(unknown[:NAMED])}{more}; {advice}"
        )
    return out


def with_taken_by_id(requests: Sequence[RankingRequest], catalogue: Catalogue) -> list[RankingRequest]:
    """``requests`` whose users also took what ``catalogue`` calls by their item ids, however it writes the titles."""
    title_of = dict(zip(catalogue.ids or (), catalogue.titles, strict=False))
    out = []
    for request in requests:
        named = {title_of[item] for item in request.taken_items if item in title_of}
        taken = sorted({*request.taken, *named}.difference(request.history))
        out.append(replace(request, taken=tuple(taken)))
    return out


def requests_of_data(data: PreparedData, users: Sequence[str] | None = None) -> list[RankingRequest]:
    """Requests for users of prepared data, after all of their latest likes; ``taken`` is all else that they took.

    Args:
        users: None for all.

    Raises:
        UserError: the data was made from ready preferences, or a user is not in it or likes nothing.
    """
    if data.items is None or data.interactions is None:
        raise UserError(f"{data.path} was made from ready preferences and has no users; give histories instead")
    threshold, longest = data.card.config["rating_threshold"], data.card.config["max_history"]
    liked = likes(data.interactions, threshold).sort_values(["timestamp", "item"], kind="stable")
    title_of = dict(zip(data.items["item"], data.items["title"], strict=True))
    histories = liked["item"].map(title_of).groupby(liked["user"]).agg(list)
    taken = data.interactions.groupby("user")["item"].agg(set)
    wanted = sorted(histories.index) if users is None else list(users)
    missing = [name for name in wanted if name not in histories.index]
    if missing:
        known = ", ".join(map(str, histories.index[:5]))
        raise UserError(
            f"user {missing[0]!r} has no like in {data.path}, whose users are such as {known}; correct the name"
        )
    requests = []
    for user in dict.fromkeys(wanted):
        history = histories[user][-longest:]
        titles = {title_of[item] for item in taken[user]}.difference(history)
        requests.append(RankingRequest(user, tuple(history), None, tuple(sorted(titles)), tuple(sorted(taken[user]))))
    return requests
