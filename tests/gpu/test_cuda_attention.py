"""The checks of ``prove.py`` under pytest: every backend on a GPU against the oracle on the CPU."""

import prove
import pytest
import torch

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
