"""How likely given texts are to follow others, and whether greedy decoding would write them."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from dmpo_dist.modeling.logprobs import unwrap_peft

BATCH_TOKENS = 512


class Text(NamedTuple):
    """Token ids of a context and of what should follow."""

    context: list[int]
    following: list[int]


@dataclass(frozen=True)
class Followed:
    """What a model says of n texts.

    Attributes:
        log_prob: (n,) summed log-prob of what follows.
        greedy: (n,) 1 where greedy decoding writes exactly these tokens, else 0.
    """

    log_prob: np.ndarray
    greedy: np.ndarray


@torch.no_grad()
def followed(model: Any, texts: Sequence[Text], advance: Callable[[int], None]) -> Followed:
    """Run ``model`` over the texts, each a row; shorter ones are filled up behind, where no token looks back from.

    Greedy decoding writes ``following`` if and only if each of its tokens is the likeliest one after those before it,
    so one forward pass tells what generation would do.

    Args:
        model: a transformers causal LM, or a PEFT model around one, with the attention of ordinary rows.
        advance: told how many more texts are done.
    """
    takes_keep = "logits_to_keep" in inspect.signature(unwrap_peft(model).forward).parameters
    log_probs, greedy = np.empty(len(texts)), np.empty(len(texts))
    for chosen in _batches([len(text.context) + len(text.following) for text in texts]):
        rows = [torch.tensor(texts[index].context + texts[index].following) for index in chosen]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)  # (B, T)
        # Logits predict the next token, so those from the last token of the shortest context on are needed.
        first = min(len(texts[index].context) for index in chosen) - 1
        keep = {"logits_to_keep": ids.shape[1] - first} if takes_keep else {}
        logits = model(input_ids=ids, use_cache=False, **keep).logits[:, first - ids.shape[1] :]  # (B, T - first, V)
        for row, index in enumerate(chosen):
            begin, count = len(texts[index].context) - 1 - first, len(texts[index].following)
            predicted = logits[row, begin : begin + count].float()  # (F, V)
            wanted = torch.tensor(texts[index].following, device=model.device)
            log_probs[index] = predicted.log_softmax(-1).gather(1, wanted[:, None]).double().sum()
            greedy[index] = (predicted.argmax(-1) == wanted).all()
        advance(len(chosen))
    return Followed(log_probs, greedy)


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of texts of similar length, at most ``BATCH_TOKENS`` tokens or one text at a time."""
    batch: list[int] = []
    for index in np.argsort(lengths, kind="stable").tolist():  # the last of a batch is its longest
        if batch and (len(batch) + 1) * lengths[index] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
