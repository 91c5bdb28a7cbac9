"""docker/compose.yaml on the container engine of this machine: the quickstart on three containers, Ctrl-C, no token."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import time

import pytest
from cluster_hosts import ROOT, environment, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.integration]

PROJECT = f"dmpo-test-{os.getpid()}"
COMPOSE = ["docker", "compose", "--file", str(ROOT / "docker" / "compose.yaml"), "--project-name", PROJECT]
UP = [*COMPOSE, "up", "--no-build", "--no-color", "--abort-on-container-exit", "--exit-code-from", "head"]
TOKEN = environment(RAY_AUTH_TOKEN=secrets.token_hex(16))


def why_no_engine() -> str | None:
    """Why docker/compose.yaml cannot be run here; None where it can."""
    if shutil.which("docker") is None:
        return "docker is not on PATH"
    for question, answer in (
        (["version"], "no container engine answers docker"),
        (["compose", "version"], "docker has no plugin compose"),
        (["image", "inspect", "dmpo:cpu"], "no image dmpo:cpu: docker compose -f docker/compose.yaml build"),
    ):
        if subprocess.run(["docker", *question], capture_output=True).returncode:
            return answer
    return None


def compose(*arguments: str) -> str:
    """What ``docker compose`` prints."""
    done = subprocess.run([*COMPOSE, *arguments], env=TOKEN, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def running() -> list[str]:
    return compose("ps", "--services", "--status=running").split()


def health() -> str:
    command = ["docker", "inspect", f"{PROJECT}-head-1", "--format={{.State.Health.Status}}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module", autouse=True)
def project():
    """Its own containers, network and volume, gone at the end."""
    reason = why_no_engine()
    if reason:
        pytest.skip(reason)
    yield
    compose("down", "--volumes", "--timeout=0")
    left = ["docker", "ps", "--all", "--quiet", f"--filter=label=com.docker.compose.project={PROJECT}"]
    assert subprocess.run(left, capture_output=True, check=True).stdout == b""


@pytest.fixture
def up(tmp_path):
    """``docker compose up``, joined by all three nodes; and its output."""
    log = tmp_path / "up.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            UP, env=TOKEN, stdout=file, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
    wait_for("cluster ready: 3 nodes, 2 CPUs", log, process, seconds=400)
    yield process, log
    if process.poll() is None:
        compose("kill")
        process.wait(timeout=60)


def test_ctrl_c_ends_all_containers(up):
    process, log = up
    os.killpg(process.pid, signal.SIGINT)
    process.wait(timeout=60)
    assert running() == [], log.read_text()[-4000:]


def test_three_containers_run_the_quickstart(up):
    process, log = up
    assert sorted(set(running())) == ["head", "worker"]
    assert compose("exec", "-T", "head", "id", "-u").strip() == "1000"
    deadline = time.monotonic() + 240  # the first look is after 30 s, and it starts a Python
    while (state := health()) != "healthy":
        assert time.monotonic() < deadline, state
        time.sleep(2)
    assert process.wait(timeout=3600) == 0, log.read_text()[-4000:]
    assert running() == []
    assert "object store is using /tmp" not in log.read_text()
    results = json.loads(compose("run", "--rm", "--no-deps", "-T", "head", "cat", "runs/quickstart/evaluation.json"))
    ndcg = {name: values["ndcg@10"]["value"] for name, values in results["models"].items()}
    assert ndcg["popularity"] < ndcg["dmpo_likelihood"] < ndcg["oracle"]


def test_without_a_token_nothing_starts():
    done = subprocess.run(UP, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "RAY_AUTH_TOKEN is missing a value: make one, as in export RAY_AUTH_TOKEN=" in done.stderr
    assert running() == []
