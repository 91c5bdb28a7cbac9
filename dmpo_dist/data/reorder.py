"""Training groups whose histories are put into a new random order in every epoch."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from dmpo_dist.data.schema import PreferenceGroup
from dmpo_dist.errors import UserError


class ReorderedGroups:
    """The groups of some users under a random order of each user's titles: ``(index, epoch) -> PreferenceGroup``.

    A user's titles are those of the histories and positives of all their groups. Each epoch permutes them. The last
    ones become the positives of the user's groups. The titles before a positive become its history, which is at most
    as long as the longest history of the given groups. So over the epochs every title becomes a positive, after any of
    the others. The groups have no negatives, as those given belong to other positives.

    A group depends on its index, the epoch and the seed alone, so that all ranks and a resumed run see the same groups.
    """

    def __init__(self, groups: Sequence[PreferenceGroup], seed: Sequence[int]) -> None:
        self._seed = tuple(seed)
        self._longest = max((len(group.history) for group in groups), default=0)
        self._users = [group.user for group in groups]
        self._timestamps = [group.timestamp for group in groups]
        self._positions = [0] * len(groups)  # of each group's positive in the permutation of its user's titles
        self._titles: dict[str, list[str]] = {}
        self._positives = {(group.user, group.positive) for group in groups}
        members: defaultdict[str, list[int]] = defaultdict(list)
        for index, user in enumerate(self._users):
            members[user].append(index)
        for user, indices in members.items():
            titles = dict.fromkeys(t for i in indices for t in (*groups[i].history, groups[i].positive))
            first = len(titles) - len(indices)
            assert first >= 0, "nobody takes a title twice"
            self._titles[user] = list(titles)
            for number, index in enumerate(indices):
                self._positions[index] = first + number
        self._numbers = {user: number for number, user in enumerate(members, start=1)}

    def __len__(self) -> int:
        return len(self._users)

    def __call__(self, index: int, epoch: int) -> PreferenceGroup:
        user, position = self._users[index], self._positions[index]
        titles = self._titles[user]
        # One permutation for each user and epoch: all groups of a user must read the same order.
        order = np.random.default_rng([*self._seed, epoch, self._numbers[user]]).permutation(len(titles))
        *history, positive = [titles[i] for i in order[max(0, position - self._longest) : position + 1]]
        return PreferenceGroup(user, self._timestamps[index], tuple(history), positive, ())

    @property
    def not_yet_asked_for(self) -> Iterator[PreferenceGroup]:
        """A group for each title that is in histories but never a positive, which checks of the given groups missed."""
        for user, titles in self._titles.items():
            for title in titles:
                if (user, title) not in self._positives:
                    yield PreferenceGroup(user, 0, (), title, ())


def require_histories(prompts: Iterable[str | None]) -> None:
    """Raise UserError where a group has a finished prompt and so no titles that could be reordered."""
    if any(prompt is not None for prompt in prompts):
        raise UserError(
            "sft.history_order=shuffled needs histories, but the data holds finished prompts; set "
            "sft.history_order=given"
        )
