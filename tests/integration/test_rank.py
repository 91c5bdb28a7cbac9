"""`dmpo rank` by its real command line: a worker, then the driver killed with SIGKILL, then the rest of the users."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pyarrow.parquet as pq
import pytest

from dmpo_dist.cli import main
from dmpo_dist.config import RunConfig, ScratchModel, Simulator
from dmpo_dist.data.requests import read_catalogue, read_requests
from dmpo_dist.data.sources.simulator import simulate
from dmpo_dist.evaluation.ranking import Ranker
from dmpo_dist.modeling.backbone import make_scratch_model

pytestmark = pytest.mark.integration

USERS, TOP = 100, 7
COMMAND = [
    "rank", "--model=model", "--requests=users.parquet", "--catalogue=items.csv", "--output=ranked.parquet",
    f"--top={TOP}", "model.max_length=128", "ranking.users_per_part=2",
]  # fmt: skip


@pytest.fixture
def shop(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    titles = simulate(Simulator(users=2, items=300, events_per_user=2), 0).items["title"].tolist()
    scratch = ScratchModel(hidden_size=48, layers=2, heads=2, intermediate_size=64, vocab_size=400)
    make_scratch_model(tmp_path / "model", scratch, titles, 128, seed=0)
    pd.DataFrame({"title": titles}).to_csv("items.csv", index=False)
    histories = [titles[user : user + 3] for user in range(USERS)]
    pd.DataFrame({"user": [f"u{n}" for n in range(USERS)], "history": histories}).to_parquet("users.parquet")
    return tmp_path


def start(output: str, *more: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with Path(output).open("w") as file:
        command = [sys.executable, "-m", "dmpo_dist", *COMMAND, *more]
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def wait_for_parts(count: int, process: subprocess.Popen) -> list[Path]:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if len(parts := sorted(Path("ranked.parquet.parts").glob("part-*.parquet"))) >= count:
            return parts
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    raise AssertionError("no parts appeared")


def actors(driver: psutil.Process) -> list[psutil.Process]:
    return [p for p in driver.children(recursive=True) if "PooledWorker" in " ".join(p.cmdline())]


def test_killed_worker_and_killed_driver(shop, capsys):
    killed = start("killed.log", "cluster.workers=2")
    driver = psutil.Process(killed.pid)
    wait_for_parts(2, killed)
    worker, _ = actors(driver)
    worker.send_signal(signal.SIGKILL)
    before = len(wait_for_parts(2, killed))
    kept = {part: part.read_bytes() for part in wait_for_parts(before + 4, killed)}
    for process in [*driver.children(recursive=True), driver]:
        if process.is_running():
            process.kill()
    killed.wait()
    assert len(kept) < USERS // 2
    assert not Path("ranked.parquet").exists()

    with pytest.raises(SystemExit) as stopped:  # another --top and model would mix two rankings
        main_with("--top=9", "model.dtype=bfloat16")
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "another --top (7 before, 9 now) and model.dtype; give the same again to go on" in message

    resumed = start("resumed.log")  # by one worker, in the process itself
    assert resumed.wait(timeout=300) == 0, Path("resumed.log").read_text()[-3000:]
    assert "parts are done already" in Path("resumed.log").read_text()
    assert not Path("ranked.parquet.parts").exists()

    ranker = Ranker(
        "model", RunConfig.model_validate({"model": {"max_length": 128}}), read_catalogue(Path("items.csv")), TOP
    )
    expected = [ranker(request) for request in read_requests(Path("users.parquet"))]
    rows = pq.read_table("ranked.parquet").to_pylist()
    assert [row["user"] for row in rows] == [f"u{n}" for n in range(USERS)]
    assert rows == [vars(one) for one in expected], "as if nothing had happened, to the bit"


def main_with(*options: str) -> None:
    arguments, before = ["dmpo", *COMMAND, *options], sys.argv
    try:
        sys.argv = arguments
        main()
    finally:
        sys.argv = before
