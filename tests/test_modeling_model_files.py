"""A model folder is compared with its digests before it scores; one without digests is taken as it is."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from dmpo_dist.artifacts.environment import Environment
from dmpo_dist.artifacts.stamp import ModelStamp
from dmpo_dist.config import LoraConfig, ModelConfig, TemplateConfig
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.ranking import reference_of
from dmpo_dist.evaluation.starts import starts_of
from dmpo_dist.modeling.backbone import ADAPTER, ModelSource, find_model, lora_without_effect, write_stamp
from dmpo_dist.modeling.model_files import (
    start_digests,
    start_was_changed,
    weights_digests,
    weights_key,
    written_digests,
)
from dmpo_dist.modeling.ranking_model import RankingModel

FILES = [
    "model/model.safetensors", "model/tokenizer.json", "model/config.json", "adapter/adapter_model.safetensors",
    "adapter/tokenizer.json",
]  # fmt: skip


@pytest.fixture
def folders(world, tmp_path):
    """A model and an adapter on it, as training leaves them."""
    for name in ("model", "adapter"):
        shutil.copytree(world.folder / name, tmp_path / name)
    edit_adapter(tmp_path, base_model_name_or_path="../model")
    for name in ("model", "adapter"):
        write_stamp(tmp_path / name, TemplateConfig(), stage="sft", digests=written_digests(tmp_path / name))
    return tmp_path


def edit_adapter(folders, **changes):
    file = folders / "adapter" / ADAPTER
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def scores(folder, world):
    model = RankingModel.load(str(folder), ModelConfig(max_length=128))
    return model.score(world.titles[:2], world.titles[2:5]).tolist()


@pytest.mark.parametrize("file", FILES)
def test_one_flipped_bit_is_found(folders, world, file):
    content = bytearray((folders / file).read_bytes())
    at = len(content) - 9 if file.endswith("safetensors") else content.index(b"0123456789"[1])
    content[at] ^= 1
    (folders / file).write_bytes(content)
    named = rf"{folders / file.partition('/')[0]}: {file.partition('/')[2]} is damaged or was changed"
    with pytest.raises(UserError, match=named):
        start_digests(find_model(str(folders / "adapter")))
    with pytest.raises(UserError, match=rf"{named}|no tokenizer could be loaded|cannot be used"):
        scores(folders / "adapter", world)


def test_a_changed_adapter_is_found_and_a_moved_base_is_none(folders, world):
    before = scores(folders / "adapter", world)
    (folders / "model").rename(folders / "elsewhere")
    edit_adapter(folders, base_model_name_or_path="../elsewhere")
    assert scores(folders / "adapter", world) == before
    edit_adapter(folders, lora_alpha=9)
    with pytest.raises(UserError, match=f"{ADAPTER} is damaged or was changed"):
        scores(folders / "adapter", world)
    (folders / "adapter" / "dmpo.json").unlink()
    assert scores(folders / "adapter", world) != before, "a foreign adapter is used as it is"


def test_an_adapter_is_not_used_on_a_base_that_was_trained_again(folders, world):
    base, adapter = folders / "model", folders / "adapter"
    on = weights_digests(str(base))
    assert on.keys() == {"model.safetensors"}
    write_stamp(adapter, TemplateConfig(), stage="train", digests=written_digests(adapter), base_digests=on)
    before = scores(adapter, world)
    weights = load_file(base / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, base / "model.safetensors", {"format": "pt"})
    write_stamp(base, TemplateConfig(), stage="sft", digests=written_digests(base))
    for use in (lambda: scores(adapter, world), lambda: start_digests(find_model(str(adapter)))):
        with pytest.raises(UserError, match=f"{base}: model.safetensors is not what the adapter {adapter}"):
            use()
    ModelStamp.model_validate(ModelStamp.read(adapter).content() | {"base_digests": None}).write(adapter)
    assert scores(adapter, world) != before


def test_a_start_that_was_trained_again_is_another_model(folders, world):
    run = folders / "run"
    shutil.copytree(folders / "model", run / "model")
    write_stamp(run / "model", TemplateConfig(), stage="train", start=str(folders / "adapter"))
    source = find_model(str(run / "model"))
    assert not start_was_changed(source), "nothing says what it was"
    Environment(start_digests=start_digests(find_model(str(folders / "adapter")))).write(run)
    assert not start_was_changed(source)
    assert reference_of(source, "start") == str(folders / "adapter")
    models = {"sft": str(folders / "adapter"), "dmpo": str(run / "model")}
    assert starts_of(models) == {"dmpo": "sft"}
    weights = load_file(folders / "adapter" / "adapter_model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, folders / "adapter" / "adapter_model.safetensors")
    write_stamp(folders / "adapter", TemplateConfig(), stage="sft", digests=written_digests(folders / "adapter"))
    assert start_was_changed(source)
    assert starts_of(models) == {}
    with pytest.raises(UserError, match="start: .*adapter was trained again since .*model started from it"):
        reference_of(source, "start")


def test_the_shape_of_an_adapter_that_training_goes_on_with_stays(world):
    source = find_model(str(world.adapter))
    assert lora_without_effect(source, ModelConfig()) == []
    assert lora_without_effect(source, ModelConfig(lora=LoraConfig(r=4, alpha=8))) == []
    asked = ModelConfig(lora=LoraConfig(r=32, alpha=8, variant="dora"))
    notes = lora_without_effect(source, asked)
    assert [note.split(":")[0] for note in notes] == [
        "model.lora.r=32 has no effect", "model.lora.variant=dora has no effect"
    ]  # fmt: skip
    assert lora_without_effect(find_model(str(world.model)), asked) == []


def test_a_lost_file_is_named(folders, world):
    (folders / "adapter" / "special_tokens_map.json").unlink(missing_ok=True)
    (folders / "adapter" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer.json cannot be read: No such file"):
        start_digests(find_model(str(folders / "adapter")))


def test_models_that_are_not_downloaded_have_keys_of_their_own(world):
    """Else the scores of one would be taken for those of another, as their digests are equally empty."""
    one, other = (ModelSource(name, name, False, ModelStamp()) for name in ("nobody/one", "nobody/other"))
    assert start_digests(one) == start_digests(other) == {}
    assert weights_key(one) == {"base": "nobody/one"} != weights_key(other)
    here = find_model(str(world.model))
    assert weights_key(here) == start_digests(here)
