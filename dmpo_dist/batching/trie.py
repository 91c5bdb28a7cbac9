"""All titles of a catalogue behind one prompt: a trie of their tokens, run in parts that share the prompt's keys.

Many titles begin with the same tokens, so the trie has fewer nodes than the titles have tokens. A node attends to the
prompt and to its ancestors. The prompt runs once, as a ``PromptPart``. Then ``TriePart`` rows follow, each with some
nodes in preorder and all ancestors of these nodes, so that no part needs the keys of another part. Only nodes with
children run: a leaf is only a target, and one row of logits predicts all children of a node.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from dmpo_dist.batching.targets import Movable, Targets, single_targets

PromptMemory = dict[nn.Module, tuple[Tensor, Tensor]]
"""Attention module -> keys (1, H_kv, P, D) and values of the prompt."""


@dataclass(frozen=True)
class TitleTrie:
    """The distinct beginnings of R token sequences; N nodes in preorder.

    Attributes:
        token: (N,) int64, the id of each node's token.
        parent: (N,) int64, the parent node; -1 for the first token of a sequence, whose parent is the prompt.
        depth: (N,) int64, 0 for the first token of a sequence.
        scored: (N,) bool; False for tokens that belong to the prompt but differ between titles.
        ends: (R,) int64, the node at which each sequence ends.
    """

    token: np.ndarray
    parent: np.ndarray
    depth: np.ndarray
    scored: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, branches: Sequence[Sequence[int]], scored_from: Sequence[int]) -> "TitleTrie":
        """The trie of the branches of a ``TokenGroup``; equal branches share all their nodes.

        Raises:
            ValueError: there are none, or one is empty.
        """
        if not branches or not all(branches):
            raise ValueError("a trie needs titles, each of at least one token")
        # A node is (scored, id): the same id may be scored in one title and part of the prompt in another.
        rows = [[(t >= s, id_) for t, id_ in enumerate(row)] for row, s in zip(branches, scored_from, strict=True)]
        nodes: list[tuple[bool, int]] = []
        parent: list[int] = []
        depth: list[int] = []
        ends = np.empty(len(rows), dtype=np.int64)
        path: list[int] = []  # node numbers from the root to the last node of ``previous``
        previous: list[tuple[bool, int]] = []
        # In sorted order rows with a common beginning are neighbours. So it is enough to compare a row with the one
        # before it, keep the path as far as both agree, and add nodes for the rest. This gives preorder, too.
        for index in sorted(range(len(rows)), key=rows.__getitem__):
            row = rows[index]
            same = next((t for t, pair in enumerate(zip(previous, row, strict=False)) if pair[0] != pair[1]), None)
            del path[min(len(previous), len(row)) if same is None else same :]
            for node in row[len(path) :]:
                parent.append(path[-1] if path else -1)
                depth.append(len(path))
                path.append(len(nodes))
                nodes.append(node)
            ends[index] = path[-1]
            previous = row
        return cls(
            token=np.array([token for _, token in nodes], dtype=np.int64),
            parent=np.array(parent, dtype=np.int64),
            depth=np.array(depth, dtype=np.int64),
            scored=np.array([scored for scored, _ in nodes]),
            ends=ends,
        )

    @cached_property
    def inner(self) -> np.ndarray:
        """Nodes with children, in preorder."""
        return np.unique(self.parent[self.parent >= 0])

    @cached_property
    def lengths(self) -> np.ndarray:
        """(R,) int64, scored tokens of each sequence."""
        return self._along_paths(self.scored.astype(np.int64))[self.ends]

    @cached_property
    def titles_at(self) -> dict[int, list[int]]:
        """Node -> the sequences that end there."""
        found: dict[int, list[int]] = {}
        for title, node in enumerate(self.ends.tolist()):
            found.setdefault(node, []).append(title)
        return found

    def rooted(self, token: int) -> "TitleTrie":
        """The same behind one more token, node 0, which is not scored: the last one of a prompt."""
        if token not in self._rooted:
            self._rooted[token] = TitleTrie(
                token=np.concatenate([[token], self.token]),
                parent=np.concatenate([[-1], self.parent + 1]),
                depth=np.concatenate([[0], self.depth + 1]),
                scored=np.concatenate([[False], self.scored]),
                ends=self.ends + 1,
            )
        return self._rooted[token]

    @cached_property
    def _rooted(self) -> dict[int, "TitleTrie"]:
        return {}

    @cached_property
    def after(self) -> np.ndarray:
        """(N,) int64, for each node the first one behind its subtree: in preorder a subtree is a range of nodes."""
        sizes = np.ones(len(self.token), dtype=np.int64)
        for depth in range(int(self.depth.max()), 0, -1):
            level = np.flatnonzero(self.depth == depth)
            np.add.at(sizes, self.parent[level], sizes[level])
        return np.arange(len(self.token)) + sizes

    def count_below(self, at: np.ndarray) -> np.ndarray:
        """(N,) numbers at the nodes -> (N,) their sums over each node's subtree."""
        total = np.concatenate([[0], np.cumsum(at)])
        return total[self.after] - total[:-1]

    def sequence(self, index: int) -> tuple[list[int], int]:
        """The ids of a sequence, and the index of the first one that is scored."""
        node, path = int(self.ends[index]), []
        while node >= 0:
            path.append(node)
            node = int(self.parent[node])
        nodes = np.array(path[::-1])
        return self.token[nodes].tolist(), int(np.argmax(self.scored[nodes]))

    @cached_property
    def _by_parent(self) -> tuple[np.ndarray, np.ndarray]:
        """Nodes in the order of their parents, and these parents."""
        order = np.argsort(self.parent, kind="stable")
        return order, self.parent[order]

    def children(self, nodes: np.ndarray) -> np.ndarray:
        """All children of ``nodes``, in preorder; the children of -1 are the first tokens of the sequences."""
        order, parents = self._by_parent
        first = np.searchsorted(parents, nodes, side="left")
        counts = np.searchsorted(parents, nodes, side="right") - first
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.sort(order[np.repeat(first, counts) + within])

    def path_log_probs(self, node_log_probs: np.ndarray) -> np.ndarray:
        """(N,) log-probs of the nodes' tokens -> (N,) float64, summed over the scored tokens from the root to each."""
        return self._along_paths(np.where(self.scored, node_log_probs, 0.0))

    def log_probs(self, node_log_probs: np.ndarray) -> np.ndarray:
        """(N,) log-probs of the nodes' tokens -> (R,) float64 of the sequences."""
        return self.path_log_probs(node_log_probs)[self.ends]

    def chunks(self, token_budget: int) -> Iterator[np.ndarray]:
        """Consecutive inner nodes; with its ancestors a chunk takes at most ``token_budget`` tokens, or is one node."""
        # In preorder all ancestors outside a chunk are ancestors of its first node, so there are at most ``depth``.
        size = max(1, token_budget - int(self.depth.max()))
        for start in range(0, len(self.inner), size):
            yield self.inner[start : start + size]

    def with_ancestors(self, nodes: np.ndarray) -> np.ndarray:
        """``nodes`` and all their ancestors, in preorder."""
        seen, level = nodes, nodes
        while (level := np.unique(self.parent[level])).max(initial=-1) >= 0:
            level = level[level >= 0]
            seen = np.concatenate([seen, level])
        return np.unique(seen)

    def _along_paths(self, values: np.ndarray) -> np.ndarray:
        """(N,) values of the nodes -> (N,) sums over each node and its ancestors, level by level."""
        totals = values.copy()
        for depth in range(1, int(self.depth.max()) + 1):
            level = np.flatnonzero(self.depth == depth)
            totals[level] += totals[self.parent[level]]
        return totals


