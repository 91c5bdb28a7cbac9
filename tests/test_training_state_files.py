"""A checkpoint is what was written, or the one before it is used and a line says why."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dmpo_dist.artifacts.digest import digests_of, json_digest
from dmpo_dist.config import RunConfig
from dmpo_dist.errors import UserError
from dmpo_dist.training.checkpoint import resume, save_checkpoint
from dmpo_dist.training.job import Job
from dmpo_dist.training.runtime import ProcessRuntime
from dmpo_dist.training.state_files import INDEX_FILE

pytestmark = pytest.mark.usefixtures("one_rank")

JOB = Job("preference", RunConfig(), "start", Path("run"), run_id="a1")


def engine_of(seed=0):
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    module[0].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.1)
    return SimpleNamespace(module=module, optimizer=optimizer, zero_optimization_stage=lambda: 0, global_steps=0)


def step(engine, number):
    engine.optimizer.zero_grad()
    torch.manual_seed(number)
    engine.module(torch.randn(4, 3)).square().sum().backward()
    engine.optimizer.step()


def trained(folder, steps=(1, 2, 3), job=JOB):
    """An engine after ``steps`` with a checkpoint of each in ``folder``, of which all stay."""
    engine = engine_of()
    runtime = ProcessRuntime(folder, keep=9, sink=lambda record: None)
    for number in steps:
        step(engine, number)
        save_checkpoint(runtime, engine, job, number, {"start": 0.5, "value": number / 10, "step": number})
    return engine


def resumed(folder, job=JOB, lost=lambda step, best: ""):
    """Step, best, engine and notes of a resume from ``folder``."""
    notes: list[str] = []
    engine = engine_of(seed=1)
    engine.module[0].bias.data.copy_(engine_of().module[0].bias.data)
    runtime = ProcessRuntime(folder, keep=9, sink=lambda record: notes.append(record["text"]))
    done, best, _ = resume(runtime, engine, job, lost)
    return done, best, engine, notes


def folder_of(folder, number):
    return folder / f"step-{number:08d}"


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


def part(checkpoint):
    return next(checkpoint.glob("*.safetensors"))


def scale_weights(checkpoint):
    save_file({name: 1.001 * tensor for name, tensor in load_file(part(checkpoint)).items()}, part(checkpoint))


def rewrite_index(checkpoint):
    index = json.loads((checkpoint / INDEX_FILE).read_text())
    (checkpoint / INDEX_FILE).write_text(json.dumps(index | {"step": 7}))


def empty(checkpoint):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def put_another(checkpoint):
    shutil.rmtree(checkpoint)
    shutil.copytree(folder_of(checkpoint.parent, 1), checkpoint)


DAMAGE = {
    "a flipped bit": lambda c: flip_a_bit(part(c)),
    "a cut part": lambda c: part(c).write_bytes(part(c).read_bytes()[:-9]),
    "no part": lambda c: part(c).unlink(),
    "a file written anew": scale_weights,
    "a cut index": lambda c: (c / INDEX_FILE).write_text((c / INDEX_FILE).read_text()[:40]),
    "an index that is no object": lambda c: (c / INDEX_FILE).write_text("[1]"),
    "an index written anew": rewrite_index,
    "no index": lambda c: (c / INDEX_FILE).unlink(),
    "an empty folder": empty,
    "the state of another step": put_another,
}


def test_training_goes_on_to_the_same_weights(tmp_path):
    whole = trained(tmp_path)
    done, best, engine, notes = resumed(tmp_path)
    assert (done, best, notes) == (3, {"start": 0.5, "value": 0.3, "step": 3}, ["resumed from step 3"])
    for number in (4, 5):
        step(whole, number)
        step(engine, number)
    assert all(torch.equal(a, b) for a, b in zip(whole.module.parameters(), engine.module.parameters(), strict=True))


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_costs_one_checkpoint(tmp_path, how):
    trained(tmp_path)
    DAMAGE[how](folder_of(tmp_path, 3))
    done, best, _, notes = resumed(tmp_path)
    assert (done, best["step"]) == (2, 2)
    assert notes[0].startswith(f"{folder_of(tmp_path, 3)}: ")
    assert notes[0].endswith("; the checkpoint before it is used")
    assert notes[1:] == ["resumed from step 2"]


def test_what_is_no_checkpoint_of_the_run_is_left_alone(tmp_path):
    trained(tmp_path)
    for name in ("step-foo", "step-00000099.part", "other-b2-step-00000099-abcdef", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-99").mkdir()
    done, _, _, notes = resumed(tmp_path)
    assert done == 3
    assert [note.partition(":")[0] for note in notes] == [str(tmp_path / "step-99"), "resumed from step 3"]


def test_a_run_whose_checkpoints_are_all_of_no_use_is_not_begun_anew(tmp_path):
    trained(tmp_path, steps=(1,))
    with pytest.raises(UserError, match=r"none of the 1 checkpoints there can be used"):
        resumed(tmp_path, replace(JOB, run_id="b2"))
    with pytest.raises(UserError, match="none of the 1"):
        resumed(tmp_path, lost=lambda step, best: "the best weights are gone")
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError, match="its log tells of a checkpoint of step 1, and run holds none"):
        resumed(tmp_path, replace(JOB, checkpointed=1))
    assert resumed(tmp_path)[0] == 0


def test_a_state_in_several_slices_and_files_is_read_as_one(tmp_path):
    """As two ranks of ZeRO write it."""
    whole = trained(tmp_path, steps=(1,))
    checkpoint = folder_of(tmp_path, 1)
    file = part(checkpoint)
    halves: list[dict[str, torch.Tensor]] = [{}, {}]
    for key, tensor in load_file(file).items():
        kind, start, name = key.split("/", 2)
        halves[0][key] = tensor[: len(tensor) // 3].clone()
        halves[1][f"{kind}/{len(tensor) // 3}/{name}"] = tensor[len(tensor) // 3 :].clone()
    file.unlink()
    for number, half in enumerate(halves):
        save_file(half, checkpoint / f"state-{number:05d}-00000.safetensors")
    index = json.loads((checkpoint / INDEX_FILE).read_text())
    index["files"] = digests_of(checkpoint, checkpoint.glob("*.safetensors"))
    del index["digest"]
    (checkpoint / INDEX_FILE).write_text(json.dumps(index | {"digest": json_digest(index)}))
    _, _, engine, _ = resumed(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(whole.module.parameters(), engine.module.parameters(), strict=True))
