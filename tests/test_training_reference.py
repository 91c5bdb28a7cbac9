"""The reference cache: every value where a layout asks for it, complete or refused, resumable."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import random_groups, tiny_model
from safetensors.torch import load_file, save_file

from dmpo_dist.artifacts.stamp import ModelStamp
from dmpo_dist.batching.layout import lay_out
from dmpo_dist.config import LoraConfig, ModelConfig, ScratchModel
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.backbone import ModelSource, find_model, load_policy
from dmpo_dist.modeling.logprobs import LogProbModel, unwrap_peft
from dmpo_dist.modeling.routing import use_backend
from dmpo_dist.training import reference, reference_cache
from dmpo_dist.training.groups import with_negatives
from dmpo_dist.training.reference import ReferencePass
from dmpo_dist.training.reference_cache import NOT_IN_KEY, cache_key, token_digest

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
    """Ragged: 1 to 5 negatives; the histories of some are scored, which no reference is asked for; some have levels."""
    plain = [replace(g, prefix_scored=(1, 2) if len(g.prefix) > 2 else ()) for g in random_groups(7, seed=5, k=5)]
    made = [replace(g, levels=(0, 1, *[2] * (len(g.branches) - 2))) if len(g.branches) > 3 else g for g in plain]
    assert {bool(group.levels) for group in made} == {True, False}
    return made


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


OTHER = {
    "path": "elsewhere",
    "scratch": ScratchModel(layers=1),
    "lora": LoraConfig(r=2),
    "gradient_checkpointing": True,
    "dtype": "bfloat16",
    "quantization": "nf4",
    "double_quantization": False,
    "compile": True,
    "attention": "sdpa",
    "max_length": 64,
}


@pytest.mark.parametrize("key", ModelConfig.model_fields)
def test_each_key_of_the_model_moves_the_caches_name_or_leaves_log_probs(key, llama, groups, tmp_path):
    llama.save_pretrained(tmp_path)
    source = find_model(str(tmp_path))
    before, after = ModelConfig(max_length=128), ModelConfig(max_length=128).model_copy(update={key: OTHER[key]})
    same = cache_key(before, source, "rows", "cpu") == cache_key(after, source, "rows", "cpu")
    assert same == (key in NOT_IN_KEY)
    if key in ("lora", "gradient_checkpointing"):
        assert torch.equal(reference_log_probs(source, after, groups), reference_log_probs(source, before, groups))


def reference_log_probs(source, config, groups):
    model, mode = load_policy(source, config)
    use_backend(unwrap_peft(model), "two_part")
    return LogProbModel(model, "whole" if mode == "model_copy" else mode)(lay_out(groups, True), "reference")


def test_whatever_else_a_cache_depends_on_moves_its_name(llama, groups, tmp_path, monkeypatch):
    llama.save_pretrained(tmp_path / "a")
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "b")
    config = ModelConfig(max_length=128)
    source, other = find_model(str(tmp_path / "a")), find_model(str(tmp_path / "b"))
    adapter = ModelSource(str(tmp_path / "b"), str(tmp_path / "a"), True, ModelStamp())
    keys = [cache_key(config, s, "rows", "cpu") for s in (source, other, adapter)]
    keys += [cache_key(config, source, "others", "cpu"), cache_key(config, source, "rows", "cuda")]
    monkeypatch.setattr(reference_cache, "version", lambda name: "99")
    keys.append(cache_key(config, source, "rows", "cpu"))
    assert len({json.dumps(key, sort_keys=True) for key in keys}) == len(keys)


def test_what_a_model_reads_moves_a_caches_name(llama, groups, blocks_of_three, tmp_path):
    """One token of one prompt, as where a chat template prints today's date; or a boundary that lies elsewhere."""
    first = groups[0]
    dated = replace(first, prefix=[*first.prefix[:-1], first.prefix[-1] + 1])
    moved = replace(first, prefix=[*first.prefix, 7], branches=tuple(branch[1:] for branch in first.branches))
    unscored = replace(first, scored_from=tuple(start + 1 for start in first.scored_from))
    digests = {token_digest([other, *groups[1:]]) for other in (first, dated, moved, unscored)}
    assert len(digests) == 4
    the_pass(Counted(llama)).run(groups, tmp_path, KEY)
    the_pass(Counted(llama)).run([dated, *groups[1:]], tmp_path, KEY)
    assert len(list(tmp_path.iterdir())) == 2