@dataclass(frozen=True)
class PromptPart(Movable):
    """A prompt of P tokens, whose keys and values are kept for the parts of the trie.

    Attributes:
        input_ids, position_ids: (1, P) int64.
        targets: the first tokens of all titles, which the prompt's last token predicts; each is a response of its own.
        memory: filled when the part runs.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: Targets
    memory: PromptMemory
    reference_targets: ClassVar[None] = None


@dataclass(frozen=True)
class TriePart(Movable):
    """Some nodes of a trie and their ancestors, T tokens in one row.

    Attributes:
        input_ids, position_ids: (1, T) int64; positions continue where the prompt ends.
        ancestors: (T, D) int64, for each token the row indices of itself, its parent, and so on; -1 above the trie.
        targets: the children of the nodes; each is a response of its own.
        memory: the prompt's keys and values.
    """

    input_ids: Tensor
    position_ids: Tensor
    ancestors: Tensor
    targets: Targets
    memory: PromptMemory
    reference_targets: ClassVar[None] = None


@dataclass(frozen=True)
class BeamPart(TriePart):
    """Some nodes of a trie whose ancestors ran in earlier parts or run in this one, T tokens in one row.

    Attributes:
        ancestors: (T, D) int64, as in ``TriePart``, but counted over all nodes that ran, those of this part last.
        before: keys and values of these nodes, grown by each part that runs.
    """

    before: PromptMemory

    def grown(self, module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (1, H_kv, all nodes so far, D), given those of the nodes of this part."""
        if module in self.before:
            old_key, old_value = self.before[module]
            self.before[module] = torch.cat([old_key, key], dim=2), torch.cat([old_value, value], dim=2)
        else:
            self.before[module] = key.clone(), value.clone()  # a view would keep the whole row's
        return self.before[module]


