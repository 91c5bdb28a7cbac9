"""What only several processes or a real Ray node can show: who is slowest, and what Prometheus reads."""

import time
import urllib.request
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dmpo_dist.artifacts.log import CheckpointRecord, StartRecord, StepRecord
from dmpo_dist.config import RunConfig
from dmpo_dist.training.busy import Stopwatch
from dmpo_dist.training.job import Job
from dmpo_dist.training.log_lines import Meter

pytestmark = pytest.mark.integration

RANKS, SLOW = 3, 1


def rank_of_three(rank: int, folder: str) -> None:
    """Two log lines; before the second, rank ``SLOW`` computes while the others wait for it in a collective."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    device = torch.device("cpu")
    watch, meter = Stopwatch(device), Meter(["loss"], device)
    dist.barrier()
    with watch.paused():
        compute(0.5)  # validation, say: nobody's training time
    meter.update({"loss": torch.tensor(1.0 + rank)}, (2, 30, 40))
    watch.lap()
    if rank == SLOW:
        compute(1.0)
    dist.barrier()
    wall, busy = watch.lap()
    sums, busy_of_ranks = meter.reduce(busy)
    torch.save((wall, busy, sums, busy_of_ranks), Path(folder, str(rank)))
    dist.barrier()
    dist.destroy_process_group()


def compute(cpu_seconds: float) -> None:
    until = time.thread_time() + cpu_seconds
    while time.thread_time() < until:
        pass


def test_the_slowest_rank_is_named_by_the_one_reduction(tmp_path):
    mp.spawn(rank_of_three, args=(str(tmp_path),), nprocs=RANKS)
    ranks = [torch.load(tmp_path / str(rank)) for rank in range(RANKS)]
    _, _, sums, busy_of_ranks = ranks[0]
    assert all(rank[2:] == (sums, busy_of_ranks) for rank in ranks)
    assert sums == {"loss": 6.0, "groups": 6.0, "physical_tokens": 90.0, "logical_tokens": 120.0}
    assert busy_of_ranks == [rank[1] for rank in ranks]
    assert busy_of_ranks.index(max(busy_of_ranks)) == SLOW
    assert busy_of_ranks[SLOW] >= 1.0
    for rank in {*range(RANKS)} - {SLOW}:  # waited as long as the other computed, and that is not being busy
        wall, busy, *_ = ranks[rank]
        assert wall >= 0.9
        assert busy < 0.5 * wall


def test_prometheus_reads_the_latest_figures_from_the_ray_node(tmp_path, monkeypatch):
    pytest.importorskip("prometheus_client", reason="the endpoint needs ray[default]: pip install -e .[submit]")
    import ray

    from dmpo_dist.cluster.gauges import RayGauges

    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "180")  # the agents of ray[default] are slow to import
    job = Job("preference", RunConfig(), "scratch", tmp_path / "a-run")
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        (node,) = ray.nodes()
        gauges, began = RayGauges(job), time.time()
        gauges.write(StartRecord(time=began))
        gauges.write(CheckpointRecord(step=5, time=began + 10))
        figures = {"loss": 0.625, "margin": -0.5, "groups_per_second": 12.5, "memory_gib": 0.5, "slowest_share": 1.5}
        gauges.write(StepRecord(step=7, time=began + 40, **figures))
        seen = scrape(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", "ray_dmpo_checkpoint_age_seconds")
    finally:
        ray.shutdown()
    assert seen["ray_dmpo_loss"] == 0.625
    assert seen["ray_dmpo_margin"] == -0.5
    assert seen["ray_dmpo_groups_per_second"] == 12.5
    assert seen["ray_dmpo_memory_bytes"] == 2**29
    assert seen["ray_dmpo_step"] == 7
    assert seen["ray_dmpo_checkpoint_age_seconds"] == pytest.approx(30)
    assert seen["ray_dmpo_checkpoint_timestamp_seconds"] == pytest.approx(began + 10)
    assert "ray_dmpo_tokens_per_second" not in seen  # was not in the record


def scrape(url: str, wanted: str) -> dict[str, float]:
    """Our gauges, once ``wanted`` has come; all must carry the run and its stage."""
    deadline = time.monotonic() + 120
    text = ""
    while time.monotonic() < deadline:
        try:
            text = urllib.request.urlopen(url, timeout=10).read().decode()
        except OSError:
            text = ""
        if f"\n{wanted}" in text:
            break
        time.sleep(1)
    ours = [line for line in text.splitlines() if line.startswith("ray_dmpo_")]
    assert ours, text[-2000:]
    assert all('stage="train"' in line and '/a-run"' in line for line in ours)
    return {line.partition("{")[0]: float(line.rsplit(" ", 1)[1]) for line in ours}
