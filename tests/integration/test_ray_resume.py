"""Two real Ray workers, killed with SIGKILL, and their driver too: training goes on and ends bit-identical."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from dmpo_dist.cluster.runtime import COMPLETE_FILE

pytestmark = [pytest.mark.integration, pytest.mark.faults]  # minutes: nightly

SETTINGS = [
    "data.source.simulator.users=150", "data.source.simulator.items=40", "data.source.simulator.events_per_user=12",
    "data.evaluation_negatives=5", "data.negatives_per_group=4", "model.max_length=128", "model.scratch.hidden_size=32",
    "model.scratch.layers=2", "sft.steps=20", "sft.validate_every=20", "sft.global_batch_size=8", "train.negatives=3",
    "train.steps=150", "train.global_batch_size=8", "train.validate_every=75", "train.checkpoint_every=15",
    "train.log_every=1",
]  # fmt: skip
STARTED: list[subprocess.Popen] = []


def start(*command: str, folder: Path, output: str) -> subprocess.Popen:
    """``python -m command`` in ``folder``, its output in the file ``output`` there."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / output).open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    STARTED.append(process)
    return process


@pytest.fixture(autouse=True)
def _nothing_stays():
    """A test that failed halfway must not leave its cluster running beside the next one."""
    yield
    for process in STARTED:
        if process.poll() is None:
            kill_all(process)


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL ``process``, which a test started, and all below it."""
    driver = psutil.Process(process.pid)
    for member in [*driver.children(recursive=True), driver]:
        if member.is_running():
            member.kill()
    process.wait()


def finish(process: subprocess.Popen, folder: Path, output: str) -> str:
    status = process.wait(timeout=500)
    text = (folder / output).read_text()
    assert status == 0, text[-4000:]
    return text


def wait_for_checkpoint(run: Path, process: subprocess.Popen) -> None:
    """Until two checkpoints of the run are whole."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        if len(whole_checkpoints(run)) == 2:
            return
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.05)
    raise AssertionError("no checkpoint appeared")


def whole_checkpoints(run: Path) -> list[Path]:
    return sorted(run.glob(f"checkpoints/*-step-*/{COMPLETE_FILE}"))


def kill_one_worker(driver: psutil.Process) -> None:
    """SIGKILL the highest-numbered Ray Train worker below ``driver``, a process this test started."""
    workers = [p for p in driver.children(recursive=True) if "TrainWorker" in " ".join(p.cmdline())]
    assert len(workers) == 2, [" ".join(p.cmdline())[:80] for p in driver.children(recursive=True)]
    workers[-1].send_signal(signal.SIGKILL)


def losses(run: Path) -> dict[int, float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if record["kind"] == "step"}


def assert_same_weights(run: Path, expected: Path) -> None:
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (run, expected))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_killed_worker_and_killed_driver(tmp_path):
    # the quickstart, which loses a worker in its second stage
    quickstart = start("dmpo_dist", "quickstart", "output_dir=all", *SETTINGS, folder=tmp_path, output="all.log")
    wait_for_checkpoint(tmp_path / "all", quickstart)
    kill_one_worker(psutil.Process(quickstart.pid))
    output = finish(quickstart, tmp_path, "all.log")
    assert "[dmpo" in output.split("resumed from step")[0].splitlines()[-1]
    assert all(output.count(f"{stage}/6") == 1 for stage in range(2, 6))
    measured = json.loads((tmp_path / "all/evaluation.json").read_text())["models"]
    assert {"dmpo", "dmpo_likelihood", "sft", "sft_continued", "oracle"} < measured.keys()
    assert len(whole_checkpoints(tmp_path / "all")) == 2, "old ones are deleted"

    # the same stage undisturbed, and under torchrun: the same weights and the same losses on the way
    stage = ["train", "-c", "all/dmpo/config.yaml"]
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dmpo_dist"]
    whole = start(*torchrun, *stage, "output_dir=whole", folder=tmp_path, output="whole.log")
    finish(whole, tmp_path, "whole.log")
    assert_same_weights(tmp_path / "all" / "dmpo", tmp_path / "whole")
    assert losses(tmp_path / "all" / "dmpo") == losses(tmp_path / "whole")

    # the same stage again, the driver and all below it killed, then resumed
    killed = start("dmpo_dist", *stage, "output_dir=killed", folder=tmp_path, output="killed.log")
    wait_for_checkpoint(tmp_path / "killed", killed)
    kill_all(killed)
    ray_list = tmp_path / "killed" / "checkpoints" / "checkpoint_manager_snapshot.json"
    ray_list.write_text(ray_list.read_text()[:100])  # as of a driver killed while Ray writes it
    resumed = start("dmpo_dist", *stage, "output_dir=killed", "--resume", folder=tmp_path, output="resumed.log")
    assert "resumed from step" in finish(resumed, tmp_path, "resumed.log")
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert (tmp_path / "killed" / "curves.png").stat().st_size > 10_000
