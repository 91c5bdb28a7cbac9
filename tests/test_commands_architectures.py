"""Every family's route and error, as docs/ARCHITECTURES.md states them."""

from pathlib import Path

import pytest
import torch

from dmpo_dist.commands import every_family
from dmpo_dist.commands.architectures import (
    FAMILIES,
    GRADIENT_LIMIT,
    LOG_PROB_LIMIT,
    markdown,
    measure,
    measure_every,
)

TABLE = Path(__file__).parents[1] / "docs" / "ARCHITECTURES.md"
CPU = torch.device("cpu")


def rows(text):
    """family -> (prompt, attention, why); the errors are of the machine."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {family: (prompt, attention, why) for family, prompt, attention, _, _, why in cells[1:]}


def test_the_table_lists_these_families():
    assert list(rows(TABLE.read_text(encoding="utf-8"))) == [family.name for family in FAMILIES]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_table_is_what_is_measured(family):
    measured = measure(family, CPU)
    written = rows(TABLE.read_text(encoding="utf-8"))[family.name]
    assert rows(markdown([measured], CPU))[family.name] == written, (
        "remake it: dmpo architectures --output docs/ARCHITECTURES.md"
    )
    if measured.prompt != "refused":
        assert measured.log_probs < LOG_PROB_LIMIT
        assert measured.gradients < GRADIENT_LIMIT


@pytest.mark.parametrize(
    ("kind", "prompt"), [("llama", "shared"), ("opt", "shared"), ("bart", "unshared"), ("bert", "refused")]
)
def test_families_by_their_names_alone(kind, prompt, monkeypatch):
    """As `dmpo architectures --all` measures every type of the installed transformers."""
    monkeypatch.setattr(every_family, "model_types", lambda: [kind, "no such type"])
    measured, unknown = measure_every(CPU)
    assert (measured.family, measured.prompt, unknown.prompt) == (kind, prompt, "not built")
    assert measured.exact or prompt == "refused"
    assert ", wrong" not in markdown([measured, unknown], CPU)


@pytest.mark.parametrize("name", ["Qwen3-Next", "Falcon-H1"])
def test_a_wrong_route_would_be_seen(name):
    """A state that leaks from candidate to candidate."""
    family = next(family for family in FAMILIES if family.name == name)
    measured = measure(family, CPU, "sdpa")
    assert measured.nats > 0.01
    assert not measured.exact
    assert "wrong" in markdown([measured], CPU)
