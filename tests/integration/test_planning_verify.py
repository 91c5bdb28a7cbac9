"""Predicted against measured memory, in processes of their own."""

import os

import pytest

from dmpo_dist.planning.cases import CASES
from dmpo_dist.planning.verify import verify

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif("DMPO_SLOW" not in os.environ, reason="a minute; DMPO_SLOW=1 runs it, dmpo plan --verify more"),
]


def test_predicted_is_measured():
    case = next(case for case in CASES if case.name == "zero0, full")
    outcome = next(verify([case]))
    assert outcome.good, f"predicted {outcome.predicted / 2**20:.0f} MiB, measured {outcome.measured / 2**20:.0f} MiB"
