"""A catalogue behind a shared prompt against full, separate rows through the model's own logits."""

import numpy as np
import pytest
import torch
from conftest import tiny_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import oracle
from peft import LoraConfig, get_peft_model

from dmpo_dist.batching.trie import TitleTrie
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.modeling import trie_attention
from dmpo_dist.modeling.logprobs import LogProbModel
from dmpo_dist.modeling.routing import use_backend
from dmpo_dist.modeling.scoring import score_rows
from dmpo_dist.modeling.scoring_rule import adjusted
from dmpo_dist.modeling.token_scorer import TokenScorer

CPU = torch.device("cpu")
PROMPT = [5, 9, 3, 17, 60, 4, 4, 31, 8, 12, 90, 33]
TITLES = (
    [20, 21, 22, 2], [20, 21, 2], [20, 21, 22, 23, 24, 25, 26, 27, 2], [20], [20, 21, 22, 2], [30, 2], [2],
    [40, 41, 42, 43, 2], [40, 41, 42, 44, 2], [12, 40, 41, 2],
)  # fmt: skip
GROUP = TokenGroup(PROMPT, TITLES, (0,) * 9 + (1,))
"""Shared beginnings, a title that begins another, equal titles, titles of one token, a first token that is prompt."""

MODELS = [
    ("llama", {}),
    ("qwen3", {}),
    ("gpt2", {}),
    ("mistral", {"window": 7}),  # shorter than the prompt and than the longest title
    ("gemma3", {"window": 7}),
    ("gemma2", {"window": 7, "attn_logit_softcapping": 2.0}),
    ("gpt_oss", {}),  # sinks: separate rows
]


def errors(seen, expected):
    return np.abs(seen - expected.double().numpy()) / np.abs(expected.double().numpy())


@pytest.mark.parametrize("token_budget", [1, 13, 4096])
@pytest.mark.parametrize(("kind", "options"), MODELS, ids=[kind for kind, _ in MODELS])
@torch.no_grad()
def test_the_trie_equals_separate_rows(kind, options, token_budget, monkeypatch):
    monkeypatch.setattr(trie_attention, "MAX_SCORES", 500)  # several slices in a part
    model = tiny_model(kind, **options).eval()
    expected = oracle(model, [GROUP])
    scorer = TokenScorer(model, token_budget, 256)
    assert bool(scorer.trie_obstacle) == (kind == "gpt_oss")
    assert errors(scorer.score_many(GROUP), expected).max() < 1e-5
    other = TokenGroup(PROMPT[3:], TITLES[:4], (0,) * 4)  # nothing is left over from the group before
    assert errors(scorer.score_many(other), oracle_with(model, other, scorer)).max() < 1e-5


def oracle_with(model, group, scorer):
    """The oracle, and the scorer's attention put back."""
    implementation = model.config._attn_implementation
    expected = oracle(model, [group])
    model.set_attn_implementation(implementation)
    return expected


tokens = st.integers(3, 6)  # few, so that beginnings are shared
titles = st.lists(st.lists(tokens, min_size=1, max_size=5), min_size=1, max_size=12)


@given(
    prompt=st.lists(st.integers(3, 96), min_size=1, max_size=9),
    titles=titles,
    budget=st.integers(1, 20),
    data=st.data(),
)
@example(prompt=[7], titles=[[3]], budget=1, data=None)
@example(prompt=[7, 8], titles=[[3, 4], [3, 4, 5], [3], [3, 4]], budget=2, data=None)
@settings(max_examples=60, deadline=None)
def test_any_titles(prompt, titles, budget, data):
    """Shared beginnings, titles that begin others, equal ones, single ones, ids that are not scored; in fp64."""
    starts = tuple(data.draw(st.integers(0, len(t) - 1)) if data else 0 for t in titles)
    group = TokenGroup(prompt, tuple(titles), starts)
    scorer = TokenScorer(MODEL, budget, 256)
    seen = scorer.score_many(group)
    np.testing.assert_allclose(seen, oracle(MODEL, [group]).numpy(), rtol=1e-10)
    trie = scorer.trie(group)
    beginnings = {tuple((t >= s, x) for t, x in enumerate(title[:n])) for title, s in zip(titles, starts, strict=True)
                  for n in range(1, len(title) + 1)}  # fmt: skip
    assert len(trie.token) == len(beginnings), "each distinct beginning once"
    assert trie.lengths.tolist() == [len(t) - s for t, s in zip(titles, starts, strict=True)]
    run = [trie.with_ancestors(nodes) for nodes in trie.chunks(budget)]
    assert np.array_equal(np.unique(np.concatenate([*run, trie.inner])), trie.inner), "leaves do not run"
    assert all(len(row) <= max(budget, 1 + trie.depth.max()) for row in run)


MODEL = tiny_model("llama").double().eval().requires_grad_(False)


def test_an_adapter_and_separate_rows():
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    seen = TokenScorer(model.eval(), 16, 256).score_many(GROUP)
    unshared = TokenScorer(model, 40, 256, attention="unshared")
    assert "asks for separate rows" in unshared.trie_obstacle
    np.testing.assert_allclose(seen, unshared.score_many(GROUP), rtol=1e-5)


@torch.no_grad()
def test_rows_are_the_layout_training_checks_itself_with():
    model = tiny_model("qwen3").eval()
    expected = oracle(model, [GROUP])
    use_backend(model, "unshared")
    assert errors(score_rows(LogProbModel(model), GROUP, 30, CPU), expected).max() < 1e-5


def test_adjusted_scores():
    log_probs, lengths = np.array([-6.0, -2.0]), np.array([3, 2])
    assert adjusted(log_probs, lengths).tolist() == [-6, -2]
    assert adjusted(log_probs, lengths, length_normalize=True).tolist() == [-2, -1]
    by_all = adjusted(
        log_probs, lengths, reference=np.array([-9.0, -2.0]), log_popularity=np.array([1.0, 4.0]),
        length_normalize=True, popularity_weight=0.5,
    )  # fmt: skip
    assert by_all.tolist() == [0.5, -2.0]


@pytest.mark.parametrize("branches", [[], [[1], []]])
def test_a_trie_needs_titles(branches):
    with pytest.raises(ValueError, match="needs titles"):
        TitleTrie.of(branches, [0] * len(branches))
