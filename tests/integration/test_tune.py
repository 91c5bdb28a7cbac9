"""`dmpo tune` killed with SIGKILL in its second trial and gone on with by its folder: nothing is done twice or lost."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from dmpo_dist.artifacts.tuning import Tuning
from dmpo_dist.commands.train import run_stage
from dmpo_dist.config import load_config
from dmpo_dist.records.read import read_run
from dmpo_dist.training.engine import single_rank

pytestmark = [pytest.mark.integration, pytest.mark.faults]

SPACE = "tune.space={sft.learning_rate: {choice: [0.001, 1e30]}, sft.warmup_ratio: {choice: [0, 0.5]}}"


def start(folder: Path, *words: str) -> subprocess.Popen:
    with (folder / "tune.log").open("a") as log:
        command = [sys.executable, "-m", "dmpo_dist", "tune", *words]
        return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)


def kill_in_the_second_trial(process: subprocess.Popen, output: Path) -> None:
    """SIGKILL the driver and all that it started, once the second trial has a checkpoint."""
    deadline = time.monotonic() + 1800
    while not list((output / "trials/002/run/checkpoints").glob("step-*[0-9]")):
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    driver = psutil.Process(process.pid)
    for one in [*driver.children(recursive=True), driver]:
        if one.is_running():
            one.kill()
    process.wait()


def test_killed_and_gone_on_with(world, tmp_path):
    out = tmp_path / "tuned"
    settings = [
        f"data.path={world.folder}/data", f"model.path={world.model}", f"output_dir={out}", "model.max_length=128",
        "deepspeed=zero0", "sft.learning_rate=0.003", "sft.steps=24", "sft.global_batch_size=8", "sft.validate_every=4",
        "sft.checkpoint_every=2", "sft.log_every=2", "tune.stage=sft", "tune.trials=4", "tune.earliest_stop=1", SPACE,
    ]  # fmt: skip
    first_call = start(tmp_path, *settings)
    try:
        kill_in_the_second_trial(first_call, out)
    finally:
        first_call.kill()
    first = out / "trials/001/run/metrics.jsonl"
    before = first.stat().st_mtime_ns
    again = start(tmp_path, "--resume", str(out))
    assert again.wait(timeout=1800) == 0, (tmp_path / "tune.log").read_text()[-3000:]
    assert first.stat().st_mtime_ns == before, "a trial that was over is not run again"
    assert "resumed from step" in (out / "trials/002/log.txt").read_text()

    stage, of_knn = Tuning.read(out).searches
    assert [trial.number for trial in stage.trials] == [1, 2, 3, 4]
    diverged = [trial for trial in stage.trials if trial.values["sft.learning_rate"] == 1e30]
    assert {trial.state for trial in diverged} == {"failed"}
    assert all("diverged" in trial.error or "loss became nan" in trial.error for trial in diverged)
    finished = [trial for trial in stage.trials if trial not in diverged]
    assert {trial.state for trial in finished} == {"done"}
    assert 1 <= len(finished) < 4
    assert len(of_knn.trials) == 4, "the baseline gets as many"
    for trial in finished:
        shown = read_run(out / f"trials/{trial.number:03}/run").validation["ndcg@10"]
        assert sorted(shown.index) == [0, *range(4, 25, 4)], "before and after the kill, each step once"
        assert trial.value == shown[shown.index > 0].max()
    kept = [path.parent.parent.name for path in out.glob("trials/*/run/model")]
    assert kept == [f"{stage.best.number:03}"], "only the best trial keeps its weights"
    assert not list(out.glob("trials/*/run/checkpoints"))

    # the configuration that it leaves trains to the figures of the best trial
    best = load_config([out / "best.yaml"], [f"output_dir={tmp_path}/again"])
    with single_rank():
        run_stage("sft", best, Console(quiet=True))
    figures = [
        read_run(folder).validation["ndcg@10"] for folder in (tmp_path / "again", out / "trials" / kept[0] / "run")
    ]
    assert figures[0].tolist() == figures[1].tolist()

    # more trials, but no time left for them
    late = start(tmp_path, "--resume", str(out), "tune.trials=9", "tune.hours=1e-9")
    assert late.wait(timeout=900) == 0, (tmp_path / "tune.log").read_text()[-3000:]
    assert [len(search.trials) for search in Tuning.read(out).searches] == [4, 4]
    assert json.loads((out / "tune.json").read_text())["searches"][0]["hours"] == 1e-9
