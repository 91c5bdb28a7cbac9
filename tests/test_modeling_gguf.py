"""A GGUF file as a model path: the numbers are the file's, it is converted once, and what is wrong with one is said."""

import shutil
import struct
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from gguf_files import write_gguf
from transformers import AutoModelForCausalLM

from dmpo_dist.config import ModelConfig, TemplateConfig
from dmpo_dist.data.schema import PreferenceGroup
from dmpo_dist.data.template import make_template
from dmpo_dist.data.tokenization import GroupTokenizer
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.backbone import find_model, load_for_scoring, load_tokenizer
from dmpo_dist.modeling.gguf import local_model, moved_base
from dmpo_dist.planning.model import blueprint


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dmpo_dist" / "gguf"


def test_the_numbers_are_the_files_and_a_prompt_begins_once(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    source = find_model(str(file))
    ours = load_for_scoring(str(file), ModelConfig(path=str(file)))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).eval()
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits.log_softmax(-1), theirs(ids).logits.log_softmax(-1))
    up = next(t for t in GGUFReader(file).tensors if t.name == "blk.1.ffn_up.weight")
    assert torch.equal(ours.model.layers[1].mlp.up_proj.weight, torch.from_numpy(dequantize(up.data, up.tensor_type)))

    tokenizer = load_tokenizer(source)
    template = make_template(TemplateConfig(), tokenizer)
    group = PreferenceGroup(user="u", history=("heat", "a"), positive="tea", negatives=("the", "eat"), timestamp=0)
    tokens = GroupTokenizer(tokenizer, template, 256)(group)
    for branch in tokens.branches:
        row = [*tokens.prefix, *branch]
        assert row[0] == 1
        assert row.count(1) == 1
        assert row[-1] == 2


def test_it_is_converted_once_whatever_its_name(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    (tmp_path / "LICENSE.txt").write_text("free")
    folder = Path(local_model(str(file)))
    assert "dequantised once" in capsys.readouterr().err
    assert [path.name for path in cache.iterdir()] == [folder.name]
    assert (folder / "LICENSE.txt").read_text() == "free"
    assert "license: apache-2.0" in (folder / "README.md").read_text()
    shutil.copy(file, tmp_path / "OTHER.GGUF")
    assert local_model(str(tmp_path / "OTHER.GGUF")) == str(folder)
    assert capsys.readouterr().err == ""
    write_gguf(file, seed=1)
    assert local_model(str(file)) != str(folder)
    assert blueprint(ModelConfig(path=str(file), max_length=64)).config.hidden_size == 32


def test_an_adapters_base_is_found_in_this_machines_cache(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    folder = Path(local_model(str(file)))
    assert moved_base(f"/elsewhere/dmpo_dist/gguf/{folder.name}") == str(folder)
    assert moved_base("/elsewhere/gguf/my-model") == "/elsewhere/gguf/my-model"
    with pytest.raises(UserError, match=r"GGUF file of this sha256 and is not here; use that file as model\.path once"):
        moved_base(f"/elsewhere/dmpo_dist/gguf/{'0' * 64}")


@pytest.mark.parametrize(
    ("made", "keep", "message"),
    [
        ({}, 0, r"no GGUF file|its header is cut off"),
        ({}, 500, r"its header is cut off or damaged \(500 bytes\); copy or download it again"),
        ({}, -40, r"cut off, [\d,]+ of [\d,]+ bytes are there"),
        ({"architecture": "clip"}, None, r"cannot convert its architecture 'clip' with tokenizer 'llama'"),
        ({"tokenizer": "rwkv"}, None, r"cannot convert its architecture 'llama' with tokenizer 'rwkv'"),
        ({"tokenizer": None}, None, r"holds no tokenizer"),
        ({"leave_out": "blk.1.ffn_up.weight"}, None, r"lacks 1 of the model's weights, such as model\.layers\.1\.mlp"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(
    tmp_path: Path, cache: Path, made: dict[str, str], keep: int | None, message: str
) -> None:
    file = tmp_path / "bad.gguf"
    write_gguf(file, **made)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"bad\.gguf: .*{message}"):
        find_model(str(file))
    assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.alignment", struct.pack("<II", 4, 0), "its header is cut off or damaged"),
        ("general.alignment", struct.pack("<IQ1s", 8, 1, b"x"), "its header is cut off or damaged"),
        ("split.count", struct.pack("<IH", 2, 3), "one of 3 files that hold the model together; join them by"),
    ],
)
def test_a_field_of_the_header_that_will_not_do(tmp_path: Path, key: str, value: bytes, message: str) -> None:
    file = tmp_path / "bad.gguf"
    write_gguf(file)
    magic, version, tensors, fields = struct.unpack("<4sIQQ", file.read_bytes()[:24])
    more = struct.pack("<Q", len(key)) + key.encode() + value
    file.write_bytes(struct.pack("<4sIQQ", magic, version, tensors, fields + 1) + more + file.read_bytes()[24:])
    with pytest.raises(UserError, match=rf"bad\.gguf: {message}"):
        find_model(str(file))


def test_another_kind_of_file_and_none(tmp_path: Path) -> None:
    file = tmp_path / "page.gguf"
    file.write_text("<html>" + "x" * 100)
    with pytest.raises(UserError, match=r"no GGUF file \(it begins with b'<htm'"):
        find_model(str(file))
    with pytest.raises(UserError, match=r"none\.gguf: no such GGUF file"):
        find_model(str(tmp_path / "none.gguf"))
    with pytest.raises(UserError, match=r"run `dmpo models fetch gemma3-270m --accept-terms` first"):
        find_model("gemma3-270m")


def test_a_full_disk_is_named(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    usage = namedtuple("usage", "total used free")(1, 1, 10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match=r"0\.00 GB free, but tiny\.gguf dequantised takes .*XDG_CACHE_HOME"):
        find_model(str(file))
    assert not list(cache.iterdir())
