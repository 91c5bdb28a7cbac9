"""What ``model.attention`` takes, honours and refuses."""

import pytest
import torch
from conftest import tiny_model

from dmpo_dist.errors import UserError
from dmpo_dist.modeling import routing
from dmpo_dist.modeling.routing import choose_backend, typical_routes

bf16 = {"head_dim": 16, "dtype": torch.bfloat16}

# kind, options, device, what auto takes
ROUTES = [
    ("llama", {}, "cpu", "two_part"),
    ("mistral", {"window": 16}, "cpu", "sdpa"),
    ("mistral", {"window": 512}, "cpu", "two_part"),
    ("gemma3", {"window": 16}, "cpu", "sdpa"),
    ("gemma2", {}, "cpu", "unshared"),
    ("gpt_oss", {}, "cpu", "unshared"),
    ("mamba2", {}, "cpu", "unshared"),
    ("llama", {"attention_dropout": 0.1}, "cpu", "unshared"),
    ("llama", bf16, "cuda", "two_part"),
    ("llama", {"head_dim": 16}, "cuda", "flex"),  # fp32
    ("llama", {**bf16, "head_dim": 20}, "cuda", "flex"),
    ("llama", {"head_dim": 8}, "cuda", "sdpa"),
    ("gemma3", {**bf16, "window": 16}, "cuda", "flex"),
    ("gemma2", bf16, "cuda", "flex"),
    ("gpt_oss", bf16, "cuda", "unshared"),
]


def model_of(kind, options):
    options = dict(options)
    dtype = options.pop("dtype", torch.float32)
    return tiny_model(kind, **options).to(dtype)


@pytest.mark.parametrize(("kind", "options", "device", "backend"), ROUTES)
def test_auto_takes_the_fastest_without_an_obstacle(kind, options, device, backend):
    assert choose_backend(model_of(kind, options), device, 256).backend == backend


def test_an_unproven_backend_is_passed_over_but_can_be_asked_for(monkeypatch):
    monkeypatch.setitem(routing.PROVEN, "cuda", frozenset({"sdpa", "unshared"}))
    model = model_of("llama", bf16)
    for backend in ("two_part", "flex"):
        route = choose_backend(model, "cuda", 256, backend)
        assert route.backend == backend
        assert "not yet proven on cuda" in route.reason
    passed_over = choose_backend(model, "cuda", 256)
    assert passed_over.backend == "sdpa"
    assert "two_part and flex not yet proven on cuda" in passed_over.reason


@pytest.mark.parametrize(
    ("kind", "options", "device", "asked", "why"),
    [
        ("gemma2", {}, "cpu", "two_part", "soft-capped"),
        ("gemma2", bf16, "cuda", "sdpa", "soft-capped"),
        ("mamba2", {}, "cpu", "sdpa", "registered attention|state"),
        ("gpt_oss", {}, "cpu", "two_part", "sinks"),
        ("gpt_oss", bf16, "cuda", "flex", "sinks"),
        ("mistral", {"window": 16}, "cpu", "two_part", "sliding window of 16"),
        ("llama", {}, "cpu", "flex", "no backward pass on the CPU"),
        ("llama", {}, "cuda", "two_part", "bfloat16 or float16, not float32"),
        ("llama", {**bf16, "head_dim": 20}, "cuda", "two_part", "steps of 8, not 20"),
        ("llama", {"head_dim": 8}, "cuda", "flex", "16 or more, not 8"),
    ],
)
def test_a_wrong_backend_is_refused(kind, options, device, asked, why):
    with pytest.raises(UserError, match=f"would be wrong for this model: .*({why})"):
        choose_backend(model_of(kind, options), device, 256, asked)


def test_typical_routes_speak_of_every_kind():
    for device in ("cpu", "cuda"):
        routes = dict(typical_routes(device, torch.bfloat16))
        assert len(routes) == 4
        assert all(route.reason for route in routes.values())
