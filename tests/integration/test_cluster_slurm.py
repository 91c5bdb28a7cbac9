"""``dmpo submit --to slurm`` on a real Slurm with two nodes: interrupted, requeued under Ray, by torchrun."""

import os
import re
import shutil
import signal
import subprocess
import time

import pytest
import torch
from cluster_hosts import Network, environment, python, why_no_hosts
from cluster_slurm import Slurm, why_no_slurm
from safetensors.torch import load_file
from test_cluster_hosts import DATA, TRAIN, losses, whole_checkpoints

pytestmark = [pytest.mark.cluster, pytest.mark.integration]

NODES = ["submit.nodes=2", "submit.cpus_per_node=1"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    reason = why_no_slurm() or why_no_hosts()
    if reason:
        pytest.skip(reason)
    with Network(tmp_path_factory.mktemp("slurm")) as network:
        slurm = Slurm(network)
        yield slurm
        slurm.close()


@pytest.fixture(scope="module")
def paths(slurm):
    data = f"data.path={slurm.folder}/data"
    subprocess.run(
        python("dmpo_dist", "data", "prepare", "-c", "quickstart", *DATA, data), check=True, env=environment()
    )
    return [*TRAIN, data]


def submit(slurm, *arguments: object) -> subprocess.CompletedProcess[str]:
    return slurm.run(*python("dmpo_dist", "submit", *arguments))


def wait_for(slurm, job: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while slurm.state(job):
        assert time.monotonic() < deadline, f"job {job} is still {slurm.state(job)}"
        time.sleep(2)


def test_refusals_say_what_this_slurm_has(slurm, paths):
    run = slurm.folder / "refused"
    for more, expected in (
        (["submit.nodes=2", "submit.slurm.partition=gpu"], "no such partition; this Slurm has debug"),
        (["submit.nodes=3", "submit.cpus_per_node=1"], "this Slurm has 2 such nodes (it has 2 with 1 CPUs and 0 GPUs)"),
    ):
        done = submit(slurm, "train", "--to", "slurm", *paths, *more, f"output_dir={run}")
        assert (done.returncode, expected in done.stderr) == (2, True), done.stderr
        assert not run.exists()
        assert not slurm.run("squeue", "--noheader").stdout


def interrupted(slurm, script: str, number: signal.Signals, *arguments: object) -> tuple[int, str]:
    """Submit by a ``script`` around sbatch, with a signal when it reaches ``now``; the status and the output."""
    tools, log = slurm.folder / "tools", slurm.folder / "interrupted.log"
    tools.mkdir(exist_ok=True)
    mark = tools / "mark"
    mark.unlink(missing_ok=True)
    lines = f"real={shutil.which('sbatch')}\nnow() {{ touch {mark}; sleep 2; }}\n{script}\n"
    (tools / "sbatch").write_text(f"#!/bin/bash\n{lines}")
    (tools / "sbatch").chmod(0o755)
    env = slurm.env | {"PATH": f"{tools}:{slurm.env['PATH']}"}
    command = python("dmpo_dist", "submit", "train", "--to", "slurm", *arguments)
    process = slurm.client.start(*command, log=f"slurm/{log.name}", env=env)
    while not mark.exists():
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    for _ in range(2):  # as of one who presses twice; the whole group gets it, as from a terminal
        os.killpg(process.pid, number)
        time.sleep(0.5)
    return process.wait(timeout=100), log.read_text()


def test_an_interrupted_submission_is_cancelled_and_the_next_is_taken(slurm, paths):
    run = slurm.folder / "interrupted"
    asked = [*paths, *NODES, f"output_dir={run}"]
    before, after = 'now; exec "$real" "$@"', 'out=$("$real" "$@"); now; echo "$out"'
    for script, number in ((before, signal.SIGTERM), (after, signal.SIGINT), (after, signal.SIGHUP)):
        status, shown = interrupted(slurm, script, number, *asked)
        found = re.search(r"\ninterrupted: Slurm job (\d+) was submitted meanwhile and is stopped\n", shown)
        assert (status, found is not None) == (130, True), shown
        wait_for(slurm, found[1], 30)
        assert not slurm.run("squeue", "--noheader").stdout
        assert not list(run.iterdir())
    done = submit(slurm, "train", "--to", "slurm", *asked)
    assert done.returncode == 0, done.stderr
    assert submit(slurm, "stop", run).returncode == 0
    wait_for(slurm, re.search(r"Slurm job (\d+) is queued", done.stdout)[1], 30)


def test_a_job_that_slurm_may_take_later_is_not_forgotten(slurm, paths):
    """The controller hangs when the job is to be cancelled, and goes on when dmpo has given up."""
    run, controller = slurm.folder / "hanging", int((slurm.folder / "slurmctld.pid").read_text())
    script = f'out=$("$real" "$@"); kill -STOP {controller}; now; echo "$out"'
    try:
        status, shown = interrupted(slurm, script, signal.SIGINT, *paths, *NODES, f"output_dir={run}")
    finally:
        os.kill(controller, signal.SIGCONT)
    found = re.search(r"error: interrupted, but Slurm job (\d+) is submitted and may go on \(scancel", shown)
    assert (status, found is not None) == (2, True), shown
    assert f"end it with dmpo submit stop {run}/submit" in shown
    submit(slurm, "stop", run)
    wait_for(slurm, found[1], 30)


def test_two_nodes_to_the_end_with_a_requeue_between(slurm, paths):
    """Requeued after its second checkpoint, the job goes on from it; torchrun ends at the same weights."""
    run, whole = slurm.folder / "requeued", slurm.folder / "torchrun"
    done = submit(slurm, "train", "--to", "slurm", *paths, *NODES, f"output_dir={run}")
    assert done.returncode == 0, done.stderr
    job = re.search(r"Slurm job (\d+) is queued", done.stdout)[1]
    log = run / "submit" / f"slurm-{job}.log"
    deadline = time.monotonic() + 400
    while whole_checkpoints(run) < 2:
        assert slurm.state(job), log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.2)
    assert slurm.run("scontrol", "requeue", job).returncode == 0
    wait_for(slurm, job, 500)
    shown = log.read_text()
    assert shown.count("cluster ready: 2 nodes, 2 CPUs") == 2, shown[-4000:]
    assert "resumed from step" in shown
    assert "the run ended with status 0" in shown

    done = submit(
        slurm, "train", "--to", "slurm", *paths, *NODES, "submit.slurm.launcher=torchrun", f"output_dir={whole}"
    )
    assert done.returncode == 0, done.stderr
    job = re.search(r"Slurm job (\d+) is queued", done.stdout)[1]
    wait_for(slurm, job, 300)
    assert "the run ended with status 0" in (shown := (whole / "submit" / f"slurm-{job}.log").read_text()), shown[
        -4000:
    ]
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (run, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert losses(run) == losses(whole)
