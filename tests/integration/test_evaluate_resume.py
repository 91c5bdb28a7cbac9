"""`dmpo evaluate` on two Ray actors, its driver killed with SIGKILL and started again: the figures of one process.

Its Ray listens for this machine alone.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest

from dmpo_dist.commands.scored_parts import PARTS

pytestmark = pytest.mark.integration


def start(world, folder: Path, out: str, *more: str) -> subprocess.Popen:
    words = [
        sys.executable, "-m", "dmpo_dist", "evaluate", "-m", f"a={world.model}", "-m", f"b={world.adapter}",
        f"data.path={world.folder}/data", f"output_dir={folder}/{out}", "model.max_length=128",
        "ranking.users_per_part=1", "evaluation.bootstrap_samples=100", "evaluation.token_budget=256",
        "evaluation.order_requests=0", "evaluation.baselines=[random]",
        "--catalogue", "evaluation.catalogue_beams=[2]", *more,
    ]  # fmt: skip
    log = (folder / f"{out}.log").open("a")
    return subprocess.Popen(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)


def finished_parts(folder: Path) -> list[Path]:
    return sorted(folder.rglob("part-*.parquet"))


def kill_after(process: subprocess.Popen, folder: Path, count: int) -> None:
    """SIGKILL the driver and all that it started, once ``count`` parts are there."""
    deadline = time.monotonic() + 300
    while len(finished_parts(folder)) < count:
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    driver = psutil.Process(process.pid)
    family = [*driver.children(recursive=True), driver]
    pids = {one.pid for one in family}
    listening = {c.laddr.ip for c in psutil.net_connections("tcp") if c.pid in pids and c.status == psutil.CONN_LISTEN}
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1"}, listening
    assert listening
    for one in family:
        if one.is_running():
            one.kill()
    process.wait()


def scores(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "scores.parquet")


def test_killed_driver(world, tmp_path):
    out = tmp_path / "actors"
    kill_after(start(world, tmp_path, "actors", "cluster.workers=2"), out / PARTS, 3)
    kept = {part: part.stat().st_mtime_ns for part in finished_parts(out)}
    words = [sys.executable, "-m", "dmpo_dist", "evaluate", "--resume", str(out)]  # the folder alone
    with (tmp_path / "actors.log").open("a") as log:
        again = subprocess.Popen(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
    assert again.wait(timeout=400) == 0, (tmp_path / "actors.log").read_text()[-3000:]
    assert len(kept) >= 3
    assert not (out / PARTS).exists()
    assert start(world, tmp_path, "alone").wait(timeout=300) == 0, (tmp_path / "alone.log").read_text()[-3000:]
    np.testing.assert_allclose(scores(out)["score"], scores(tmp_path / "alone")["score"], rtol=0, atol=1e-5)
    found = [json.loads((folder / "evaluation.json").read_text()) for folder in (out, tmp_path / "alone")]
    assert found[0]["models"] == found[1]["models"]
    assert found[0]["catalogue"] == found[1]["catalogue"]
    assert {"a", "a, 2 beams"} <= set(found[0]["catalogue"]["models"])
    told = (tmp_path / "actors.log").read_text()
    done = len(world.data.test)
    assert f"{done}/{done} users" in told
