"""token_budget: auto, on a stand-in for the engine whose memory is known."""

import pytest
import torch
from conftest import random_groups

from dmpo_dist.batching.layout import group_cost
from dmpo_dist.errors import UserError
from dmpo_dist.training import budget
from dmpo_dist.training.budget import Probe

PER_TOKEN = 2**20
GROUPS = random_groups(12, seed=2, prompt=40)
LARGEST = max(group_cost(group, True).tokens for group in GROUPS)


pytestmark = pytest.mark.usefixtures("one_rank")


class Engine:
    """Takes ``PER_TOKEN`` bytes a token above a fixed share, and fails above ``limit`` tokens."""

    def __init__(self, limit: int) -> None:
        self.limit, self.peak, self.rows = limit, 0, []

    def __call__(self, row, which="policy"):
        tokens = row.physical_tokens
        if tokens > self.limit:
            raise torch.OutOfMemoryError
        self.peak = 2**30 + PER_TOKEN * tokens
        self.rows.append(tokens)
        return torch.ones(3, requires_grad=True)

    def backward(self, loss, scale_wrt_gas):
        assert loss.item() == 0, "the probe must leave no gradient"


def find(monkeypatch, free_tokens: int, limit: int = 10**9) -> tuple[int, Engine]:
    engine = Engine(limit)
    monkeypatch.setattr(budget, "peak_bytes", lambda device: engine.peak)
    monkeypatch.setattr(Probe, "_free", lambda self: int(free_tokens * PER_TOKEN / budget.SHARE))
    return Probe(engine, GROUPS, True, True, torch.device("cpu")).largest_budget(), engine


@pytest.mark.parametrize("free_tokens", [3000, 5000, 7700])
def test_the_budget_fills_the_free_memory(monkeypatch, free_tokens):
    found, engine = find(monkeypatch, free_tokens)
    assert free_tokens - 2 * budget.STEP < found <= free_tokens
    assert found - LARGEST < engine.rows[-1] <= found, "the budget itself was run"


def test_rows_never_grow_beyond_what_is_of_use(monkeypatch):
    assert find(monkeypatch, 10**6)[0] == budget.LIMITS["cpu"]


def test_a_budget_that_does_not_fit_is_halved(monkeypatch):
    found, _ = find(monkeypatch, 7900, limit=2100)
    assert found <= 2100
    assert find(monkeypatch, 10, limit=2100)[0] == LARGEST


def test_a_group_that_does_not_fit_is_refused(monkeypatch):
    with pytest.raises(UserError, match=f"group of {LARGEST} tokens does not fit"):
        find(monkeypatch, 10, limit=LARGEST - 1)
