"""The reference cache: every value where a layout asks for it, complete or refused, resumable."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import random_groups, tiny_model
from safetensors.torch import load_file, save_file

from dmpo_dist.batching.layout import lay_out
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.logprobs import LogProbModel
from dmpo_dist.modeling.routing import use_backend
from dmpo_dist.training import reference
from dmpo_dist.training.groups import with_negatives
from dmpo_dist.training.reference import ReferencePass

K, EPOCHS = 2, 3
KEY = {"base": "digest", "rows": "fingerprint"}


pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture
def blocks_of_three(monkeypatch):
    monkeypatch.setattr(reference, "BLOCK", 3)


class Counted:
    """A reference that counts its forwards."""

    def __init__(self, model):
        use_backend(model, "two_part")
        self.model, self.calls = LogProbModel(model, "whole"), 0

    def __call__(self, layout):
        self.calls += 1
        return self.model(layout, "reference")


def the_pass(log_probs, negatives=K):
    return ReferencePass(log_probs, negatives, EPOCHS, 200, True, torch.device("cpu"), 0, 1, say=lambda text: None)


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama").requires_grad_(False)


@pytest.fixture(scope="module")
def groups():
    """Ragged: 1 to 5 negatives; the histories of some are scored, which no reference is asked for."""
    return [replace(g, prefix_scored=(1, 2) if len(g.prefix) > 2 else ()) for g in random_groups(7, seed=5, k=5)]


def test_every_epoch_finds_what_a_forward_would_give(llama, groups, blocks_of_three):
    log_probs = Counted(llama)
    cache = the_pass(log_probs).run(groups)
    for epoch in range(EPOCHS):
        for members in ([0], [6, 2, 4], [1, 3, 5]):
            layout = lay_out([with_negatives(groups[g], K, epoch * K) for g in members], shared=True)
            with torch.no_grad():
                torch.testing.assert_close(cache(layout, members, epoch), log_probs(layout), rtol=1e-6, atol=1e-5)


def test_a_cache_on_disk_is_computed_once_and_goes_on_after_an_interruption(llama, groups, blocks_of_three, tmp_path):
    first = Counted(llama)
    whole = the_pass(first).run(groups, tmp_path, KEY)
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "key.json").read_text())["rows"] == "fingerprint"

    again = Counted(llama)
    assert torch.equal(the_pass(again).run(groups, tmp_path, KEY).values.nan_to_num(), whole.values.nan_to_num())
    assert again.calls == 0

    (folder / "complete.json").unlink()
    (folder / "block-00001.safetensors").unlink()
    interrupted = Counted(llama)
    resumed = the_pass(interrupted).run(groups, tmp_path, KEY)
    assert 0 < interrupted.calls < first.calls
    torch.testing.assert_close(resumed.values, whole.values, equal_nan=True)

    the_pass(Counted(llama)).run(groups, tmp_path, KEY | {"rows": "other"})
    the_pass(Counted(llama), negatives=1).run(groups, tmp_path, KEY)
    assert len(list(tmp_path.iterdir())) == 3, "other data or other candidates never share a cache"


def missing(folder):
    (folder / "block-00001.safetensors").unlink()


def truncated(folder):
    path = folder / "block-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-20])


def reshaped(folder):
    path = folder / "block-00002.safetensors"
    save_file({"log_probs": load_file(path)["log_probs"][:, :2].contiguous()}, path)


@pytest.mark.parametrize("damage", [missing, truncated, reshaped])
def test_a_damaged_cache_is_refused(llama, groups, blocks_of_three, tmp_path, damage):
    the_pass(Counted(llama)).run(groups, tmp_path, KEY)
    (folder,) = tmp_path.iterdir()
    damage(folder)
    with pytest.raises(UserError, match=rf"{folder}/block-0000.*remove the folder"):
        the_pass(Counted(llama)).run(groups, tmp_path, KEY)


def test_a_broken_reference_is_refused(llama, groups, blocks_of_three):
    """The group is named by its number in the data, not in its block."""
    log_probs = Counted(llama)

    def broken(layout):
        of_last = groups[6].prefix == layout.input_ids[0, : len(groups[6].prefix)].tolist()  # alone in its block
        return log_probs(layout) * (torch.nan if of_last else 1.0)

    with pytest.raises(UserError, match="training group 6 .*not finite"):
        the_pass(broken).run(groups)
