"""Which run a checkpoint and a line of a log belong to."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from pyarrow.fs import LocalFileSystem
from rich.console import Console

from dmpo_dist.artifacts.environment import Environment
from dmpo_dist.artifacts.run_folder import failure_noted
from dmpo_dist.cluster import runtime as ray_runtime
from dmpo_dist.commands.run_folder import open_run_folder
from dmpo_dist.commands.train import _StageLogs, require_reorderable, run_stage, with_absolute_paths
from dmpo_dist.config import ClusterConfig, DataConfig, RunConfig, SFTConfig, config_of
from dmpo_dist.errors import UserError
from dmpo_dist.training.job import Job


def job_in(folder, run_id=""):
    return Job("preference", RunConfig(), "scratch", folder, run_id)


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


def test_a_new_run_in_an_old_folder_has_another_id(tmp_path):
    ids = []
    for _ in range(2):
        open_run_folder(RunConfig(output_dir=tmp_path / "run"), "train", resume=False)
        ids.append(Environment.read(tmp_path / "run").run_id)
        open_run_folder(RunConfig(output_dir=tmp_path / "run"), "train", resume=True)
        assert Environment.read(tmp_path / "run").run_id == ids[-1], "a resumed run stays the run it was"
        for file in (tmp_path / "run").iterdir():
            file.unlink()
    assert ids[0] != ids[1]


def test_a_run_is_resumed_with_its_own_settings_and_a_key_newer_than_it_at_its_default(tmp_path):
    config = RunConfig(output_dir=tmp_path / "run")
    open_run_folder(config, "train", resume=False)
    saved = tmp_path / "run" / "config.yaml"
    assert "  history_order: given\n" in saved.read_text()
    saved.write_text(saved.read_text().replace("  history_order: given\n", ""))
    open_run_folder(config, "train", resume=True)
    other = config.model_copy(update={"seed": 1, "sft": SFTConfig(history_order="shuffled")})
    with pytest.raises(UserError, match=r"differs from .* in seed, sft\.history_order; resume with the same settings"):
        open_run_folder(other, "train", resume=True)


def test_new_orders_of_histories_are_refused_before_a_run_folder_is_made():
    data = SimpleNamespace(train={"prompt": [None]}, card=SimpleNamespace(config={}), lists=lambda: [])
    config = RunConfig(sft=SFTConfig(history_order="shuffled", token_budget=256))
    with pytest.raises(UserError, match=r"sft\.token_budget=256, .* model\.max_length=512 tokens; raise"):
        require_reorderable(config, data)
    require_reorderable(config.model_copy(update={"sft": SFTConfig(history_order="shuffled")}), data)


def test_a_failed_run_does_not_block_its_folder_and_another_is_overwritten_when_asked(tmp_path):
    output = tmp_path / "run"
    config = RunConfig(output_dir=output)
    open_run_folder(config, "train", resume=False)
    with pytest.raises(RuntimeError), failure_noted(output):
        raise RuntimeError("no memory")
    (output / "submit").mkdir()
    assert "no memory" in (output / "failed.txt").read_text()
    open_run_folder(config, "train", resume=False)
    assert not (output / "failed.txt").exists()
    assert (output / "submit").is_dir(), "a job may be running from there"
    (output / "metrics.jsonl").write_text('{"kind": "checkpoint", "step": 5}\n')
    with pytest.raises(KeyboardInterrupt), failure_noted(output):
        raise KeyboardInterrupt
    with pytest.raises(UserError, match=r"exists already; .* by --resume, or remove it by --overwrite"):
        open_run_folder(config, "train", resume=False, overwrite=False)
    needed = config.model_copy(update={"data": DataConfig(path=output / "data")})
    with pytest.raises(UserError, match=r"holds .*data, which this run reads"):
        open_run_folder(needed, "train", resume=False, overwrite=True)
    open_run_folder(config, "train", resume=False, overwrite=True)
    assert not (output / "metrics.jsonl").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").touch()
    with pytest.raises(UserError, match=r"is not of a run .*: it is kept"):
        open_run_folder(RunConfig(output_dir=tmp_path / "mine"), "train", resume=False, overwrite=True)


def test_a_storage_is_as_ray_takes_it_and_refused_where_ray_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given, taken in ((None, None), ("s3://bucket/a", "s3://bucket/a"), ("store", f"{tmp_path}/store")):
        config = config_of({"data.path": "data", "cluster.storage_path": given})
        assert with_absolute_paths(config).cluster.storage_path == taken
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError, match=r"cluster\.storage_path=store has no effect without Ray .*; leave it out"):
        run_stage("preference", config, Console(quiet=True))


def test_gpus_that_are_to_stay_unused_are_hidden_or_the_key_is_refused(monkeypatch):
    """Without Ray nobody hides them: the run would be on one all the same."""
    config = config_of({"data.path": "data", "cluster.gpus_per_worker": 0})
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    for gpus, words in ((True, "gpus_per_worker=0 has no effect without Ray .*CUDA_VISIBLE_DEVICES"), (False, "data")):
        monkeypatch.setattr("torch.cuda.is_available", lambda gpus=gpus: gpus)
        with pytest.raises(UserError, match=words):  # without GPUs it comes to the data, which is not there
            run_stage("preference", config, Console(quiet=True))


class _RayTrain:
    """What ``RayRuntime`` asks of ``ray.train``, with reports that Ray may lose."""

    def __init__(self, storage, monkeypatch):
        ray_train = pytest.importorskip("ray.train")
        self.storage, self.known, self.lost = storage, [], False
        place = SimpleNamespace(storage_filesystem=LocalFileSystem(), experiment_fs_path=str(storage))
        context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1, get_storage=lambda: place)
        monkeypatch.setattr(ray_train, "get_context", lambda: context)
        monkeypatch.setattr(ray_train, "get_checkpoint", lambda: self.known[-1] if self.known else None)
        monkeypatch.setattr(ray_train, "report", self.report)
        reported = lambda *_, **__: [SimpleNamespace(checkpoint=found) for found in self.known]  # noqa: E731
        monkeypatch.setattr(ray_train, "get_all_reported_checkpoints", reported)
        monkeypatch.setattr("ray.get", lambda value: value)
        self._checkpoint = ray_train.Checkpoint
        self.queue = SimpleNamespace(unwritten=SimpleNamespace(remote=self.written_at_the_third_look))
        self.looks = 0

    def written_at_the_third_look(self):
        assert not self.marked(), "a checkpoint is whole when the log up to it is written, not before"
        self.looks += 1
        return self.looks % 3 != 0

    def marked(self):
        """Of the latest checkpoint: its mark."""
        latest = max(self.storage.iterdir(), key=lambda folder: folder.stat().st_ctime_ns)
        return list(latest.glob(ray_runtime.COMPLETE_FILE))

    def report(self, metrics, checkpoint, checkpoint_dir_name=None, checkpoint_upload_mode=None):
        if checkpoint_upload_mode is None:
            shutil.copytree(checkpoint.path, self.storage / checkpoint_dir_name)
            checkpoint = self._checkpoint(str(self.storage / checkpoint_dir_name))
        if not self.lost:
            self.known.append(checkpoint)


def restored(job):
    with ray_runtime.RayRuntime(0, job, None).restore(lambda folder, step: "") as folder:
        return None if folder is None else (folder / "step").read_text()


@pytest.mark.usefixtures("one_rank")
def test_a_run_goes_on_from_its_own_latest_whole_checkpoint(tmp_path, monkeypatch):
    """Whether or not Ray took note of it; a cut one and those of an earlier run in the same folder do not count."""
    ray_train = _RayTrain(tmp_path / "checkpoints", monkeypatch)
    job, other = job_in(tmp_path / "run", "a1"), job_in(tmp_path / "run", "b2")
    assert restored(job) is None

    def save(step):
        runtime = ray_runtime.RayRuntime(0, job, ray_train.queue)
        runtime.save(step, lambda folder: (folder / "step").write_text(str(step)))

    save(5)
    save(10)
    assert (restored(job), restored(other)) == ("10", None)
    assert len(ray_train.known) == 2, "what Ray knows is not reported again"
    ray_train.lost = True
    save(15)
    save(20)
    (next(ray_train.storage.glob("*-step-00000020-*")) / ray_runtime.COMPLETE_FILE).unlink()
    ray_train.lost = False
    assert (restored(job), len(ray_train.known)) == ("15", 3), "Ray is told of what it missed"
    left = {name.partition("step-")[2][:8] for name in map(str, ray_train.storage.iterdir())}
    assert left == {"00000005", "00000010", "00000015"}, "what Ray does not know and is cut off goes"
    assert (restored(job), len(ray_train.known)) == ("15", 3)
    assert restored(other) is None
    assert ray_train.looks == 4 * 3
    for mark in ray_train.storage.glob(f"*/{ray_runtime.COMPLETE_FILE}"):
        mark.unlink()
    assert (restored(job), restored(other), len(ray_train.known)) == ("15", None, 3), "with keep_checkpoints=1: Ray's"


@pytest.mark.usefixtures("one_rank")
def test_runs_that_share_a_storage_keep_each_others_checkpoints(tmp_path, monkeypatch):
    """Each has a Ray run, and with it a list by which Ray deletes, of its own. What lies where an earlier version or
    stages trained together left it is found, and goes when there are enough new ones, without Ray knowing of it."""
    shared = RunConfig(cluster=ClusterConfig(storage_path=str(tmp_path)))
    alone, job, other = (
        Job("preference", config, "scratch", tmp_path / "run", run_id)
        for config, run_id in ((RunConfig(), "a1"), (shared, "a1"), (shared, "b2"))
    )
    assert [ray_runtime.run_name([j]) for j in (alone, job, other)] == [
        "checkpoints", "checkpoints-run-a1", "checkpoints-run-b2",
    ]  # fmt: skip

    def save(job, ray_train, *steps):
        runtime = ray_runtime.RayRuntime(0, job, ray_train.queue)
        for step in steps:
            runtime.save(step, lambda folder, step=step: (folder / "step").write_text(str(step)))

    def left():
        return sorted(f"{f.parent.name} {f.name.rpartition('-')[0]}" for f in tmp_path.glob("checkpoints*/*-step-*"))

    before = _RayTrain(tmp_path / "checkpoints", monkeypatch)
    save(job, before, 10)
    save(other, before, 10)
    now = _RayTrain(tmp_path / "checkpoints-run-a1", monkeypatch)
    now.storage.mkdir()
    assert (restored(job), now.known) == ("10", []), "Ray would refuse a checkpoint of another folder"
    save(job, now, 15)
    assert (restored(job), len(left())) == ("15", 3), "two are kept, and one may be damaged"
    save(job, now, 20, 25)
    assert left() == [
        "checkpoints run-b2-step-00000010",
        *(f"checkpoints-run-a1 run-a1-step-000000{step}" for step in (15, 20, 25)),
    ]
    assert (restored(job), restored(other)) == ("25", "10")


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("shared", [False, True])
def test_a_run_whose_folder_was_moved_finds_its_checkpoints(tmp_path, monkeypatch, shared):
    """Their names hold that of the folder then. In shared storage they stay, as the folder may be a copy of another."""
    cluster = ClusterConfig(storage_path=str(tmp_path / "store") if shared else None)
    before, now = (
        Job("preference", RunConfig(cluster=cluster), "scratch", tmp_path / name, "a1")
        for name in ("old-step-1", "new")
    )

    def ray_train_of(job):
        storage = Path(job.config.cluster.storage_path or job.output) / ray_runtime.run_name([job])
        storage.mkdir(parents=True, exist_ok=True)
        return _RayTrain(storage, monkeypatch)

    def save(job, ray_train, *steps):
        runtime = ray_runtime.RayRuntime(0, job, ray_train.queue)
        for step in steps:
            runtime.save(step, lambda folder, step=step: (folder / "step").write_text(str(step)))

    save(before, ray_train_of(before), 10, 15, 20)
    if not shared:
        before.output.rename(now.output)
    ray_train = ray_train_of(now)
    assert (restored(now), restored(replace(now, run_id="b2"))) == ("20", None)
    save(now, ray_train, 25, 30)
    assert restored(now) == "30"
    left = {int(name.rpartition("step-")[2][:8]) for name in map(str, tmp_path.glob("**/*-a1-step-*"))}
    assert left == ({10, 15, 20, 25, 30} if shared else {20, 25, 30}), "what Ray knows it deletes itself"


def test_only_a_damaged_list_of_checkpoints_is_removed(tmp_path):
    file = tmp_path / ray_runtime.RUN_NAME / "checkpoint_manager_snapshot.json"
    ray_runtime.remove_damaged_list(file.parent)
    file.parent.mkdir()
    (file.parent / "there").mkdir()
    lists = [json.dumps({"checkpoint_results": [{"checkpoint_dir_name": name}]}) for name in ("there", "gone")]
    for text, stays in [("{}", True), (lists[0], True), (lists[1], False), ("", False), ('{"checkpoint_res', False)]:
        file.write_text(text)
        ray_runtime.remove_damaged_list(file.parent)
        assert file.exists() == stays, text
