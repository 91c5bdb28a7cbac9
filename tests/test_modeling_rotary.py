"""Rotary frequencies that depend on a row's length: a group has the same log-probs whatever stands beside it."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import tiny_model
from oracle import gradients, oracle, relative_error
from transformers import AutoConfig, AutoModelForCausalLM

from dmpo_dist.batching.layout import lay_out
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.logprobs import LogProbModel
from dmpo_dist.modeling.routing import choose_backend, take_route
from dmpo_dist.modeling.token_scorer import TokenScorer

LIMIT = 64
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0,
            "original_max_position_embeddings": LIMIT}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}


def by_length(kind):
    """Phi-3 with longrope, as its long-context releases have it, and other users of both kinds."""
    if kind == "phi3":
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                 "intermediate_size": 48, "vocab_size": 97, "max_position_embeddings": 256, "bos_token_id": 1,
                 "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
        config = AutoConfig.for_model("phi3", **shape, original_max_position_embeddings=LIMIT, rope_parameters=LONGROPE)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model.train()
    if kind == "llama longrope":
        return tiny_model("llama", rope_parameters=LONGROPE)
    return tiny_model(kind.split()[0], rope_parameters=DYNAMIC, max_position_embeddings=LIMIT)


KINDS = ["phi3", "llama longrope", "llama dynamic", "qwen3 dynamic"]


def tokens(count, seed):
    return torch.randint(3, 97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


SHORT = TokenGroup(tokens(30, 0), (tokens(4, 1), tokens(5, 2)), (0, 0))
LONG = TokenGroup(tokens(90, 3), (tokens(4, 4), tokens(15, 5)), (0, 0))
EDGE = TokenGroup(tokens(LIMIT - 3, 6), (tokens(2, 7), tokens(3, 8), tokens(4, 9), tokens(9, 10)), (0, 0, 1, 0))
GROUPS = [EDGE, SHORT, LONG]


def fresh(model, groups):
    """Each row by a model that has seen no other: ``dynamic`` remembers the longest."""
    singles = [TokenGroup(g.prefix, (b,), (s,)) for g in groups for b, s in zip(g.branches, g.scored_from, strict=True)]
    return torch.cat([oracle(deepcopy(model), [single]) for single in singles])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_is_packed_or_padded_beside_a_group_changes_nothing(kind):
    model = by_length(kind)
    route = take_route(model, "cpu", 200)
    assert route.backend == "unshared"
    assert f"by the length of a row beyond {LIMIT} positions" in route.reason
    expected = fresh(model, GROUPS)
    module = LogProbModel(model)
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        seen = module(lay_out([GROUPS[i] for i in order], shared=False)).split([len(GROUPS[i].branches) for i in order])
        torch.testing.assert_close(torch.cat([seen[order.index(i)] for i in range(3)]), expected, rtol=1e-5, atol=1e-4)
    alone = torch.cat([module(lay_out([group], shared=False)) for group in GROUPS])
    torch.testing.assert_close(alone, expected, rtol=1e-5, atol=1e-4)


def test_gradients_are_those_of_rows_alone():
    model = by_length("phi3")
    expected = gradients(model, oracle(model, GROUPS))
    take_route(model, "cpu", 200)
    seen = gradients(model, LogProbModel(model)(lay_out(GROUPS, shared=False)))
    assert all(relative_error(seen[name], right) < 1e-4 for name, right in expected.items())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_way_of_scoring(kind):
    model = by_length(kind).eval()
    expected = fresh(model, GROUPS).double().numpy()
    scorer = TokenScorer(model, 512, 200)
    np.testing.assert_allclose(np.concatenate(scorer.score(GROUPS)), expected, rtol=1e-5, atol=1e-4)
    many = np.concatenate([scorer.score_many(group) for group in GROUPS])
    np.testing.assert_allclose(many, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_prompts_are_shared_where_no_row_is_that_long(kind):
    model = by_length(kind).eval()
    expected = fresh(model, [SHORT])
    assert take_route(model, "cpu", LIMIT).backend == "two_part"
    seen = LogProbModel(model)(lay_out([SHORT, SHORT, SHORT], shared=True))[:2]
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-4)
    with pytest.raises(UserError, match=r"model\.attention=two_part would be wrong .*by the length of a row"):
        choose_backend(model, "cpu", LIMIT + 1, "two_part")
