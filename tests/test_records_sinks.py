"""A run's records reach every sink, trackers included, and a tracker that fails costs the run one warning."""

import io
import json
import re
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dmpo_dist.artifacts.log import NoteRecord
from dmpo_dist.commands.train import open_run_folder
from dmpo_dist.config import RunConfig
from dmpo_dist.errors import UserError
from dmpo_dist.records import tracking
from dmpo_dist.records.log import RunLog
from dmpo_dist.records.sinks import Background, JsonLines
from dmpo_dist.records.tracking import check_tracking
from dmpo_dist.training.job import Job

needs_wandb = pytest.mark.skipif(find_spec("wandb") is None, reason="needs wandb: pip install 'dmpo-dist[track]'")
needs_mlflow = pytest.mark.skipif(find_spec("mlflow") is None, reason="needs mlflow: pip install 'dmpo-dist[track]'")
START = {
    "kind": "start", "stage": "preference", "groups": 10, "steps": 4, "world_size": 2, "device": "cpu", "trainable": 1,
    "parameters": 1, "route": "sdpa", "route_reason": "a test", "reference": "none", "token_budget": 64, "truncated": 0,
    "deepspeed": {"zero_optimization": {"stage": 2}},
}  # fmt: skip


def train(step: int) -> dict:
    figures = {"loss": 1 / step, "margin": 0.5, "accuracy": 0.75, "groups_per_second": 8.0, "tokens_per_second": 64.0}
    slowest = {"memory_gib": 1.0, "slowest_rank": 1, "slowest_share": 1.25, "grad_norm": None}
    return {"kind": "step", "stage": "preference", "step": step, "total_steps": 4, **figures, **slowest}


