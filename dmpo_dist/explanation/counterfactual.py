"""The smallest part of a history without which a title would be on the other side of the top n. Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from dmpo_dist.explanation.contributions import Outcomes, Removed, leave_one_out, singles

CUTOFFS = (1, 5, 10, 20)
"""The n of the top n to choose from where none is asked for."""
NAMED = 5
"""Most titles and counts of titles in a sentence."""


@dataclass(frozen=True)
class Counterfactual:
    """A set of history items and the title's rank without them.

    Attributes:
        top: the n of the top n.
        removed: indices of history items, ascending.
        rank_before, rank_after: with the whole history and without ``removed``.
        crosses: whether the title leaves the top n, or enters it where it was outside; where nothing found does,
            ``removed`` is the single item with the largest effect, or nothing.
        smallest: whether no smaller set crosses; after the greedy search that is not known.
    """

    top: int
    removed: tuple[int, ...]
    rank_before: int
    rank_after: int
    crosses: bool
    smallest: bool


def nearest_counterfactual(outcomes: Outcomes, items: int, top: int, budget: int) -> Counterfactual:
    """Search single items, then pairs, then greedily larger sets; at least one item always stays.

    Of several sets of one size the one that moves the title furthest is taken.

    Args:
        outcomes: of the title.
        items: length of the history.
        top: the n of the top n.
        budget: most pairs tried, those with the largest contributions first, and again most sets of the greedy search.
    """
    search = _Search(outcomes, items, top)
    single = search.furthest(singles(items)) if items > 1 else frozenset()
    if search.crosses(single):
        return search.result(single, smallest=True)
    pairs = search.pairs() if items > 2 else []
    pair = search.furthest(pairs[:budget]) if pairs[:budget] else single
    if search.crosses(pair):
        return search.result(pair, smallest=True)
    larger = search.greedily(pair, budget)
    if search.crosses(larger):
        return search.result(larger, smallest=len(larger) == 3 and len(pairs) <= budget)
    return search.result(single if search.moves(single) else frozenset(), smallest=False)


def usual_top(rank: int, candidates: int) -> int:
    """The first of ``CUTOFFS`` that holds ``rank``, or the largest; all below ``candidates``, which are two or more."""
    possible = [n for n in CUTOFFS if n < candidates]
    return next((n for n in possible if rank <= n), possible[-1])


def sentence(found: Counterfactual, titles: Sequence[str]) -> str:
    """``found`` in words; ``titles`` are those of the history."""
    if found.crosses:
        doubt = "" if found.smallest else " (found step by step; a smaller set may do the same)"
        return f"Without {_listed([titles[i] for i in found.removed])} it {_move(found)}{doubt}."
    if len(titles) < 2:  # at least one title stays
        return (
            "The history is a single title: there is no smaller part of it to look for."
            if titles
            else "The history is empty."
        )
    falls = found.rank_before <= found.top
    place = f"the top {found.top}" if found.top > 1 else "first place"
    nothing = f"No removal that was tried {'takes it from' if falls else 'brings it into'} {place}"
    if not found.removed:
        rest = (" or rises" if found.rank_before > 1 else "") if falls else " or falls"
        return f"{nothing}; without any single item it stays at rank {found.rank_before}{rest}."
    without = _listed([titles[i] for i in found.removed])
    return f"{nothing}; without {without} it {_move(found)}, the most a single item does."


def _move(found: Counterfactual) -> str:
    verb = "falls" if found.rank_after > found.rank_before else "rises"
    return f"{verb} from rank {found.rank_before} to {found.rank_after}"


def _listed(titles: Sequence[str]) -> str:
    quoted = [f"'{title}'" for title in titles]
    if len(quoted) > NAMED:
        quoted = [*quoted[: NAMED - 1], f"{len(quoted) - NAMED + 1} more"]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"


class _Search:
    """Sets compared by how far they move the title towards the other side of the top n."""

    def __init__(self, outcomes: Outcomes, items: int, top: int) -> None:
        self._outcomes, self._items, self._top = outcomes, items, top
        self.before = int(outcomes.ranks([frozenset()])[0])
        self._sign = 1 if self.before <= top else -1  # 1: is to fall

    def crosses(self, removed: Removed) -> bool:
        return (self._rank(removed) <= self._top) != (self.before <= self._top)

    def moves(self, removed: Removed) -> bool:
        """Whether the title's rank goes towards the other side at all."""
        return self._sign * (self._rank(removed) - self.before) > 0

    def furthest(self, sets: Sequence[Removed]) -> Removed:
        """By rank, and among equal ranks by value."""
        ranks, values = self._outcomes.ranks(sets), self._outcomes.values(sets)
        best = max(range(len(sets)), key=lambda i: (self._sign * ranks[i], -self._sign * values[i]))
        return sets[best]

    def pairs(self) -> list[Removed]:
        """All pairs, those whose members move the title most by themselves first."""
        effect = self._sign * leave_one_out(self._outcomes.values, self._items)
        return [
            frozenset(pair)
            for pair in sorted(combinations(range(self._items), 2), key=lambda p: -(effect[p[0]] + effect[p[1]]))
        ]

    def greedily(self, start: Removed, budget: int) -> Removed:
        """``start`` and one item after another until it crosses or ``budget`` is spent, always what moves furthest.

        Then items that turn out not to be needed are put back.
        """
        chosen, spent = start, 0
        while not self.crosses(chosen) and len(chosen) < self._items - 1:
            wider = [chosen | {i} for i in range(self._items) if i not in chosen]
            spent += len(wider)
            if spent > budget:
                return chosen
            chosen = self.furthest(wider)
        while self.crosses(chosen) and len(chosen) > 1:
            narrower = self.furthest([chosen - {i} for i in sorted(chosen)])
            if not self.crosses(narrower):
                break
            chosen = narrower
        return chosen

    def result(self, removed: Removed, smallest: bool) -> Counterfactual:
        return Counterfactual(
            self._top, tuple(sorted(removed)), self.before, self._rank(removed), self.crosses(removed), smallest
        )

    def _rank(self, removed: Removed) -> int:
        return int(self._outcomes.ranks([removed])[0])
