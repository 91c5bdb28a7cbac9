"""Which run a checkpoint and a line of a log belong to."""

import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from dmpo_dist.config import RunConfig
from dmpo_dist.orchestration.stage import _StageLogs, open_run_folder, run_id_of
from dmpo_dist.training.job import Job


def job_in(folder, run_id=""):
    return Job("train", RunConfig(), "scratch", folder, run_id)


def test_a_late_note_does_not_reopen_the_log_of_a_finished_stage(tmp_path):
    """As of a node that is lost between two stages, when no record of the second has come yet."""
    jobs = [job_in(tmp_path / name) for name in ("first", "second")]
    with _StageLogs(jobs, ["first", "second"], Console(quiet=True)) as logs:
        logs(0, {"kind": "note", "text": "trained"})
        logs(0, {"kind": "end", "selected_step": 1, "model": "m"})
        logs(0, {"kind": "note", "text": "a node was lost"})
    kinds = {
        name: [json.loads(line)["kind"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("first", "second")
    }
    assert kinds == {"first": ["note", "end"], "second": ["note"]}


def test_a_new_run_in_an_old_folder_does_not_take_its_checkpoints(tmp_path, monkeypatch):
    """Ray offers the latest checkpoint of the storage; it is another run's if the folder was made anew."""
    ray_train = pytest.importorskip("ray.train")
    from dmpo_dist.orchestration.ray_train import OWNER_FILE, _RayRuntime

    output = tmp_path / "run"
    ids = []
    for _ in range(2):
        open_run_folder(RunConfig(output_dir=output), resume=False)
        ids.append(run_id_of(output))
        open_run_folder(RunConfig(output_dir=output), resume=True)
        assert run_id_of(output) == ids[-1], "a resumed run stays the run it was"
        for file in output.iterdir():
            file.unlink()
    ranks = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    saved = tmp_path / "checkpoint"
    saved.mkdir()
    (saved / OWNER_FILE).write_text(f"{output} {ids[0]}", encoding="utf-8")
    monkeypatch.setattr(ray_train, "get_context", lambda: ranks)
    monkeypatch.setattr(ray_train, "get_checkpoint", lambda: ray_train.Checkpoint.from_directory(str(saved)))
    restored = []
    for run_id in ids:
        with _RayRuntime(0, job_in(output, run_id), None).restore() as folder:
            restored.append(folder is not None)
    assert restored == [True, False]
