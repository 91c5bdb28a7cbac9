"""Candidates scored by a language model's log-probability, every prompt run once."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmpo_dist.batching.layout import Cost, Layout, group_cost, lay_out
from dmpo_dist.batching.plan import MicroBatch, deal
from dmpo_dist.config import ModelConfig, RunConfig
from dmpo_dist.data.template import make_template
from dmpo_dist.data.tokenization import GroupTokenizer, TokenGroup, tokenize_rows
from dmpo_dist.modeling.backbone import enforce_template, find_model, load_for_scoring, load_tokenizer
from dmpo_dist.modeling.logprobs import LogProbModel, unwrap_peft
from dmpo_dist.modeling.routing import choose_backend, use_backend


class RequestScorer:
    """Log-probabilities of candidates under one model, loaded once.

    Args:
        path: model folder or hub id; its own template is used, and a configuration that asks for another is refused.
        config: gives model and evaluation settings.
    """

    def __init__(self, path: str, config: RunConfig) -> None:
        source = find_model(path)
        tokenizer = load_tokenizer(source)
        template = make_template(enforce_template(source.stamp, config.template, path), tokenizer)
        self._tokenize = GroupTokenizer(tokenizer, template, config.model.max_length)
        self._path, self._config = path, config
        self._score: TokenGroupScorer | None = None

    def __call__(self, rows: Any) -> list[np.ndarray]:
        """For each request of ``rows``, a split of prepared data, a float64 array (1+K,), the positive first."""
        groups = tokenize_rows(rows, self._tokenize)  # titles that do not fit are found before weights are loaded
        self._score = self._score or TokenGroupScorer(self._path, self._config.model)
        return self._score(groups, self._config.evaluation.token_budget)


class TokenGroupScorer:
    """The same for groups that are tokenized already."""

    def __init__(self, path: str, config: ModelConfig) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = load_for_scoring(path, config).to(self._device)
        language_model = unwrap_peft(model)
        route = choose_backend(language_model, self._device.type, config.max_length, config.attention)
        use_backend(language_model, route.backend)
        self._shared = route.backend != "unshared"
        self._log_probs = LogProbModel(model)

    def __call__(self, groups: Sequence[TokenGroup], token_budget: int) -> list[np.ndarray]:
        return score_groups(self._log_probs, groups, token_budget, self._shared, self._device)


def score_requests(path: str, config: RunConfig, rows: Any) -> list[np.ndarray]:
    """``RequestScorer`` for one split."""
    return RequestScorer(path, config)(rows)


def score_token_groups(
    path: str, config: ModelConfig, groups: Sequence[TokenGroup], token_budget: int
) -> list[np.ndarray]:
    """``TokenGroupScorer`` for one list of groups."""
    return TokenGroupScorer(path, config)(groups, token_budget)


def score_groups(
    log_probs: Callable[[Layout], Tensor],
    groups: Sequence[TokenGroup],
    token_budget: int,
    shared: bool,
    device: torch.device,
) -> list[np.ndarray]:
    """Log-probabilities of the candidates of ``groups``, in their order, packed into rows of ``token_budget`` tokens."""
    micro_batches = deal_for_scoring(groups, 1, token_budget, shared)[0]
    scores = dict(score_micro_batches(log_probs, groups, micro_batches, shared, device))
    return [scores[index] for index in range(len(groups))]


def deal_for_scoring(
    groups: Sequence[TokenGroup], world_size: int, token_budget: int, shared: bool
) -> tuple[tuple[MicroBatch, ...], ...]:
    """For each rank its micro-batches, the same number on every rank; a group over the budget gets its own."""
    costs: list[Cost] = [group_cost(group, shared) for group in groups]
    budget = max(token_budget, max(cost.tokens for cost in costs))
    return deal(range(len(groups)), costs, world_size, budget).micro_batches


def score_micro_batches(
    log_probs: Callable[[Layout], Tensor],
    groups: Sequence[TokenGroup],
    micro_batches: Iterable[MicroBatch],
    shared: bool,
    device: torch.device,
) -> Iterator[tuple[int, np.ndarray]]:
    """(group index, candidate log-probs) for the groups of ``micro_batches``; fillers are run and left out."""
    for micro_batch in micro_batches:
        members = [groups[index] for index in micro_batch.groups]
        with torch.no_grad():
            scores = log_probs(lay_out(members, shared).to(device)).double().cpu()
        if micro_batch.filler:
            continue
        parts = scores.split([len(group.branches) for group in members])
        yield from zip(micro_batch.groups, (part.numpy() for part in parts), strict=True)
