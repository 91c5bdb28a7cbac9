"""`dmpo serve` on Ray: a copy killed with SIGKILL under load; and a server's memory over thousands of requests."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import httpx
import psutil
import pytest

pytestmark = [pytest.mark.faults, pytest.mark.integration]
pytest.importorskip("ray.serve", reason="extra [serve]")

REQUESTS = int(os.environ.get("DMPO_TEST_REQUESTS", "5000"))


@pytest.fixture
def start(world, tmp_path):
    """A server by its real command line: its process and address."""
    processes = []

    def started(*options):
        log = tmp_path / "serve.log"
        command = [sys.executable, "-m", "dmpo_dist", "serve", str(world.model), "--catalogue",
                   str(world.folder / "data"), "model.max_length=256", "serving.port=0", *options]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with log.open("w") as file:
            processes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
        deadline = time.monotonic() + 300
        while not (found := re.search(r" at (http://\S+)", log.read_text())):
            assert processes[-1].poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        return processes[-1], found[1]

    yield started
    for process in processes:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 0, "Ctrl-C ends it"


def copies(process):
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "ServeReplica" in " ".join(child.cmdline())]


def test_a_killed_copy_loses_no_request(world, start):
    process, address = start("serving.replicas=2", "serving.most_waiting=1000")
    body = {"history": world.titles[:3], "documents": world.titles[3:13]}
    expected = httpx.post(f"{address}/v1/rerank", json=body, timeout=60).json()["results"]

    async def load():
        answers = []
        async with httpx.AsyncClient(base_url=address, timeout=120) as client:

            async def one():
                answers.append(await client.post("/v1/rerank", json=body))

            tasks = []
            for number in range(200):
                tasks.append(asyncio.ensure_future(one()))
                await asyncio.sleep(0.03)
                if number == 60:
                    victim = copies(process)[0]
                    victim.send_signal(signal.SIGKILL)
            await asyncio.gather(*tasks)
        return answers, victim

    answers, victim = asyncio.run(load())
    assert not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE
    statuses = Counter(answer.status_code for answer in answers)
    assert statuses[200] + statuses[503] == 200, statuses
    assert statuses[200] >= 190, statuses
    for answer in answers:
        if answer.status_code == 503:
            assert int(answer.headers["Retry-After"]) > 0
        else:
            scores = [result["relevance_score"] for result in answer.json()["results"]]
            assert scores == pytest.approx([result["relevance_score"] for result in expected], abs=1e-5)
    deadline = time.monotonic() + 120
    while len({copy.pid for copy in copies(process)} - {victim.pid}) < 2:
        assert time.monotonic() < deadline, "another copy takes its place"
        time.sleep(0.5)


def test_memory_stays_flat(world, start):
    process, address = start("--without-ray", "serving.cache_mib=8")
    server, titles = psutil.Process(process.pid), world.titles

    async def ask(numbers):
        async with httpx.AsyncClient(base_url=address, timeout=60) as client:

            async def some(part):
                for n in part:
                    history = [titles[n % 40], titles[(n // 40) % 40], titles[(n // 1600) % 40]]
                    body = {"history": history, "documents": [f"Title {n}", titles[n % 37]]}
                    assert (await client.post("/v1/rerank", json=body)).status_code == 200

            await asyncio.gather(*(some(numbers[k::4]) for k in range(4)))

    asyncio.run(ask(range(1500)))  # fills the memory of prompts
    before = server.memory_info().rss
    asyncio.run(ask(range(1500, 1500 + REQUESTS)))
    grown = (server.memory_info().rss - before) / 2**20
    print(f"{REQUESTS} requests: {before / 2**20:.0f} MiB, then {grown:+.1f}")
    assert grown < 24
