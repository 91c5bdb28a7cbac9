"""The checks of ``prove.py`` under pytest: every backend on a GPU against the oracle on the CPU."""

import prove
import pytest
import torch
from conftest import tiny_model

from dmpo_dist.batching.layout import lay_out, prefix_layout
from dmpo_dist.modeling.logprobs import LogProbModel
from dmpo_dist.modeling.routing import use_backend
from dmpo_dist.modeling.self_check import confirmed, disagreement

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.fixture(autouse=True)
def _exact_fp32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def assert_passed(result):
    if result["passed"] is None:
        pytest.skip(result["why"])
    assert result["passed"], result


@pytest.mark.parametrize("backend", prove.BACKENDS)
@pytest.mark.parametrize("case", prove.CASES, ids=str)
def test_log_probs_and_gradients(case, backend):
    assert_passed(prove.check_model(case, backend, "cuda"))


@pytest.mark.parametrize("backend", ["two_part", "flex"])
@pytest.mark.parametrize("shape", prove.HEADS, ids=str)
def test_head_widths_and_groupings(shape, backend):
    assert_passed(prove.check_heads(shape, backend, "cuda"))


def test_a_layer_never_waits_for_the_device():
    assert_passed(prove.check_sync("cuda"))


def test_a_model_in_bf16_is_checked_in_fp32():
    """The flash kernels take half types alone: on an H200 the check of Gemma 3 270M ended in their error."""
    model = tiny_model("llama", **prove.SHAPE).to("cuda", torch.bfloat16).eval()
    use_backend(model, "two_part")
    module, groups = LogProbModel(model), prove.groups_of("ragged")
    seen = []

    def compare(dtype):
        with torch.no_grad():
            fused = module(prefix_layout(groups).to("cuda")).double().cpu().numpy()
            separate = module(lay_out(groups, False).to("cuda")).double().cpu().numpy()
        seen.append((dtype, disagreement([fused], [separate], dtype)))
        return "is said to differ" if dtype == torch.bfloat16 else seen[-1][1]

    assert confirmed(compare, module, torch.bfloat16) is None
    assert [dtype for dtype, _ in seen] == [torch.bfloat16, torch.float32]
