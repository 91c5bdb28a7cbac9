"""Two hosts in network namespaces, one of them killed during training; and what a user of several hosts gets wrong."""

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from cluster_hosts import Host, Network, environment, python, token_environment, wait_for, why_no_hosts
from safetensors.torch import load_file

from dmpo_dist.cluster.runtime import COMPLETE_FILE

pytestmark = [pytest.mark.cluster, pytest.mark.integration]

DATA = [
    "data.source.simulator.users=150", "data.source.simulator.items=40", "data.source.simulator.events_per_user=12",
    "data.evaluation_negatives=5", "data.negatives_per_group=4",
]  # fmt: skip
TRAIN = [
    "-c", "quickstart", "model.max_length=128", "model.scratch.hidden_size=32", "model.scratch.layers=2",
    "train.negatives=3", "train.steps=150", "train.global_batch_size=8", "train.validate_every=75",
    "train.checkpoint_every=15", "train.log_every=1", "cluster.workers=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    reason = why_no_hosts()
    if reason:
        pytest.skip(reason)
    with Network(tmp_path_factory.mktemp("hosts")) as network:
        yield network


@pytest.fixture(scope="module")
def data(network) -> Path:
    path = network.folder / "data"
    command = python("dmpo_dist", "data", "prepare", "-c", "quickstart", *DATA, f"data.path={path}")
    subprocess.run(command, check=True, env=environment(), capture_output=True)
    return path


@pytest.fixture(scope="module")
def token():
    return token_environment()


@pytest.fixture(scope="module")
def head(network, token) -> Host:
    """A head with room for one rank."""
    host = network.host("alpha")
    host.ray("--num-cpus=1", env=token)
    return host


def whole_checkpoints(run: Path) -> int:
    return len(list(run.glob(f"checkpoints/*-step-*/{COMPLETE_FILE}")))


def losses(run: Path) -> dict[int, float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if record["kind"] == "step"}


def test_a_host_dies_and_training_goes_on_with_another(network, head, token, data):
    """Without a setting of the network, by way of the Jobs API: the same weights as undisturbed, to the bit."""
    pytest.importorskip("aiohttp_cors", reason="the Jobs API needs ray[default]: pip install -e .[submit]")
    second = network.host("beta")
    second.ray("--num-cpus=1", env=token, head=head)
    client = Host(network, "client", f"{head.address.rpartition('.')[0]}.254", network.switch)
    (network.folder / "token").write_text(token["RAY_AUTH_TOKEN"])
    access = [f"submit.ray.address=http://{head.address}:8265", f"submit.ray.token_file={network.folder}/token"]
    run, log = network.folder / "killed", network.folder / "killed.log"
    command = python(
        "dmpo_dist", "submit", "train", "--to", "ray", *TRAIN, *access, f"data.path={data}", f"output_dir={run}"
    )
    killed = client.start(*command, log=log.name)
    deadline = time.monotonic() + 400
    while whole_checkpoints(run) < 2:
        assert killed.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.05)
    assert second.kill() > 3, "the node had no processes"
    lost = "the cluster has lost a node: cluster.workers=2 with cluster.cpus_per_worker=1 need 2 CPUs"
    wait_for(lost, log, killed, seconds=200)
    network.host("gamma").ray("--num-cpus=1", env=token, head=head)
    assert killed.wait(timeout=400) == 0, log.read_text()[-4000:]
    shown = log.read_text()
    assert "resumed from step" in shown
    assert "Traceback" not in shown

    whole = network.folder / "whole"
    done = head.run(
        *python("dmpo_dist", "train", *TRAIN, "cluster.address=auto", f"data.path={data}", f"output_dir={whole}"),
        env=token,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (run, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert losses(run) == losses(whole)


def test_a_run_shrinks_with_a_lost_host_and_grows_with_a_new_one(network, head, token, data):
    """[1, 2] workers: two, then one, then two again, to the weights of an undisturbed run."""
    second = network.host("epsilon")
    second.ray("--num-cpus=1", env=token, head=head)
    run, log = network.folder / "elastic", network.folder / "elastic.log"
    settings = [*TRAIN, "train.steps=1500", "train.learning_rate=1e-5", "train.select=last", f"data.path={data}"]
    where = ["cluster.workers=[1, 2]", "cluster.address=auto", f"output_dir={run}"]
    training = head.start(*python("dmpo_dist", "train", *settings, *where), log=log.name, env=token)
    deadline = time.monotonic() + 400
    while whole_checkpoints(run) < 2:
        assert training.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.05)
    assert second.kill() > 3, "the node had no processes"
    wait_for(" steps on 1 x cpu", log, training, seconds=300)
    network.host("zeta").ray("--num-cpus=1", env=token, head=head)
    assert training.wait(timeout=900) == 0, log.read_text()[-4000:]
    assert sizes(run) == [2, 1, 2]
    alone = network.folder / "alone"
    command = python("torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m", "dmpo_dist", "train")
    subprocess.run([*command, *settings, f"output_dir={alone}"], check=True, env=environment(), capture_output=True)
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (run, alone))
    assert max((ours[name] - theirs[name]).abs().max().item() for name in theirs) < 1e-5


def sizes(run: Path) -> list[int]:
    """Numbers of workers with which training began or went on."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["world_size"] for record in records if record["kind"] == "start"]


def test_a_node_that_lacks_data_or_shared_storage_is_named(network, head, token, data):
    """One more host, on which a folder of this machine is empty."""
    ours = network.folder / "ours"
    shutil.copytree(data, ours / "data")
    network.host("delta").ray("--num-cpus=2", env=token, head=head, hide=[ours])
    paths = ["cluster.address=auto", f"data.path={data}", f"output_dir={network.folder}/run"]
    doctor = head.run(*python("dmpo_dist", "doctor", "--cluster", *paths), env=token)
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    assert doctor.stdout.endswith("no problems found\n")
    paths = ["cluster.address=auto", f"data.path={ours}/data", f"output_dir={ours}/run"]
    doctor = head.run(*python("dmpo_dist", "doctor", "--cluster", *paths), env=token)
    assert doctor.returncode == 2, doctor.stdout + doctor.stderr
    found = doctor.stdout.replace("\n", " ")
    assert "delta" in found
    assert f"cannot read {ours}/data/dataset.json" in found
    assert f"does not see what this machine writes at output_dir {ours}/run" in found
    assert "gloo all-reduce of 16 MiB over all nodes" in found
    train = head.run(*python("dmpo_dist", "train", *TRAIN, *paths, "cluster.workers=3"), env=token)
    assert train.returncode == 2, train.stdout + train.stderr
    assert "Traceback" not in train.stderr
    assert f"on delta: output_dir {ours}/run: the driver has made it, and this node does not see it" in train.stderr


def test_a_head_that_does_not_let_us_in(network, head, token):
    """An address without a head, and a head whose token is another: one message each, and soon."""
    for address, env, expected in (
        (f"{head.address}:6390", token, "no Ray head can be reached there (Connection refused)"),
        (f"{head.address}:6379", token | {"RAY_AUTH_TOKEN": "0" * 32}, "it asks for a token (set RAY_AUTH_MODE=token"),
    ):
        done = head.run(*python("dmpo_dist", "doctor", "--cluster", f"cluster.address={address}"), env=env)
        assert done.returncode == 2
        assert expected in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
