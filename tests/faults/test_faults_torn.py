"""Artefacts that are torn, emptied, lost or replaced: what reads them works, or says in one message what is wrong."""

import random
from pathlib import Path

import pytest
from command_line import run, stop_before_workers
from mutations import TEARS, copy_of, replace_file
from report_folder import write_report_folder

SAMPLE = 8
MOST = {"report": 50}
"""Cases of a folder; a report takes four seconds."""
READ_BY = {
    "data": ["data check data", "rank -m model --requests users.csv --catalogue data --output new.parquet"],
    "model": ["evaluate -m a=model data.path=data model.max_length=128 output_dir=new", "plan model.path=model"],
    "adapter": ["evaluate -m a=adapter data.path=data model.max_length=128 output_dir=new"],
    "report": ["report report --output new.html", "runs list report", "runs compare report/sft report/dmpo"],
}
"""Folder -> commands that read it."""
FEW = " evaluation.baselines=[random] evaluation.order_requests=0"


@pytest.fixture
def folders(world, tmp_path, monkeypatch):
    """What a run leaves, of each kind, in the working folder."""
    monkeypatch.chdir(tmp_path)
    stop_before_workers(monkeypatch)
    (tmp_path / "users.csv").write_text(f"user,history\nu,{world.titles[0]}\n")
    for name in ("data", "model", "adapter"):
        copy_of(world.folder / name, tmp_path / f"whole/{name}")
    write_report_folder(tmp_path / "whole/report")
    for name in READ_BY:
        copy_of(tmp_path / "whole" / name, tmp_path / name)
    return tmp_path


def torn(root: Path, kind: str, file: Path, tear: str) -> list[str]:
    """What goes wrong in the commands that read the folder ``kind`` after ``tear`` of its ``file``."""
    damaged = root / kind / file
    replace_file(damaged, damaged.read_bytes())
    TEARS[tear](damaged)
    found = []
    for command in READ_BY[kind]:
        words = (command + FEW * command.startswith("evaluate")).replace("new", f"new-{random.random()}").split()
        found.append(run(f"torn: {kind}", words))
    copy_of(root / "whole" / kind, root / kind)
    return [f"{file} ({tear}): {failure}" for failure in found if failure]


def cases(root: Path) -> list[tuple[str, Path, str]]:
    """Every file of each folder with every tear."""
    return [
        (kind, path.relative_to(root / "whole" / kind), tear)
        for kind in READ_BY
        for path in sorted((root / "whole" / kind).rglob("*"))
        if path.is_file()
        for tear in TEARS
    ]


def test_a_torn_file_is_one_message(folders):
    chosen = random.Random(0).sample(cases(folders), SAMPLE)
    assert [failure for case in chosen for failure in torn(folders, *case)] == []


@pytest.mark.faults
@pytest.mark.parametrize("kind", READ_BY)
def test_every_torn_file_is_one_message(folders, kind):
    chosen = [case for case in cases(folders) if case[0] == kind]
    chosen = random.Random(kind).sample(chosen, min(len(chosen), MOST.get(kind, len(chosen))))
    assert [failure for case in chosen for failure in torn(folders, *case)] == []
