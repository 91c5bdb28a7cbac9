"""The real command on a tiny grid: killed in its second cell, gone on with, grown, and with a cell that diverges."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from matplotlib.image import imread
from processes import as_rank

from dmpo_dist.cli import main
from dmpo_dist.commands.scored_parts import PARTS

pytestmark = pytest.mark.integration

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "experiment_tiny.yaml"
START, FIRST, SECOND = (
    f"runs/tiny/{name}" for name in
    ("sft/tiny_shots-all_seed-0", "cells/tiny_shots-all_k-1_dmpo_seed-0", "cells/tiny_shots-all_k-3_dmpo_seed-0")
)  # fmt: skip
DIVERGES = {"k": 1, "train.learning_rate": [1e30]}


def start(folder: Path, log: str, *options: str) -> subprocess.Popen:
    """The command in one process, as torchrun starts it, on grid.yaml."""
    command = [sys.executable, "-m", "dmpo_dist", "experiment", "grid.yaml", *options]
    with (folder / log).open("w") as file:
        return subprocess.Popen(command, cwd=folder, env=as_rank(), stdout=file, stderr=subprocess.STDOUT)


def kill_after_a_checkpoint(process: subprocess.Popen, checkpoints: Path) -> None:
    deadline = time.monotonic() + 300
    while not list(checkpoints.glob("step-????????")):
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def files_of(*folders: Path) -> dict[str, tuple[int, bytes]]:
    """All but the lock, which holds the number of the process that has the folder."""
    return {
        str(file): (file.stat().st_mtime_ns, file.read_bytes())
        for folder in folders
        for file in folder.rglob("*")
        if file.is_file() and file.name != ".lock"
    }


def test_killed_resumed_grown_and_one_cell_diverges(tmp_path, monkeypatch, capsys):
    def dmpo(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dmpo", "experiment", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load(RECIPE.read_text())
    grid = tmp_path / "grid.yaml"
    grid.write_text(yaml.safe_dump(content))
    first = start(tmp_path, "first.log")
    try:
        kill_after_a_checkpoint(first, tmp_path / SECOND / "train" / "checkpoints")
    finally:
        first.kill()
    finished = files_of(tmp_path / START, tmp_path / FIRST)
    assert any(name.endswith("done.json") for name in finished)
    assert not (tmp_path / SECOND / "done.json").exists()
    code, plan, _ = dmpo("grid.yaml", "--dry-run")
    assert code == 0
    assert f"done         {START[10:]}" in plan
    assert f"interrupted  {SECOND[10:]} (at step " in plan
    assert "1 SFT start, 2 cells: 2 done, 1 interrupted" in plan

    # what was trained or begun is bound to its settings
    before = files_of(tmp_path)
    code, _, error = dmpo("grid.yaml", "train.learning_rate=0.002")
    assert code == 2
    assert f"{FIRST[10:]} in " in error
    assert f"as were {SECOND[10:]}" in error
    assert "train.learning_rate was 0.001, is 0.002" in error
    assert "remove these folders" in error
    assert files_of(tmp_path) == before

    # on with it, and with a cell more, which cannot work
    grid.write_text(yaml.safe_dump(content | {"grid": [content["grid"], DIVERGES]}))
    second = start(tmp_path, "second.log")
    code, log = second.wait(timeout=300), (tmp_path / "second.log").read_text()
    failed = next(line for line in log.splitlines() if line.startswith(f"  {FIRST[10:]}_train.learning_rate"))
    assert code == 1, log[-4000:]
    assert "Traceback" not in log
    assert "1 failed" in log
    assert "the loss became nan" in failed or "gradient norm became" in failed
    assert "from its latest checkpoint" in log
    assert "resumed from step" in log
    assert files_of(tmp_path / START, tmp_path / FIRST) == finished
    assert (tmp_path / SECOND / "done.json").exists()

    output = tmp_path / "runs" / "tiny"
    table = pd.read_parquet(output / "experiment.parquet")
    cells = table[table["objective"].notna()]
    assert sorted(cells[cells["metric"] == "hr@1"]["k"]) == [1, 3]
    assert cells["final_train_loss"].notna().all()
    assert {"sft", "dmpo", "popularity", "oracle"} <= set(table["model"])
    assert ((table["low"] <= table["value"] + 1e-9) & (table["value"] <= table["high"] + 1e-9)).all()
    curves = pd.read_parquet(output / "curves.parquet")
    steps = curves[(curves["part"] == SECOND[10:]) & (curves["series"] == "train") & (curves["metric"] == "loss")][
        "step"
    ]
    assert steps.tolist() == [1, *range(5, 41, 5)]  # the killed and the resumed part, each step once
    assert imread(output / "k_sweep.png").std() > 0.05
    assert failed.strip() in (output / "experiment.md").read_text()
    assert not (output / PARTS).exists()

    code, plan, _ = dmpo("runs/tiny", "--dry-run")
    assert code == 0
    assert "3 cells: 3 done, 1 failed" in plan


def test_two_commands_share_a_study(tmp_path):
    short = {"steps": 10, "validate_every": 10, "checkpoint_every": 10}
    content = yaml.safe_load(RECIPE.read_text())
    content["settings"] |= {stage: content["settings"][stage] | short for stage in ("sft", "train")}
    content["grid"] = {"seed": [0, 1], "k": [1], "objective": ["dmpo"]}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content))
    logs = ("one.log", "other.log")
    commands = [start(tmp_path, log, "--share") for log in logs]
    try:
        codes = [command.wait(timeout=300) for command in commands]
    finally:
        for command in commands:
            command.kill()
    texts = [(tmp_path / log).read_text() for log in logs]
    assert codes == [0, 0], texts
    measured = sorted(line for text in texts for line in text.splitlines() if line.startswith("measured"))
    assert len(measured) == len(set(measured)) == 4, "each model was trained and measured by one of them"
    assert sum("preparing the dataset" in text for text in texts) == 1
    table = pd.read_parquet(tmp_path / "runs" / "tiny" / "experiment.parquet")
    assert set(table[table["model"] == "dmpo"]["seed"]) == {0, 1}, "the last to end wrote the tables of all"
    assert not (tmp_path / "runs" / "tiny" / PARTS).exists()
