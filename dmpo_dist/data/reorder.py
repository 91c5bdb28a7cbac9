"""Training groups whose users' titles come in a new order in every epoch."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from dmpo_dist.data.schema import PreferenceGroup
from dmpo_dist.errors import UserError


class ReorderedGroups:
    """The groups of some users under a random order of each user's titles: ``(index, epoch) -> PreferenceGroup``.

    A user's titles are those of all their groups' histories and positives. In each epoch they are permuted anew, the
    last ones become the positives of the user's groups, and what stands before a positive its history, as long as the
    longest history of all groups. So every title comes to be asked for, after any of the others. Negatives are left
    out: they belong to the old positives.

    A group depends on its index, the epoch and the seed alone, so that ranks agree and a resumed run goes on alike.
    """

    def __init__(self, groups: Sequence[PreferenceGroup], seed: Sequence[int]) -> None:
        self._seed = tuple(seed)
        self._longest = max((len(group.history) for group in groups), default=0)
        self._users = [group.user for group in groups]
        self._timestamps = [group.timestamp for group in groups]
        self._places = [0] * len(groups)
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
                self._places[index] = first + number
        self._numbers = {user: number for number, user in enumerate(members, start=1)}

    def __len__(self) -> int:
        return len(self._users)

    def __call__(self, index: int, epoch: int) -> PreferenceGroup:
        user, place = self._users[index], self._places[index]
        titles = self._titles[user]
        order = np.random.default_rng([*self._seed, epoch, self._numbers[user]]).permutation(len(titles))
        *history, positive = [titles[i] for i in order[max(0, place - self._longest) : place + 1]]
        return PreferenceGroup(user, self._timestamps[index], tuple(history), positive, ())

    @property
    def not_yet_asked_for(self) -> Iterator[PreferenceGroup]:
        """The titles that stand in histories alone, as positives: a check of the given groups has not seen these."""
        for user, titles in self._titles.items():
            for title in titles:
                if (user, title) not in self._positives:
                    yield PreferenceGroup(user, 0, (), title, ())


def require_histories(prompts: Iterable[str | None]) -> None:
    """Raise UserError for groups with a finished prompt, which have no titles to reorder."""
    if any(prompt is not None for prompt in prompts):
        raise UserError(
            "sft.history_order=shuffled needs histories, but the data holds finished prompts; set "
            "sft.history_order=given"
        )
