"""``dmpo submit --to ray`` against a real head with token authentication, started here and ended by its process id."""

import contextlib
import http.client
import http.server
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from processes import free_ports

ROOT = Path(__file__).parents[2]

pytest.importorskip("aiohttp_cors", reason="the Jobs API needs ray[default]: pip install -e .[submit]")
pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def head():
    """Address and token of a one-node cluster with two CPUs."""
    gcs, dashboard, client, agent_grpc, agent_http = free_ports(5)
    folder, token = Path("/tmp") / f"dmpo-{os.getpid()}", secrets.token_hex(16)  # Ray's sockets want a short path
    env = environment(token) | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    options = (
        f"--head --block --disable-usage-stats --num-cpus=2 --num-gpus=0 --node-ip-address=127.0.0.1 --port={gcs} \
        --dashboard-port={dashboard} --ray-client-server-port={client} --dashboard-agent-grpc-port={agent_grpc} \
        --dashboard-agent-listen-port={agent_http} --min-worker-port=0 --max-worker-port=0 \
        --object-store-memory=100000000 --temp-dir={folder}".split()
    )
    log = Path(f"{folder}.log")
    with log.open("w") as output:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *options]
        process = subprocess.Popen(command, env=env, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text():  # the dashboard answers before the node is there
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{dashboard}", token
    finally:
        parts = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
        for part in psutil.wait_procs(parts, timeout=10)[1]:
            part.kill()
        shutil.rmtree(folder, ignore_errors=True)
        log.unlink()


def environment(token: str) -> dict[str, str]:
    names = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
    env = {name: value for name, value in os.environ.items() if name not in names}
    path = [str(ROOT), *filter(None, [env.get("PYTHONPATH")])]
    return env | {"PYTHONPATH": os.pathsep.join(path), "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}


def dmpo(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dmpo_dist", "submit", *map(str, arguments)]
    return subprocess.run(command, env=environment(""), capture_output=True, text=True, timeout=300)


@pytest.fixture
def access(head, tmp_path):
    """Overrides that reach the cluster."""
    address, token = head
    (tmp_path / "token").write_text(token + "\n")
    return [f"submit.ray.address={address}", f"submit.ray.token_file={tmp_path}/token"]


def test_doctor_runs_there_and_its_output_comes_back(access, tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code/mine.txt").write_text("x")
    (tmp_path / "code/big.arrow").write_bytes(bytes(3 << 20))
    folder = tmp_path / "doctor"
    options = [f"submit.ray.working_dir={tmp_path}/code", "submit.ray.max_upload_mib=1", f"submit.folder={folder}"]
    done = dmpo("doctor", "--to", "ray", *access, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cluster ready: 1 nodes, 2 CPUs" in done.stdout
    assert "no problems found" in done.stdout
    assert done.stdout.count("accelerator: ") == 1, "a line of the log was shown twice"
    assert sorted(p.name for p in (folder / "upload").iterdir()) == ["config.yaml", "driver.sh", "mine.txt"]
    assert "SUCCEEDED" in dmpo("status", folder).stdout
    written = "".join(p.read_text() for p in folder.rglob("*") if p.is_file())
    assert (tmp_path / "token").read_text().strip() not in written


def test_a_job_that_waits_can_be_stopped_and_says_what_the_cluster_lacks(access, tmp_path):
    """Doctor needs no workers, so that nothing is refused before, and its driver waits for the 64 in vain."""
    folder = tmp_path / "wait"
    done = dmpo("doctor", "--to", "ray", "--detach", *access, f"submit.folder={folder}", "cluster.workers=64")
    assert done.returncode == 0, done.stderr
    assert "PENDING" in (state := dmpo("status", folder).stdout) or "RUNNING" in state
    assert "STOPPED" in dmpo("stop", folder).stdout
    logs = dmpo("logs", folder)
    assert (logs.returncode, "ended as STOPPED" in logs.stderr) == (2, True)


@contextlib.contextmanager
def slow_way(address: str, verb: str):
    """A way to the head on which requests with ``verb`` stay until let go: its address, a request came, let it go."""
    came, go = threading.Event(), threading.Event()

    class Relay(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.command == verb:
                came.set()
                go.wait(60)
            there = http.client.HTTPConnection(address.removeprefix("http://"))
            there.request(self.command, self.path, body, dict(self.headers))
            reply = there.getresponse()
            content = reply.read()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client has gone
                self.send_response(reply.status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        do_GET = do_PUT = do_POST = answer

        def log_message(self, *_: object) -> None:
            return

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Relay) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", came, go
        go.set()
        server.shutdown()


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dmpo_dist", "submit", *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment(""), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def states(address: str, token: str) -> dict[str, str]:
    there = http.client.HTTPConnection(address.removeprefix("http://"))
    there.request("GET", "/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    return {job["submission_id"]: job["status"] for job in json.load(there.getresponse()) if job["submission_id"]}


@pytest.mark.parametrize(("verb", "number"), [("PUT", signal.SIGINT), ("POST", signal.SIGINT), ("POST", signal.SIGHUP)])
def test_an_interrupted_submission_leaves_nothing_running(head, access, tmp_path, verb, number):
    """While the upload is on its way, and while the job is: what the head gets of it then is stopped."""
    folder = tmp_path / "out"
    before = states(*head)
    with slow_way(head[0], verb) as (address, came, go):
        name = f"submit.name=interrupted-{verb.lower()}-{number}"
        process = start(
            "doctor", "--to", "ray", f"submit.ray.address={address}", access[1], f"submit.folder={folder}", name
        )
        try:
            assert came.wait(60), process.communicate(timeout=1)
            os.killpg(process.pid, number)
            if verb == "POST":
                assert "waiting for the cluster's answer" in process.stderr.readline()
                os.killpg(process.pid, number)  # pressed twice
                go.set()
            _, error = process.communicate(timeout=90)
        finally:
            process.kill()
    ended = {job: state for job, state in states(*head).items() if job not in before}
    assert process.returncode == 130, error
    if verb == "PUT":
        assert (error.strip(), ended) == ("interrupted: nothing was submitted", {})
    else:
        assert "was submitted meanwhile and is stopped" in error
        assert set(ended.values()) == {"STOPPED"}
    assert not folder.exists()


def test_following_ends_by_ctrl_c_and_the_job_goes_on(access, tmp_path):
    folder = tmp_path / "out"
    process = start("doctor", "--to", "ray", *access, f"submit.folder={folder}", "cluster.workers=64")
    try:
        assert any("is submitted to" in line for line in process.stdout)
    finally:
        os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    goes_on = f"the job goes on; dmpo submit logs {folder} shows more, dmpo submit stop {folder} ends it"
    assert process.returncode == 130
    assert error.strip().removeprefix("interrupted: ") == goes_on  # that prefix where it came with the announcement
    deadline = time.monotonic() + 90
    while "RUNNING" not in (state := dmpo("status", folder).stdout):
        assert "PENDING" in state
        assert time.monotonic() < deadline
    assert "STOPPED" in dmpo("stop", folder).stdout


def test_data_that_no_node_sees_is_named_and_the_log_shows_it(access, tmp_path):
    folder = tmp_path / "missing"
    done = dmpo("train", "--to", "ray", *access, f"submit.folder={folder}", f"data.path={tmp_path}/nothing",
                f"output_dir={tmp_path}/run")  # fmt: skip
    assert done.returncode == 2
    assert f"does not see {tmp_path}/nothing" in done.stdout
    assert done.stderr == "error: the job ended as FAILED; its output is above\n"
    assert not (tmp_path / "run").exists()


def test_another_version_of_ray_is_refused(tmp_path):
    """A head of another version: its answer to /api/version is all that is looked at."""
    answer = json.dumps({"version": "4", "ray_version": "2.9.0", "ray_commit": "x", "session_name": "s"}).encode()

    class Old(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

    with http.server.HTTPServer(("127.0.0.1", 0), Old) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"submit.ray.address=http://127.0.0.1:{server.server_port}"
        done = dmpo("doctor", "--to", "ray", address, f"submit.folder={tmp_path}/out")
        server.shutdown()
    assert (done.returncode, "runs Ray 2.9.0, this is Ray" in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "out").exists()


def test_mistakes_are_named_before_anything_is_written(head, access, tmp_path):
    address, token = head
    (tmp_path / "wrong").write_text(secrets.token_hex(16))
    (tmp_path / "code").mkdir()
    (tmp_path / "code/weights.bin").write_bytes(bytes(2 << 20))
    folder = f"submit.folder={tmp_path}/out"
    paths = [f"data.path={tmp_path}/data", f"output_dir={tmp_path}/run"]
    wrong = [access[0], f"submit.ray.token_file={tmp_path}/wrong"]
    nobody = f"submit.ray.address=http://127.0.0.1:{free_ports(1)[0]}"
    cases = [
        (["doctor", nobody, access[1]], "the Ray head cannot be reached"),
        (["doctor", *wrong], "refuses the token of submit.ray.token_file"),
        (["doctor", access[0]], "asks for a token, and none was sent"),
        (["train", *access, *paths, "cluster.workers=3"], "need 3 CPUs, but the cluster has 2; lower one"),
        (["train", *access, *paths, "cluster.gpus_per_worker=1"], "need 1 GPUs, but the cluster has 0; lower one"),
        (["doctor", *access, f"submit.ray.working_dir={tmp_path}/code", "submit.ray.max_upload_mib=1"],
         "the largest are weights.bin (2.0 MiB)"),
    ]  # fmt: skip
    for (verb, *arguments), expected in cases:
        done = dmpo(verb, "--to", "ray", folder, *arguments)
        assert (done.returncode, done.stderr.startswith("error: ")) == (2, True), done.stderr
        assert expected in done.stderr
        assert "Traceback" not in done.stderr
        assert token not in done.stderr
        assert not (tmp_path / "out").exists()
