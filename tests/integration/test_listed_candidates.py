"""Training with the candidates in the prompt: two ranks and separate rows give what one rank gives, and plain torch."""

import json

import pytest
from processes import run_ranks
from test_training_invariance import job, largest_difference, project, sft_job, weights  # noqa: F401

pytestmark = pytest.mark.integration

LISTING = {"request": "From: {candidates}Next: ", "candidate": "{title}, "}
MANY = {"steps": 12, "token_budget": 800}


@pytest.fixture(scope="module")
def runs(project):  # noqa: F811
    listed = {"template": LISTING, "train": MANY}
    one = [
        job(project, "one", "zero0", **listed),
        job(project, "one-plain", "zero0", train=MANY),
        sft_job(project, "one-sft", "zero0", negatives=3, **MANY),
    ]
    unshared = {"model": {"attention": "unshared"}, "train": MANY | {"token_budget": 1200}}
    two = [
        job(project, "two", "zero2", template=LISTING, train=MANY | {"token_budget": 200}),
        job(project, "two-unshared", "zero2", template=LISTING, **unshared),
        sft_job(project, "two-sft", "zero2", negatives=3, **MANY),
    ]
    for entry in (one[2], two[2]):
        entry["config"]["template"] |= LISTING
    run_ranks(project, one, 1)
    run_ranks(project, two, 2)
    return project / "runs"


@pytest.mark.parametrize(("one", "two"), [("one", "two"), ("one", "two-unshared"), ("one-sft", "two-sft")])
def test_weights_do_not_depend_on_the_split(runs, one, two):
    assert largest_difference(weights(runs / one / "model"), weights(runs / two / "model")) < 1e-5


def test_the_list_matters_and_its_balance_is_reported(runs):
    assert largest_difference(weights(runs / "one/model"), weights(runs / "one-plain/model")) > 1e-3
    for name in ("one", "two", "one-sft"):
        notes = [r["text"] for r in json.loads((runs / name / "records.json").read_text()) if r["kind"] == "note"]
        assert any("lists of candidates the positive stands first in" in text for text in notes)
