"""Every title of a catalogue scored for a prompt that runs once; see ``batching/trie.py``."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dmpo_dist.batching.layout import rows_layout
from dmpo_dist.batching.trie import PromptMemory, TitleTrie, prompt_part, trie_part
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.modeling.logprobs import AnyLayout, LogProbModel, unwrap_peft
from dmpo_dist.modeling.routing import use_backend
from dmpo_dist.modeling.trie_attention import trie_obstacle, use_trie_attention

LogProbs = Callable[[AnyLayout], Tensor]


class TitleScorer:
    """Summed log-probs of the responses of one group at a time, however many there are.

    Args:
        model: a frozen transformers causal LM, or a PEFT model around one, on ``device``; its attention is switched.
        token_budget: most tokens in a row.
        device: of the model.
        unshared: run each response as its own row, as models whose attention cannot share a prompt do anyway.
        reference: as in ``LogProbModel``.

    Attributes:
        obstacle: why prompts are not shared; None where they are.
    """

    def __init__(
        self, model: torch.nn.Module, token_budget: int, device: torch.device, unshared: bool = False,
        reference: Literal["adapter_off"] | None = None,
    ) -> None:  # fmt: skip
        language_model = unwrap_peft(model)
        self.obstacle = "model.attention=unshared asks for separate rows" if unshared else trie_obstacle(language_model)
        if self.obstacle:
            use_backend(language_model, "unshared")
        else:
            use_trie_attention(language_model)
        self._log_probs = LogProbModel(model, reference)
        self._token_budget, self._device = token_budget, device
        self._last: tuple[TokenGroup, TitleTrie] | None = None

    def __call__(self, group: TokenGroup, which: Literal["policy", "reference"] = "policy") -> np.ndarray:
        """(R,) float64, in the order of ``group.branches``."""
        log_probs = partial(self._log_probs, which=which)
        if self.obstacle:
            return score_rows(log_probs, group, self._token_budget, self._device)
        trie = self.trie(group)
        return trie.log_probs(node_log_probs(log_probs, group.prefix, trie, self._token_budget, self._device))

    def trie(self, group: TokenGroup) -> TitleTrie:
        """The trie of the group's responses; users of one catalogue mostly share it."""
        last = self._last
        if last and (last[0].branches, last[0].scored_from) == (group.branches, group.scored_from):
            return last[1]
        trie = TitleTrie.of(group.branches, group.scored_from)
        self._last = group, trie
        return trie


@torch.no_grad()
def node_log_probs(
    log_probs: LogProbs, prefix: list[int], trie: TitleTrie, token_budget: int, device: torch.device
) -> np.ndarray:
    """(N,) float64 log-prob of each node's token behind ``prefix`` and its ancestors.

    Args:
        log_probs: a ``LogProbModel`` whose attention is ``trie_attention``.
        token_budget: most tokens in a row behind the prompt.
    """
    memory: PromptMemory = {}
    out = np.empty(len(trie.token))
    out[trie.children(np.array([-1]))] = _numbers(log_probs(prompt_part(prefix, trie, memory).to(device)))
    for nodes in trie.chunks(token_budget):
        part = trie_part(trie, nodes, len(prefix), memory).to(device)
        out[trie.children(nodes)] = _numbers(log_probs(part))
    return out


@torch.no_grad()
def score_rows(log_probs: LogProbs, group: TokenGroup, token_budget: int, device: torch.device) -> np.ndarray:
    """(R,) float64 of the responses, each a row of its own with the whole prompt: the plain way, for any model."""
    parts = [_numbers(log_probs(rows_layout([part]).to(device))) for part in _in_rows(group, token_budget)]
    return np.concatenate(parts)


def adjusted(
    log_probs: np.ndarray,
    lengths: np.ndarray,
    reference: np.ndarray | None = None,
    log_popularity: np.ndarray | None = None,
    length_normalize: bool = False,
    popularity_weight: float = 0.0,
) -> np.ndarray:
    """What titles are ranked by: (log pi - log pi_ref) / length - a * log popularity; arrays of (R,).

    Args:
        log_probs: summed over each title's tokens.
        lengths: these tokens, the end counted.
        reference: log-probs of another model, to be subtracted.
        log_popularity: on whatever scale; a constant does not change a ranking.
        length_normalize: divide by ``lengths``.
        popularity_weight: the a above.
    """
    scores = log_probs if reference is None else log_probs - reference
    scores = scores / lengths if length_normalize else scores
    return scores if log_popularity is None else scores - popularity_weight * log_popularity


def _in_rows(group: TokenGroup, token_budget: int) -> Iterator[TokenGroup]:
    """``group`` in groups whose separate rows hold at most ``token_budget`` tokens, or one response."""
    size = max(1, token_budget // (len(group.prefix) + max(map(len, group.branches))))
    for start in range(0, len(group.branches), size):
        part = slice(start, start + size)
        yield TokenGroup(group.prefix, group.branches[part], group.scored_from[part])


def _numbers(log_probs: Tensor) -> np.ndarray:
    return log_probs.double().cpu().numpy()
