"""Compiled decoder layers compute what eager ones do at any row length, adapters on and off, and stay compiled."""

import copy

import pytest
import torch
from conftest import random_groups, tiny_model
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters

from dmpo_dist.batching.layout import prefix_layout, rows_layout
from dmpo_dist.modeling.compile import compile_layers
from dmpo_dist.modeling.logprobs import LogProbModel, unwrap_peft
from dmpo_dist.modeling.routing import use_backend

pytestmark = pytest.mark.slow


def test_compiled_layers_match_eager_ones():
    eager = get_peft_model(
        tiny_model("llama", num_hidden_layers=2), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    compiled = copy.deepcopy(eager)
    for model in (eager, compiled):
        use_backend(unwrap_peft(model), "two_part")
    compile_layers(unwrap_peft(compiled), backend="aot_eager")  # inductor runs a C++ compiler for minutes
    counters.clear()
    graphs = []
    for count, seed in ((2, 0), (5, 1), (3, 2)):  # rows of three lengths
        layout = prefix_layout(random_groups(count, seed=seed))
        seen = []
        for model in (eager, compiled):
            model.zero_grad()
            wrapped = LogProbModel(model, "adapter_off")
            with torch.no_grad():
                reference = wrapped(layout, "reference")
            policy = wrapped(layout)
            (policy - reference).square().sum().backward()
            gradients = [p.grad for p in model.parameters() if p.requires_grad]
            seen.append((reference, policy, *gradients))
        for a, b in zip(*seen, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[-1] == graphs[-2], "a row of another length needs no further graph"


@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_a_run_and_a_benchmark_stay_compiled():
    """Self-check on separate rows, reference, policy and validation, of two models in a process: past torch's limit."""
    torch._dynamo.reset()
    for backend in ("two_part", "unshared"):
        model = get_peft_model(tiny_model("llama", num_hidden_layers=2), LoraConfig(r=4, target_modules="all-linear"))
        use_backend(unwrap_peft(model), backend)
        compile_layers(unwrap_peft(model), backend="eager")  # traces without making code
        wrapped = LogProbModel(model, "adapter_off")
        for count, seed in ((2, 0), (5, 1)):
            groups = random_groups(count, seed=seed)
            for layout in (
                rows_layout(groups),
                prefix_layout(groups) if backend == "two_part" else rows_layout(groups),
            ):
                with torch.no_grad():
                    wrapped(layout)
                    wrapped(layout, "reference")
                wrapped(layout).sum().backward()
