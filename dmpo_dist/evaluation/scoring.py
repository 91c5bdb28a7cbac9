"""Candidates scored by a language model's log-probability, every prompt run once."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from dmpo_dist.batching.layout import group_cost, prefix_layout, rows_layout
from dmpo_dist.batching.plan import deal
from dmpo_dist.config import RunConfig
from dmpo_dist.data.store import group_from_row
from dmpo_dist.data.template import make_template
from dmpo_dist.data.tokenization import GroupTokenizer, TokenGroup
from dmpo_dist.modeling import attention
from dmpo_dist.modeling.backbone import enforce_template, find_model, load_for_scoring, load_tokenizer
from dmpo_dist.modeling.logprobs import LogProbModel, unwrap_peft
from dmpo_dist.modeling.routing import choose_backend, native_attention

IMPLEMENTATION = {"two_part": attention.TWO_PART, "sdpa": attention.DENSE}


def score_requests(
    path: str, config: RunConfig, rows: Sequence[dict[str, Any]], progress: Callable[[int], None]
) -> list[np.ndarray]:
    """Log-probabilities of every request's candidates under the model in ``path``.

    Args:
        path: model folder or hub id; its own template is used, and a configuration that asks for another is refused.
        config: gives model and evaluation settings.
        rows: requests of a prepared split.
        progress: called with the number of requests just scored.

    Returns:
        For each request a float64 array (1+K,), the positive first.
    """
    source = find_model(path)
    tokenizer = load_tokenizer(source)
    template = make_template(enforce_template(source.stamp, config.template, path), tokenizer)
    encode = GroupTokenizer(tokenizer, template, config.model.max_length)
    groups = [encode(group_from_row(row)) for row in rows]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    attention.register()
    model = load_for_scoring(path, config.model).to(device)
    language_model = unwrap_peft(model)
    route = choose_backend(language_model, device.type, config.model.max_length, config.model.attention)
    language_model.set_attn_implementation(IMPLEMENTATION.get(route.backend) or native_attention(language_model))
    shared = route.backend != "unshared"
    return score_groups(LogProbModel(model), groups, config.evaluation.token_budget, shared, device, progress)


def score_groups(
    module: LogProbModel,
    groups: Sequence[TokenGroup],
    token_budget: int,
    shared: bool,
    device: torch.device,
    progress: Callable[[int], None] = lambda count: None,
) -> list[np.ndarray]:
    """Log-probabilities of the candidates of ``groups`` in their order, packed into rows of ``token_budget`` tokens."""
    costs = [group_cost(group, shared) for group in groups]
    budget = max(token_budget, max(cost.tokens for cost in costs))
    out: list[np.ndarray | None] = [None] * len(groups)
    for micro_batch in deal(range(len(groups)), costs, 1, budget).micro_batches[0]:
        members = [groups[g] for g in micro_batch.groups]
        layout = (prefix_layout(members) if shared else rows_layout(members)).to(device)
        with torch.inference_mode():
            log_probs = module(layout).double().cpu()
        sizes = [len(group.branches) for group in members]
        for index, part in zip(micro_batch.groups, log_probs.split(sizes), strict=True):
            out[index] = part.numpy()
        progress(len(members))
    assert all(scores is not None for scores in out)
    return [scores for scores in out if scores is not None]