def test_time_left_is_counted_anew_when_workers_start_again(tmp_path, monkeypatch):
    """They go on from a checkpoint, here from none, and may be fewer: what the first ones took says nothing."""
    now, shown = [0.0], io.StringIO()
    monkeypatch.setattr("dmpo_dist.records.log.time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    job = Job("preference", RunConfig(output_dir=tmp_path / "run"), "start", tmp_path / "run")
    open_run_folder(job.config, "train", resume=False)
    with RunLog(job, Console(file=shown, width=200)) as log:
        for seconds, record in ((0, START), (10, train(1)), (20, train(2)),
                                (1000, START), (1010, train(1)), (1012, train(2))):  # fmt: skip
            now[0] = seconds
            log(record)
    assert re.findall(r"step (\d)/4 .*?(?:ETA (.*))?\n", shown.getvalue()) == [
        ("1", ""), ("2", "0:20"), ("1", ""), ("2", "0:04"),
    ]  # fmt: skip


RECORDS = [
    START, train(1), train(2), {"kind": "validation", "step": 2, "ndcg@10": 0.5}, train(3), train(4),
    {"kind": "validation", "step": 4, "ndcg@10": 0.25}, {"kind": "end", "selected_step": 2, "model": "model"},
]  # fmt: skip


def job_of(folder: Path, **trackers: dict) -> Job:
    config = RunConfig.model_validate({"output_dir": folder, "tracking": {"tags": ["mine"], **trackers}})
    open_run_folder(config, "train", resume=False)
    return Job("preference", config, "scratch", folder)


def log_all(job: Job, records: list[dict] = RECORDS, sinks: tuple = (), append: bool = False) -> str:
    """What the display showed."""
    shown = io.StringIO()
    with RunLog(job, Console(file=shown, width=200), append=append, sinks=sinks) as log:
        for record in records:
            log(record)
    return shown.getvalue()


class Witness:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.records, self.closed = [], []

    def write(self, record):
        self.records.append(record)

    def close(self, result, finished):
        self.closed.append((dict(result), finished))


def test_every_sink_gets_every_record_and_the_final_figures(tmp_path):
    job, witness = job_of(tmp_path / "run"), Witness()
    shown = log_all(job, sinks=(witness, Background("late", lambda: time.sleep(0.2) or witness, pytest.fail)))
    written = [json.loads(line) for line in (job.output / "metrics.jsonl").read_text().splitlines()]
    assert [r | {"time": 0} for r in written] == [r | {"time": 0} for r in RECORDS]
    assert [r.kind for r in witness.records] == 2 * [r["kind"] for r in RECORDS]
    result, finished = witness.closed[0]
    assert finished
    assert result["validation/ndcg@10"] == 0.5  # of the selected step, not the last
    assert result["loss"] == 0.25
    assert witness.closed[0] == witness.closed[1]
    assert (job.output / "curves.png").exists()
    board = EventAccumulator(str(job.output / "tensorboard")).Reload()
    steps = [(r["step"], float(np.float32(r["loss"]))) for r in RECORDS if r["kind"] == "step"]
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == steps
    assert "rank 1 busiest, 1.25 x the mean" in shown


def test_what_a_killed_writer_left_is_no_part_of_the_next_record(tmp_path):
    file = tmp_path / "metrics.jsonl"
    for torn in ("", '{"kind": "no', '{"kind": "note", "text": "a"}\n{"kin'):
        file.write_text(torn)
        sink = JsonLines(file, append=True)
        sink.write(NoteRecord(kind="note", time=1.0, text="b"))
        sink.close({}, False)
        texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
        assert texts == ["a", "b"][torn.count("\n") ^ 1 :]


class Broken(Witness):
    def write(self, record):
        if record.kind == "step":
            raise ConnectionError("the server is gone\nand more")


def test_a_failing_tracker_is_one_warning(tmp_path, monkeypatch):
    def opened(job, warn):
        return [Background("broken", Broken, warn), Background("absent", lambda: 1 / 0, warn)]

    monkeypatch.setattr("dmpo_dist.records.log.open_trackers", opened)
    witness = Witness()
    shown = log_all(job_of(tmp_path / "run"), sinks=(witness,))
    assert shown.count("warning: broken failed (the server is gone); the run goes on") == 1
    assert shown.count("warning: absent failed (division by zero)") == 1
    assert len(witness.records) == len(RECORDS)
    assert "done: the weights of step 2" in shown


@needs_mlflow
def test_mlflow_in_a_local_store(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    store = f"sqlite:///{tmp_path}/mlflow.db"
    job = job_of(tmp_path / "run", mlflow={"tracking_uri": store, "experiment": "rank"}, name="first")
    check_tracking(job.config.tracking)
    assert "warning" not in log_all(job, RECORDS[:4])  # interrupted
    client = MlflowClient(store)

    def run():
        (found,) = client.search_runs([client.get_experiment_by_name("rank").experiment_id])
        return found

    assert run().info.status == "FAILED"
    assert "warning" not in log_all(job, RECORDS[4:], append=True)  # goes on in the same run
    found = run()
    assert (found.info.status, found.info.run_name) == ("FINISHED", "first")
    assert [m.value for m in client.get_metric_history(found.info.run_id, "train/loss")] == [1, 1 / 2, 1 / 3, 1 / 4]
    assert found.data.metrics["final/validation/ndcg_at_10"] == 0.5
    assert found.data.params["train.negatives"] == "7"
    assert {"mine": "yes", "dmpo": "yes", "stage": "train"}.items() <= found.data.tags.items()
    assert [a.path for a in client.list_artifacts(found.info.run_id)] == ["curves.png"]


def read_log(file: Path) -> list[bytes]:
    """The records of a file in LevelDB's log format: blocks of 32 KiB, fragments with checksum, length and type."""
    data, place, records = file.read_bytes(), 7, []  # seven bytes say that it is W&B's
    while place + 7 <= len(data):
        if (room := 32768 - place % 32768) < 7:
            place += room
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        fragment = data[place + 7 : place + 7 + length]
        whole_or_first = kind in (1, 2)
        records = [*records, fragment] if whole_or_first else [*records[:-1], records[-1] + fragment]
        place += 7 + length
    return records


@needs_wandb
def test_wandb_offline(tmp_path, monkeypatch):
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    job = job_of(tmp_path / "run", wandb={"mode": "offline", "project": "rank"})
    check_tracking(job.config.tracking)
    assert "warning" not in log_all(job)
    wandb.teardown()  # its service writes out what it holds
    (file,) = (job.output / "wandb").glob("offline-run-*/*.wandb")
    records = [Record.FromString(data) for data in read_log(file)]
    losses = [
        json.loads(item.value_json)
        for r in records
        for item in r.history.item
        if "train/loss" in [item.key, *item.nested_key]
    ]
    assert losses == [1, 1 / 2, 1 / 3, 1 / 4]
    (run,) = [r.run for r in records if r.HasField("run")]
    assert (run.display_name, run.project, run.job_type) == ("run", "rank", "train")
    assert sorted(run.tags) == ["dmpo", "mine", "train"]
    assert {c.key for c in run.config.update} >= {"train", "objective", "environment"}
    assert any("final/validation/ndcg@10" in (i.key, *i.nested_key) for r in records for i in r.summary.update)
    assert run.run_id == (job.output / "wandb-run-id").read_text().strip()


def test_what_keeps_a_tracker_from_working_is_told_first(tmp_path, monkeypatch):
    def check(**trackers):
        check_tracking(RunConfig.model_validate({"tracking": trackers}).tracking)

    if find_spec("mlflow"):
        with pytest.raises(UserError, match=r"tracking.mlflow.tracking_uri=nowhere://x: cannot be used \(.*correct it"):
            check(mlflow={"tracking_uri": "nowhere://x"})
    if find_spec("wandb"):
        for name in ("WANDB_API_KEY", "WANDB_MODE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        with pytest.raises(UserError, match="tracking.wandb: there is no API key .*mode=offline"):
            check(wandb={})
    monkeypatch.setattr(tracking, "find_spec", lambda package: None)
    for name in ("wandb", "mlflow"):
        with pytest.raises(UserError, match=rf"tracking.{name} is set, .* not installed; pip install .*track"):
            check(**{name: {}})
