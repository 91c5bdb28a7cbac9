"""Training groups with the whole catalogue as candidates, for titles that the model finds itself."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from dmpo_dist.batching.trie import TitleTrie
from dmpo_dist.data.negatives import NegativeSampler
from dmpo_dist.data.schema import PreferenceGroup
from dmpo_dist.data.store import PreparedData, groups_from_rows
from dmpo_dist.data.tokenization import GroupTokenizer, TokenGroup
from dmpo_dist.errors import UserError

Encode = Callable[[PreferenceGroup], TokenGroup]


class CatalogueGroups:
    """The training groups of ``data``, each with all titles behind its prompt.

    A prompt leaves room for the longest title of the catalogue, so that any of them may come to be a negative of it.

    Args:
        data: prepared data with items.
        encode: tokenizes groups.

    Attributes:
        rows: the groups as they are stored.
        titles: of the catalogue; a title's index is its column.

    Raises:
        UserError: the longest title does not fit into ``model.max_length``.
    """

    def __init__(self, data: PreparedData, encode: GroupTokenizer) -> None:
        assert data.items is not None, "require_on_policy has seen the items"
        self.rows: Sequence[PreferenceGroup] = groups_from_rows(data.train)
        self.titles: list[str] = data.items["title"].tolist()
        self._encode: Encode = encode
        self._column = {title: column for column, title in enumerate(self.titles)}
        self._column_of_item = pd.Index(data.items["item"])
        self._sampler = _sampler_of(data)
        self._last: tuple[TokenGroup, TitleTrie] | None = None
        lengths = [len(branch) for branch in self._all_titles(replace(self.rows[0], history=())).branches[1:]]
        self.longest = sorted(lengths, reverse=True)
        self._longest_title = self.titles[lengths.index(self.longest[0])]

    def stored(self) -> list[TokenGroup]:
        """All groups with their stored negatives, their prompts as in ``whole``.

        Raises:
            UserError: a prompt without any history and the longest title do not fit; it names the user.
        """
        groups = []
        for row in self.rows:
            group = self._fitting(replace(row, negatives=(*row.negatives, self._longest_title)))
            groups.append(group.taking(range(len(group.branches) - 1)))
        return groups

    def largest(self, prompts: Sequence[TokenGroup], negatives: int, shared: bool) -> int:
        """Most tokens of any of ``prompts`` with any ``negatives`` titles of the catalogue as negatives."""
        prompt = max(len(group.prefix) for group in prompts)
        responses = sum(length - 1 for length in self.longest[: 1 + negatives])
        return prompt * (1 if shared else 1 + negatives) + responses

    def whole(self, index: int) -> TokenGroup:
        """Group ``index`` with its positive, then every title in the order of ``titles``, as responses."""
        return self._all_titles(self.rows[index])

    def trie(self, whole: TokenGroup) -> TitleTrie:
        """The trie of the catalogue behind the prompt of ``whole``; most prompts share one."""
        titles = whole.taking(range(1, len(whole.branches)))
        if self._last and (self._last[0].branches, self._last[0].scored_from) == (titles.branches, titles.scored_from):
            return self._last[1]
        trie = TitleTrie.of(titles.branches, titles.scored_from)
        self._last = titles, trie
        return trie

    def positive(self, index: int) -> int:
        """The column of the positive of group ``index``."""
        return self._column[self.rows[index].positive]

    def column(self, title: str) -> int:
        """The column of a stored title."""
        return self._column[title]

    def eligible(self, index: int) -> np.ndarray:
        """(R,) bool: titles that may be negatives of group ``index``, by the rules of ``dmpo data prepare``.

        Neither the positive nor what the user has taken, and nothing that nobody had taken by then. Where the data has
        no log, all titles but the positive and the history.
        """
        row = self.rows[index]
        allowed = np.ones(len(self.titles), dtype=bool)
        if self._sampler is not None:
            known = self._column_of_item.get_indexer(self._sampler.drawable(row.user, row.timestamp))
            allowed = np.zeros_like(allowed)
            allowed[known[known >= 0]] = True
        allowed[[self._column[title] for title in (row.positive, *row.history) if title in self._column]] = False
        return allowed

    def _all_titles(self, row: PreferenceGroup) -> TokenGroup:
        return self._fitting(replace(row, negatives=tuple(self.titles), levels=(), scores=()))

    def _fitting(self, row: PreferenceGroup) -> TokenGroup:
        try:
            return self._encode(row)
        except UserError as error:
            raise UserError(
                f"train.on_policy searches all {len(self.titles)} titles of the catalogue behind each prompt, and its "
                f"longest title does not fit: {error}"
            ) from None


def told_apart(allowed: np.ndarray, trie: TitleTrie) -> np.ndarray:
    """(R,) bool: of the titles ``allowed`` those that the model can tell from all others.

    A tokenizer may read two titles alike (another case, say). None counts that reads as one that is not allowed, such
    as the positive, and the first alone of several that read alike, which would be one negative twice.
    """
    sound = np.flatnonzero(allowed & ~np.isin(trie.ends, trie.ends[~allowed]))
    first = np.zeros_like(allowed)
    first[sound[np.unique(trie.ends[sound], return_index=True)[1]]] = True
    return first


def _sampler_of(data: PreparedData) -> NegativeSampler | None:
    """What knows which items a user had taken, by the split that ``data`` was prepared with."""
    if data.interactions is None:
        return None
    made = data.card.config
    return NegativeSampler(
        data.interactions, made["rating_threshold"], 0, spare_later=made.get("split") == "leave_one_out"
    )
