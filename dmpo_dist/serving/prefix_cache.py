"""Prompts that have run: their keys and values, kept for users who come back, up to a number of bytes."""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from dmpo_dist.batching.trie import PromptMemory


class PrefixCache:
    """Memories of prompts by their tokens; the one that was not used for the longest time goes first.

    Args:
        most_bytes: of keys and values together; 0 keeps nothing.

    Attributes:
        held_bytes: of what is kept now.
        hits, misses: how often a prompt was there, and was not.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._kept: OrderedDict[bytes, tuple[PromptMemory, int]] = OrderedDict()
        self.held_bytes = self.hits = self.misses = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, tokens: Sequence[int]) -> PromptMemory | None:
        """The memory of the prompt ``tokens``, or None."""
        found = self._kept.get(_key(tokens))
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end(_key(tokens))
        return found[0]

    def put(self, tokens: Sequence[int], memory: PromptMemory) -> None:
        """Keep a filled ``memory``, and drop others until all fit; one that is too large alone is not kept."""
        size = sum(tensor.nbytes for pair in memory.values() for tensor in pair)
        if size > self._most:
            return
        replaced = self._kept.pop(_key(tokens), None)
        self.held_bytes += size - (replaced[1] if replaced else 0)
        self._kept[_key(tokens)] = memory, size
        while self.held_bytes > self._most:
            _, (_, dropped) = self._kept.popitem(last=False)
            self.held_bytes -= dropped


def _key(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, dtype=np.int64).tobytes()
