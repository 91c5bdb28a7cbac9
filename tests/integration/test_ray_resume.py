"""Two real Ray workers, one killed with SIGKILL: training goes back to the checkpoint and ends bit-identical."""

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

pytestmark = pytest.mark.integration

SETTINGS = [
    "model.path=scratch", "model.max_length=128", "model.scratch.hidden_size=32", "model.scratch.layers=2",
    "template.preamble=", "template.request=", "template.item={title}{end}", "sft.loss_on=all_titles", "sft.steps=300",
    "sft.global_batch_size=8", "sft.checkpoint_every=50", "sft.validate_every=75", "sft.log_every=1",
    "cluster.workers=2", "deepspeed=zero2",
]  # fmt: skip


def dmpo(*arguments: str, folder: Path, **more) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dmpo_dist", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more
    )


def finish(process: subprocess.Popen, timeout: float = 240) -> str:
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output[-4000:]
    return output


def records(run: Path) -> list[dict]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_for_checkpoint(run: Path, process: subprocess.Popen) -> None:
    """Until Ray has taken note of a checkpoint; a report it has not seen yet dies with the worker."""
    snapshot = run / "checkpoints" / "checkpoint_manager_snapshot.json"
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        if snapshot.exists() and "checkpoint_20" in snapshot.read_text():
            return
        assert process.poll() is None, process.communicate()[0][-4000:]
        time.sleep(0.05)
    raise AssertionError("no checkpoint appeared")


def kill_one_worker(driver: psutil.Process) -> int:
    """SIGKILL the highest-numbered Ray Train worker below ``driver``, a process this test started."""
    workers = [p for p in driver.children(recursive=True) if "TrainWorker" in " ".join(p.cmdline())]
    assert len(workers) == 2, [" ".join(p.cmdline())[:80] for p in driver.children(recursive=True)]
    workers[-1].send_signal(signal.SIGKILL)
    return workers[-1].pid


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    small = [
        "data.source.simulator.users=120",
        "data.source.simulator.items=40",
        "data.source.simulator.events_per_user=12",
    ]
    finish(
        dmpo(
            "data",
            "prepare",
            "data.path=data",
            "data.evaluation_negatives=5",
            "data.negatives_per_group=4",
            *small,
            folder=folder,
        )
    )
    return folder


def test_killed_worker_and_resume(folder):
    whole = dmpo("sft", "data.path=data", "output_dir=whole", *SETTINGS, folder=folder)
    finish(whole)
    broken = dmpo("sft", "data.path=data", "output_dir=broken", *SETTINGS, folder=folder)
    wait_for_checkpoint(folder / "broken", broken)
    kill_one_worker(psutil.Process(broken.pid))
    output = finish(broken)
    assert "resumed from step" in output
    expected, seen = (load_file(folder / name / "model" / "model.safetensors") for name in ("whole", "broken"))
    assert expected.keys() == seen.keys()
    assert all(torch.equal(expected[name], seen[name]) for name in expected)
    losses = {r["step"]: r["loss"] for r in records(folder / "whole") if r["kind"] == "train"}
    assert {r["step"]: r["loss"] for r in records(folder / "broken") if r["kind"] == "train"} == losses

    snapshot = json.loads((folder / "broken" / "checkpoints" / "checkpoint_manager_snapshot.json").read_text())
    kept = [entry["checkpoint_dir_name"] for entry in snapshot["checkpoint_results"]]
    assert len(kept) == 2
    assert all((folder / "broken" / "checkpoints" / name).is_dir() for name in kept)

    # the driver itself is killed: --resume goes on from the checkpoint, with the same settings only
    killed = dmpo("sft", "data.path=data", "output_dir=killed", *SETTINGS, folder=folder, start_new_session=True)
    wait_for_checkpoint(folder / "killed", killed)
    family = psutil.Process(killed.pid).children(recursive=True)
    for process in [psutil.Process(killed.pid), *family]:
        if process.is_running():
            process.kill()
    killed.wait()
    again = dmpo("sft", "data.path=data", "output_dir=killed", *SETTINGS, folder=folder)
    refused = again.communicate(timeout=60)[0]
    assert again.returncode == 2
    assert "--resume" in refused
    other = dmpo(
        "sft", "data.path=data", "output_dir=killed", *SETTINGS, "sft.learning_rate=1", "--resume", folder=folder
    )
    assert "differs from" in other.communicate(timeout=60)[0]
    assert other.returncode == 2
    output = finish(dmpo("sft", "data.path=data", "output_dir=killed", *SETTINGS, "--resume", folder=folder))
    assert "resumed from step" in output
    seen = load_file(folder / "killed" / "model" / "model.safetensors")
    assert all(torch.equal(expected[name], seen[name]) for name in expected)
    assert (folder / "killed" / "curves.png").stat().st_size > 10_000
