"""Predicted against measured memory, in processes of their own."""

import pytest

from dmpo_dist.planning.cases import CASES
from dmpo_dist.planning.verify import verify

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("name", ["zero0, full", "zero2, LoRA"])
def test_predicted_is_measured(name):
    case = next(case for case in CASES if case.name == name)
    outcome = next(verify([case]))
    assert outcome.good, f"predicted {outcome.predicted / 2**20:.0f} MiB, measured {outcome.measured / 2**20:.0f} MiB"