def prompt_part(prefix: Sequence[int], trie: TitleTrie, memory: PromptMemory) -> PromptPart:
    """``prefix`` as a part that predicts the children of the root, ``trie.children(-1)``."""
    children = trie.children(np.array([-1]))
    return PromptPart(
        input_ids=torch.tensor([prefix]),
        position_ids=torch.arange(len(prefix))[None],
        targets=_targets(np.full(len(children), len(prefix) - 1), trie.token[children]),
        memory=memory,
    )


def trie_part(trie: TitleTrie, nodes: np.ndarray, prefix_length: int, memory: PromptMemory) -> TriePart:
    """Inner ``nodes`` of the trie (ascending) as a part that predicts ``trie.children(nodes)``."""
    row = trie.with_ancestors(nodes)  # (T,) ascending, so that searchsorted gives the index of a node in the row
    columns, level = [], row
    while level.max() >= 0:  # column d: the ancestor of each token d levels above it, -1 where there is none
        columns.append(np.where(level >= 0, np.searchsorted(row, level), -1))
        level = np.where(level >= 0, trie.parent[level], -1)
    children = trie.children(nodes)
    return TriePart(
        input_ids=torch.from_numpy(trie.token[row])[None],
        position_ids=torch.from_numpy(trie.depth[row] + prefix_length)[None],
        ancestors=torch.from_numpy(np.stack(columns, axis=1)),
        targets=_targets(np.searchsorted(row, trie.parent[children]), trie.token[children]),
        memory=memory,
    )


def beam_part(
    trie: TitleTrie, nodes: np.ndarray, ancestors: np.ndarray, prefix_length: int, memory: PromptMemory,
    before: PromptMemory,
) -> BeamPart:  # fmt: skip
    """Inner ``nodes`` of the trie (ascending) as a part that predicts their children; ancestors ran, or are of them.

    Args:
        ancestors: see ``BeamPart``.
        prefix_length: tokens before the trie.
    """
    children = trie.children(nodes)
    return BeamPart(
        input_ids=torch.from_numpy(trie.token[nodes])[None],
        position_ids=torch.from_numpy(trie.depth[nodes] + prefix_length)[None],
        ancestors=torch.from_numpy(ancestors),
        targets=_targets(np.searchsorted(nodes, trie.parent[children]), trie.token[children]),
        memory=memory,
        before=before,
    )


def _targets(at: np.ndarray, tokens: np.ndarray) -> Targets:
    """Each of ``tokens`` (N,) as a response of one token, predicted at the row index ``at`` (N,)."""
    predict_index, target_row = torch.unique(torch.from_numpy(at), return_inverse=True)
    return single_targets(predict_index, target_row, torch.from_numpy(tokens))
