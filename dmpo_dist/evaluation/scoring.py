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


def score_requests(path: str, config: RunConfig, rows: Any) -> list[np.ndarray]:
    """Log-probabilities of every request's candidates under the model in ``path``.

    Args:
        path: model folder or hub id; its own template is used, and a configuration that asks for another is refused.
        config: gives model and evaluation settings.
        rows: requests of a prepared split, a ``Dataset``.

    Returns:
        For each request a float64 array (1+K,), the positive first.
    """
    source = find_model(path)
    tokenizer = load_tokenizer(source)
    template = make_template(enforce_template(source.stamp, config.template, path), tokenizer)
    groups = tokenize_rows(rows, GroupTokenizer(tokenizer, template, config.model.max_length))
    return score_token_groups(path, config.model, groups, config.evaluation.token_budget)


def score_token_groups(
    path: str, config: ModelConfig, groups: Sequence[TokenGroup], token_budget: int
) -> list[np.ndarray]:
    """The same for groups that are tokenized already."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_for_scoring(path, config).to(device)
    language_model = unwrap_peft(model)
    route = choose_backend(language_model, device.type, config.max_length, config.attention)
    use_backend(language_model, route.backend)
    return score_groups(LogProbModel(model), groups, token_budget, route.backend != "unshared", device)


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
