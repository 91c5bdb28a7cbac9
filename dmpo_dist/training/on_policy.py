"""Negatives from the model itself: every so many steps it searches titles for the prompts of the steps to come.

Ranks share the prompts, and what they find is gathered, so that all know the groups of all steps. What is drawn depends
on the weights, the seed, the request and the step, and not on the number of ranks.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist

from dmpo_dist.batching.plan import Schedule
from dmpo_dist.config import OnPolicyConfig
from dmpo_dist.data.negatives import request_stream
from dmpo_dist.data.store import PreparedData
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.trie_search import Beam, BeamRequest
from dmpo_dist.objectives.loss import Loss
from dmpo_dist.training.catalogue import CatalogueGroups, told_apart
from dmpo_dist.training.groups import candidate_columns
from dmpo_dist.training.job import Job

Pair = tuple[int, int]
"""(epoch, index) of a group."""
Search = Callable[[Sequence[BeamRequest]], list[list[Beam]]]
Found = tuple[Pair, "Drawn", TokenGroup, list[Beam]]
"""What was drawn for a group, the group with all titles, and the best titles found."""
AT_ONCE = 64
"""Groups whose catalogue is held at once."""
LIST_LENGTH = 10
"""Of the lists whose distinct titles are counted."""


class Drawn(NamedTuple):
    """What was drawn for a group.

    Attributes:
        titles: columns of the negatives, in the order in which the model ranks them.
        ranks: their ranks among the titles found, from 1; the positive is one of those.
        target: rank of the positive; 0 where the search did not find it.
        found: columns of all titles found, best first, where stored negatives fill up and rewards ask for their ranks;
            () elsewhere.
    """

    titles: list[int]
    ranks: list[int]
    target: int
    found: Sequence[int] = ()


def draw(found: Sequence[Beam], positive: int, skip: int, top: int, count: int, rng: np.random.Generator) -> Drawn:
    """At most ``count`` negatives, drawn among the ``top`` best titles ``found`` after the first ``skip``.

    Args:
        found: titles, the best first.
        positive: its column.
    """
    ranks = {beam.title: rank for rank, beam in enumerate(found, start=1)}
    pool = [beam.title for beam in found if beam.title != positive][skip : skip + top]
    kept = np.sort(rng.choice(len(pool), min(count, len(pool)), replace=False)).tolist()
    titles = [pool[at] for at in kept]
    return Drawn(titles, [ranks[title] for title in titles], ranks.get(positive, 0))


def takes_rewards(loss: Loss) -> bool:
    """Whether ``loss`` is one of rewards, which come with what the model found."""
    return getattr(loss, "takes_rewards", False)


def require_on_policy(job: Job, data: PreparedData) -> None:
    """Whether the model can search the negatives of ``job``, where that is asked for.

    Raises:
        UserError: no catalogue, more beams than titles, or a setting that does not go with it.
    """
    config, settings = job.config, job.config.train.on_policy
    if settings is None:
        if takes_rewards(job.loss):
            raise UserError(
                f"objective.name={config.objective.name} trains on titles that the model finds itself; set "
                "train.on_policy, as in train.on_policy.every=1"
            )
        return
    if data.items is None:
        raise UserError(
            f"train.on_policy searches the catalogue, but {data.path} was made from ready preferences and has none; "
            "leave train.on_policy out, or prepare data that has items"
        )
    if settings.beams > len(data.items):
        raise UserError(
            f"train.on_policy.beams={settings.beams}, but the catalogue of {data.path} has {len(data.items)} titles; "
            "lower train.on_policy.beams and top"
        )
    refused = {
        "reference.cache": (config.reference.cache != "off", "keeps values of stored negatives alone; set it to off"),
        "template.request": (config.template.lists_candidates, "lists {candidates}; take them out"),
        "model.compile": (config.model.compile, "compiles the attention of training; set it to false"),
        "data.levels": (any(data.lists()), "made rows of several positives or levels; prepare the data with none"),
        "objective.margin_weight": (
            getattr(job.loss, "needs_scores", False),
            "needs scores, which titles that the model finds have none of; set it to 0",
        ),
    }
    for key, (does, what) in refused.items():
        if does:
            raise UserError(f"train.on_policy does not go with {key}, which {what}, or leave train.on_policy out")


def rewards_of(target: int, ranks: Sequence[int], always: bool) -> tuple[float, ...]:
    """1 for the positive, -1 / log2(rank + 1) for others of these ``ranks``; 0 for all where it was not found.

    See ``objectives/rank_reward.py``.

    Args:
        target: rank of the positive; 0 where the search did not find it.
        always: give rewards even so.
    """
    if not (target or always):
        return (0.0,) * (1 + len(ranks))
    return (1.0, *(-1 / math.log2(rank + 1) for rank in ranks))


@dataclass
class OnPolicy:
    """The groups of the steps to come, with negatives from the model.

    Attributes:
        settings: of the draws.
        catalogue: the training groups.
        schedule: which groups belong to which step.
        negatives: K of a step.
        seed: of the run.
        searching: opens a search with the weights as they are; all ranks open and close it together.
        rewards: (rank of the positive, ranks of its negatives) -> the rewards of all, for an objective that takes them.
        say: prints a line on rank 0.
        figures: of the latest draw.
        drawn: what was drawn for the groups of the steps to come.
    """

    settings: OnPolicyConfig
    catalogue: CatalogueGroups
    schedule: Schedule
    negatives: int
    seed: int
    searching: Callable[[], AbstractContextManager[Search]]
    rewards: Callable[[int, Sequence[int]], tuple[float, ...]] | None
    say: Callable[[str], None]
    figures: dict[str, float | None] = field(default_factory=dict)
    _seconds: float = 0.0
    _end: int = 0  # of the stretch that was begun last
    drawn: dict[Pair, Drawn] = field(default_factory=dict)
    _groups: dict[Pair, TokenGroup] = field(default_factory=dict)

    def group(self, index: int, epoch: int) -> TokenGroup:
        """Group ``index`` as it is trained on in ``epoch``, once ``begin`` has come to its step."""
        return self._groups[epoch, index]

    def stretches(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """The steps from ``first`` to ``last``, cut where new titles are drawn."""
        every = self.settings.every
        cuts = [first, *range((first // every + 1) * every, last, every), last]
        return pairwise(cuts)

    def begin(self, start: int, end: int) -> None:
        """Get the groups of steps ``start`` to ``end`` ready; all ranks call it.

        Inside of a stretch, where a resumed run begins, they are those that the run before had drawn.

        Raises:
            UserError: on every rank, if a log-prob is not finite.
        """
        began = time.monotonic()
        pairs = self._pairs(start, end)
        own = pairs[dist.get_rank() :: dist.get_world_size()]
        if start % self.settings.every and all(pair in self.drawn for pair in pairs):
            found = [(pair, self.drawn[pair], self.catalogue.whole(pair[1]), []) for pair in own]
        else:
            if start % self.settings.every:
                self.say(f"the titles of steps {start + 1} to {end} are drawn anew: the checkpoint holds others")
            with self.searching() as search:
                found = [of_group for part in _parts(own) for of_group in self._search(part, start, search)]
        self._take([(pair, drawn, self._as_trained(pair, drawn, whole), best) for pair, drawn, whole, best in found])
        self._end = end
        self._seconds += time.monotonic() - began

    def spent(self, elapsed: float) -> dict[str, float | None]:
        """What a log line of ``elapsed`` seconds says of the draws."""
        seconds, self._seconds = self._seconds, 0.0
        return {"refresh_seconds": seconds, "refresh_share": seconds / elapsed, **self.figures}

    def state(self, done: int) -> list[list[Any]]:
        """What was drawn for steps after ``done`` that come before the next draw, JSON; goes into a checkpoint."""
        return [[*pair, *self.drawn[pair]] for pair in self._pairs(done, max(done, self._end))]

    def restore(self, state: Sequence[Sequence[Any]]) -> None:
        """Take up the ``state`` of a checkpoint."""
        self.drawn = {(epoch, index): Drawn(*drawn) for epoch, index, *drawn in state}

    def _pairs(self, start: int, end: int) -> list[Pair]:
        """The groups of steps ``start`` to ``end``."""
        return sorted(
            (self.schedule.epoch_of(step), g) for step in range(start, end) for g in self.schedule.groups(step)
        )

    def _search(self, pairs: Sequence[Pair], start: int, search: Search) -> list[Found]:
        """What the model finds for ``pairs``, and what is drawn of that."""
        catalogue, settings = self.catalogue, self.settings
        wholes = [catalogue.whole(index) for _, index in pairs]
        tries = [catalogue.trie(whole) for whole in wholes]
        requests = []
        for (_, index), whole, trie in zip(pairs, wholes, tries, strict=True):
            allowed = told_apart(catalogue.eligible(index), trie)
            allowed[catalogue.positive(index)] = True  # its rank is told, and a reward may depend on it
            requests.append(BeamRequest(whole.prefix, trie, allowed))
        out = []
        for pair, whole, beams in zip(pairs, wholes, search(requests), strict=True):
            row, positive = catalogue.rows[pair[1]], catalogue.positive(pair[1])
            rng = request_stream(self.seed, row.user, row.timestamp, pair[0], start)
            drawn = draw(beams, positive, settings.skip, settings.top, self.negatives, rng)
            if self.rewards is not None and len(drawn.titles) < self.negatives:
                drawn = drawn._replace(found=[beam.title for beam in beams])
            out.append((pair, drawn, whole, beams[:LIST_LENGTH]))
        return out

    def _as_trained(self, pair: Pair, drawn: Drawn, whole: TokenGroup) -> TokenGroup:
        """The positive with the negatives drawn; stored ones of the epoch that the model reads otherwise fill up."""
        epoch, index = pair
        stored = self.catalogue.rows[index].negatives
        order = candidate_columns(len(stored), len(stored), epoch * self.negatives)[1:]
        more = (self.catalogue.column(stored[column - 1]) for column in order)
        read = {tuple(whole.branches[0]), *(tuple(whole.branches[1 + column]) for column in drawn.titles)}
        fill = [column for column in more if tuple(whole.branches[1 + column]) not in read]
        titles = [*drawn.titles, *fill][: self.negatives]
        group = whole.taking([0, *(1 + column for column in titles)])
        if self.rewards is None:
            return group
        return replace(group, scores=self.rewards(drawn.target, self._ranks(drawn, titles, whole)))

    def _ranks(self, drawn: Drawn, titles: Sequence[int], whole: TokenGroup) -> list[int]:
        """The ranks of ``titles``, by what the model reads; what the search did not find comes after all beams."""
        found = [*enumerate(drawn.found, start=1), *zip(drawn.ranks, drawn.titles, strict=True)]
        ranks = {tuple(whole.branches[1 + column]): rank for rank, column in found}
        return [ranks.get(tuple(whole.branches[1 + column]), self.settings.beams + 1) for column in titles]

    def _take(self, own: list[tuple[Pair, Drawn, TokenGroup, list[Beam]]]) -> None:
        """Gather the groups of all ranks, and what a log line says of them."""
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, own)
        found = [of_group for part in parts for of_group in part]
        if any(not math.isfinite(beam.log_prob) for *_, best in found for beam in best):
            raise UserError(
                "train.on_policy: a log-probability of the titles found is not finite: training diverged, or the "
                "starting model is broken; lower train.learning_rate or train.max_grad_norm, or train in float32"
            )
        self.drawn = {pair: drawn for pair, drawn, *_ in found}
        self._groups = {pair: group for pair, _, group, _ in found}
        lists = [best for *_, best in found if best]
        if not lists:  # a resumed run takes up what was drawn: these are not all groups of that search
            self.figures = {}
            return
        ranks = [drawn.target for drawn in self.drawn.values() if drawn.target]
        self.figures = {
            "drawn_titles": len({title for drawn in self.drawn.values() for title in drawn.titles}),
            "target_found": len(ranks) / len(found),
            "target_rank": float(np.mean(ranks)) if ranks else None,
            "top10_titles": len({beam.title for best in lists for beam in best}),
        }


def _parts(pairs: Sequence[Pair]) -> Iterator[Sequence[Pair]]:
    """``AT_ONCE`` at a time: the titles of the catalogue are held behind as many prompts."""
    return (pairs[start : start + AT_ONCE] for start in range(0, len(pairs), AT_ONCE))
