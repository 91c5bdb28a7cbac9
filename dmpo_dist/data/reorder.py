"""Training groups whose users' titles come in a new order in every epoch."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dmpo_dist.data.schema import PreferenceGroup
from dmpo_dist.errors import UserError


class ReorderedGroups:
    """The groups of some users under a random order of each user's titles: ``(index, epoch) -> PreferenceGroup``.

    A user's titles are those of all their groups' histories and positives. In each epoch they are permuted anew, the last
    ones become the positives of the user's groups, and what stands before a positive its history, as long as the longest
    history of all groups. So every title comes to be asked for, after any of the others. Negatives are left out: they
    belong to the old positives.

    A group depends on its index, the epoch and the seed alone, so that ranks agree and a resumed run goes on alike.

    Raises:
        UserError: a group with a finished prompt, which has no titles to reorder.
    """

    def __init__(self, groups: Sequence[PreferenceGroup], seed: int) -> None:
        self._groups, self._seed = groups, seed
        self._longest = max((len(group.history) for group in groups), default=0)
        self._place: dict[int, int] = {}
        by_user: defaultdict[str, list[int]] = defaultdict(list)
        for index, group in enumerate(groups):
            if group.prompt is not None:
                raise UserError(
                    "sft.history_order=shuffled needs histories, but the data holds finished prompts; set "
                    "sft.history_order=given"
                )
            by_user[group.user].append(index)
        self._titles = {}
        for user, members in by_user.items():
            titles = dict.fromkeys(title for i in members for title in (*groups[i].history, groups[i].positive))
            self._titles[user] = list(titles)
            first = len(titles) - len(members)
            self._place |= {index: first + number for number, index in enumerate(members)}
        self._numbers = {user: number for number, user in enumerate(by_user)}

    def __call__(self, index: int, epoch: int) -> PreferenceGroup:
        group = self._groups[index]
        titles, place = self._titles[group.user], self._place[index]
        order = np.random.default_rng([self._seed, epoch, self._numbers[group.user]]).permutation(len(titles))
        shuffled = [titles[i] for i in order[max(0, place - self._longest) : place + 1]]
        return replace(group, history=tuple(shuffled[:-1]), positive=shuffled[-1], negatives=())
