"""The arithmetic of ``shared_prefix.PrefixGrouperImplementation`` on the CPU, against our shared prompts."""

import conftest
import pytest
import torch

from dmpo_dist.batching import synthetic
from dmpo_dist.bench.implementations import BENCH_MODEL, LayoutImplementation, ModelSpec

pytest.importorskip("prefix_grouper", reason="pip install --no-deps prefix_grouper==0.0.1.post1")

TINY = BENCH_MODEL | {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 48, "vocab_size": 97, "initializer_range": 0.2,
}  # fmt: skip


@pytest.mark.parametrize(
    "groups",
    [conftest.random_groups(6, seed=3), synthetic.random_groups(3, 9, 4, 2, 97)],
    ids=["ragged", "even"],
)
def test_prefix_grouper_takes_our_step(groups):
    from shared_prefix import Answer, PrefixGrouperImplementation

    spec = ModelSpec(TINY, "cpu", "float32")
    ours = Answer.of(LayoutImplementation(spec, True, 64), groups)
    theirs = Answer.of(PrefixGrouperImplementation(spec), groups)
    torch.testing.assert_close(theirs.log_probs, ours.log_probs, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(theirs.gradient, ours.gradient, rtol=1e-4, atol=1e-6)
    assert theirs.difference(ours)["gradient_error"] < 1e-5
