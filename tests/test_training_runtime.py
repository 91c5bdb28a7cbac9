"""Checkpoints in a folder that ranks share."""

import threading
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from dmpo_dist.errors import UserError
from dmpo_dist.training import runtime as runtimes
from dmpo_dist.training.runtime import ProcessRuntime, await_folder


def rank_of_two(rank: int, folder: str) -> None:
    """Rank 1 does not see the latest checkpoint yet, as on NFS; both note which one they would go on from."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    runtime = ProcessRuntime(Path(folder, f"seen-by-{rank}"), keep=2, sink=lambda record: None)
    with runtime.restore(lambda folder, step: "") as found:
        Path(folder, f"found-{rank}").write_text(str(found))
    dist.destroy_process_group()


def test_all_ranks_go_on_from_the_checkpoint_that_rank_zero_finds(tmp_path):
    left_over = "seen-by-0/step-00000005"  # the run was killed before it removed the third latest one
    for name in (left_over, "seen-by-0/step-00000010", "seen-by-0/step-00000020", "seen-by-1/step-00000010"):
        (tmp_path / name).mkdir(parents=True)
    mp.spawn(rank_of_two, args=(str(tmp_path),), nprocs=2)
    latest = str(tmp_path / "seen-by-0" / "step-00000020")
    assert [(tmp_path / f"found-{rank}").read_text() for rank in (0, 1)] == [latest, latest]
    assert sorted(path.name for path in (tmp_path / "seen-by-0").iterdir()) == ["step-00000010", "step-00000020"]


def test_a_checkpoint_that_a_host_sees_late_is_waited_for(tmp_path, monkeypatch):
    late = tmp_path / "step-00000020"
    threading.Timer(0.5, late.mkdir).start()
    assert await_folder(late) == late
    monkeypatch.setattr(runtimes, "SEEN_SECONDS", 0.3)
    with pytest.raises(UserError, match="does not see it"):
        await_folder(tmp_path / "never")
