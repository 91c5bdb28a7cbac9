"""Models that lose the layout are found out before they score, whichever way; those that do not are left alone."""

import numpy as np
import pytest
import torch
import transformers
from conftest import random_groups, tiny_model
from oracle import oracle

from dmpo_dist.batching.layout import prefix_layout
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.logprobs import LogProbModel
from dmpo_dist.modeling.routing import use_backend
from dmpo_dist.modeling.self_check import disagreement, tolerance
from dmpo_dist.modeling.token_scorer import TokenScorer

GROUPS = random_groups(5, seed=1, prompt=30, k=9)


class Forgetful(torch.nn.Module):
    """A decoder layer that does not hand its keyword arguments down, as those of nemotron."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden, layout=None, **known):
        return self.layer(hidden, **known)


def nemotron():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 48, "vocab_size": 97, "max_position_embeddings": 256, "head_dim": 8}  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(transformers.NemotronConfig(**shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def forgetful(kind):
    """One layer of two forgets."""
    model = tiny_model(kind)
    model.model.layers[1] = Forgetful(model.model.layers[1])
    return model


LOSING = {"nemotron": nemotron, "llama": lambda: forgetful("llama"), "qwen3": lambda: forgetful("qwen3")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["packed", "trie", "tokens"])
@pytest.mark.parametrize("kind", LOSING)
@torch.no_grad()
def test_a_model_that_loses_the_layout_scores_by_separate_rows(kind, way, dtype, caplog):
    model = LOSING[kind]().to(dtype).eval()
    expected = oracle(model, GROUPS).double().numpy()
    scorer = TokenScorer(model, 4096, 256)
    assert scorer.route.backend == "two_part"
    if way == "packed":
        seen = np.concatenate(scorer.score(GROUPS))
    elif way == "trie":
        seen = np.concatenate([scorer.score_many(group) for group in GROUPS])
    else:
        ones = [type(g)(g.prefix, g.branches[:1], g.scored_from[:1]) for g in GROUPS]
        seen, expected = [s.sum() for s in scorer.token_scores(ones)], oracle(model, ones).double().numpy()
    assert (np.abs(seen - expected) <= tolerance(expected, dtype)).all()
    assert "its responses run as separate rows" in scorer.fallback
    assert [record.message for record in caplog.records] == [scorer.fallback], "said once"


def test_an_attention_that_was_asked_for_is_refused():
    scorer = TokenScorer(nemotron().eval(), 4096, 256, attention="two_part")
    with pytest.raises(
        UserError, match="nemotron: model.attention=two_part does not reach attention.* use model.attention=unshared"
    ):
        scorer.score(GROUPS)
    with pytest.raises(UserError, match="nemotron"):
        scorer.score(GROUPS)  # a server goes on after an error
    plain = TokenScorer(nemotron().eval(), 4096, 256, attention="unshared")
    plain.score(GROUPS)
    assert plain.fallback is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "mistral", "gemma3"])
def test_rounding_is_no_reason(kind, dtype):
    """Titles of up to hundreds of nats, in the types whose sums are the least certain."""
    groups = random_groups(6, seed=2, prompt=120, response=60)
    scorer = TokenScorer(tiny_model(kind).to(dtype).eval(), 4096, 256)
    scores = np.concatenate(scorer.score(groups))
    scorer.score_many(groups[0])
    assert np.abs(scores).max() > 50
    assert scorer.fallback is None


@pytest.mark.parametrize("way", ["packed", "trie"])
@pytest.mark.parametrize("kind", ["gemma3", "gpt2", "qwen3"])
def test_what_a_half_type_cannot_tell_fp32_does(kind, way, monkeypatch):
    """A model whose sums round further than is allowed keeps its shared prompts, and its weights to the last bit."""
    model = tiny_model(kind).to(torch.bfloat16).eval()
    weights = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    looked = []

    def strict(log_probs, dtype):
        looked.append(dtype)
        return tolerance(log_probs, dtype) * (dtype == torch.float32)

    monkeypatch.setattr("dmpo_dist.modeling.self_check.tolerance", strict)
    scorer = TokenScorer(model, 4096, 256)
    [scorer.score_many(group) for group in GROUPS] if way == "trie" else scorer.score(GROUPS)
    assert looked == [torch.bfloat16, torch.float32]
    assert scorer.fallback is None
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert (tensor.data_ptr(), tensor.tolist()) == (weights[name][0], weights[name][1].tolist())


def test_what_is_not_finite_is_no_agreement_unless_the_rows_are_not_either():
    rows = [np.array([-1.0, -2.0])]
    assert disagreement([np.array([-1.0, np.nan])], rows, torch.float32) is not None
    assert disagreement([np.array([np.nan, np.nan])], rows, torch.bfloat16) is not None
    assert disagreement(rows, [np.array([-1.0, np.nan])], torch.float32) is None


def own_mask(kind):
    """A model whose layers add to the mask, as those of Doge do."""
    model = tiny_model(kind)
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(masked, with_kwargs=True)
    return model


def masked(module, args, kwargs):
    """The second of several tokens is hidden from all that come after the third."""
    length = kwargs["hidden_states"].shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    causal[3:, 1] = False
    return args, kwargs | {"attention_mask": causal[None, None]}


def doge():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 48, "vocab_size": 97, "max_position_embeddings": 256}  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(transformers.DogeConfig(**shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


MASKED = {"doge": doge, "llama": lambda: own_mask("llama"), "qwen3": lambda: own_mask("qwen3")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MASKED)
@torch.no_grad()
def test_a_mask_that_layers_add_is_not_left_out(kind, dtype):
    """However little it changes: rounding in bf16 would hide it from a comparison of log-probs."""
    model = MASKED[kind]().to(dtype).eval()
    expected = oracle(model, GROUPS).double().numpy()
    scorer = TokenScorer(model, 4096, 256)
    assert (np.abs(np.concatenate(scorer.score(GROUPS)) - expected) <= tolerance(expected, dtype)).all()
    assert "leaves out a mask that its layers add to attention" in scorer.fallback
    assert (np.abs(scorer.score_many(GROUPS[0]) - expected[: len(GROUPS[0].branches)]) <= 0.5).all()
    for backend in ("two_part", "sdpa"):
        use_backend(model, backend)
        with pytest.raises(UserError, match=r"add a mask of their own .* set model\.attention=unshared"):
            LogProbModel(model)(prefix_layout(GROUPS))


def test_rows_of_which_layers_see_a_part_are_refused():
    model = doge()
    model.config.keep_window_size = 100
    assert TokenScorer(model.eval(), 4096, 100).route.backend == "two_part"
    with pytest.raises(UserError, match=r"doge attends to 100 tokens .* set model\.max_length=100 or less \(now 256\)"):
        TokenScorer(model.eval(), 4096, 256)
