"""What is measured again, what is kept with the figures, and that a cluster is judged before a model is."""

import io
import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from rich.console import Console
from worlds import prepared

from dmpo_dist.cluster import train as ray_train
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.baseline_scores import BaselineScores
from dmpo_dist.experiment import measure
from dmpo_dist.experiment.baselines import baseline_fits
from dmpo_dist.experiment.grid import expand
from dmpo_dist.experiment.parts import make_parts
from dmpo_dist.experiment.report import write_report
from dmpo_dist.experiment.run import _measure, run_experiment
from dmpo_dist.experiment.schema import GridConfig
from dmpo_dist.experiment.stamps import progress

CONSOLE = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Split so that fitted baselines know what other users did later."""
    return {"a": prepared(tmp_path_factory.mktemp("data") / "a", split="leave_one_out")}


@pytest.fixture
def parts_of(tmp_path, data):
    """The grid and its parts under some settings of the evaluation; their models are there."""

    def make(**evaluation):
        evaluation = {"bootstrap_samples": 100} | evaluation
        grid = GridConfig.model_validate(
            {"output_dir": tmp_path / "study", "datasets": {"a": str(data["a"].path)}, "grid": {"k": 1},
             "settings": {"evaluation": evaluation}}
        )  # fmt: skip
        parts = make_parts(grid, expand(grid), data)
        for part in parts:
            part.model.mkdir(parents=True, exist_ok=True)
        return grid, parts

    return make


@pytest.mark.parametrize(
    "changed",
    [{"baselines": ["random", "item_knn"]}, {"knn_neighbours": 1}, {"ease_regularization": [1.5]},
     {"transformer": {"dropout": 0.5}}, {"bootstrap_samples": 120}],
    ids=lambda changed: next(iter(changed)),
)  # fmt: skip
def test_baselines_are_measured_again_when_their_settings_change_and_only_then(tmp_path, data, parts_of, changed):
    def measured(**evaluation):
        _, parts = parts_of(**evaluation)
        measure.measure_baselines(baseline_fits(["a"], parts, tmp_path), data, CONSOLE)
        file = tmp_path / "baselines" / "a" / "evaluation.json"
        return file.stat().st_ino, json.loads(file.read_text())

    before, _ = measured()
    assert measured(token_budget=64, order_requests=0, baseline_environment=str(tmp_path))[0] == before
    after, evaluation = measured(**changed)
    assert after != before
    assert set(evaluation["models"]) == {*changed.get("baselines", ["random", "popularity", "item_knn"]), "oracle"}
    assert measured(**changed)[0] == after


def test_models_are_scored_again_when_their_settings_change_and_the_gpu_is_free_after(
    tmp_path, data, parts_of, monkeypatch
):
    events = []

    class Scorer:
        def __init__(self, title, called, path, model, data, config, *given, here):
            assert here, "a study scores in its own process"
            self.token_budget, self.requests = config.evaluation.token_budget, len(data.test)

        def __call__(self, split):
            events.append("scored")
            if self.token_budget == 32:
                raise RuntimeError("CUDA out of memory")
            return [np.arange(6.0)] * self.requests

    monkeypatch.setattr(measure, "load_ranking_model", lambda path, config: None)
    monkeypatch.setattr(measure, "PartScorer", Scorer)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("freed"))

    def state(**evaluation):
        return progress(parts_of(**evaluation)[1][-1], data).state

    _measure(parts_of()[1][-1], data, tmp_path, CONSOLE)
    assert events == ["scored", "freed"]
    assert state() == state(baselines=["random"], knn_neighbours=3) == "done"
    assert state(bootstrap_samples=120) == state(token_budget=32) == "to evaluate"
    _measure(parts_of(token_budget=32)[1][-1], data, tmp_path, CONSOLE)
    assert events == ["scored", "freed"] * 2
    assert state() == "failed"


def test_models_that_were_trained_again_are_scored_again(tmp_path, data, parts_of, monkeypatch):
    """As where a cell's run was removed, so that it is trained again, and its evaluation was left."""
    scores = [np.arange(6.0)] * len(data["a"].test)
    monkeypatch.setattr(measure, "load_ranking_model", lambda path, config: None)
    monkeypatch.setattr(measure, "PartScorer", lambda *_, **__: lambda split: scores)

    def cell_trained(weights: str):
        part = parts_of()[1][-1]
        (part.model / "dmpo.json").write_text(json.dumps({"digests": {"model.safetensors": weights}}))
        return part

    _measure(cell_trained("1"), data, tmp_path, CONSOLE)
    assert progress(cell_trained("1"), data).state == "done"
    again = cell_trained("2")
    assert progress(again, data).state == "to evaluate"
    _measure(again, data, tmp_path, CONSOLE)
    assert progress(again, data).state == "done"


def test_what_to_know_of_the_baselines_is_kept_and_told(data, parts_of, monkeypatch):
    known = {"ease": {"settings": {"l2": 3}, "validation": {"3": 0.25, "5": 0.5}, "seconds": 2.0}}
    ease = BaselineScores({"ease": [np.arange(6.0)] * len(data["a"].test)}, {}, known)
    monkeypatch.setattr(measure, "baseline_scores", lambda *_: ease)
    grid, parts = parts_of(baselines=["popularity", "ease"])
    measure.measure_baselines(baseline_fits(["a"], parts, grid.output_dir), data, CONSOLE)
    evaluation = json.loads((grid.output_dir / "baselines" / "a" / "evaluation.json").read_text())
    assert evaluation["baselines"]["ease"].items() >= known["ease"].items()
    write_report(grid, parts, data, [])
    text = (grid.output_dir / "experiment.md").read_text()
    assert "- a: leave-one-out: what is fitted (ease) knows what other users did after a request" in text
    assert "| ease |" in text
    assert "| a | ease | 2 | 5 | 0.500 | 2 |" in text  # settings tried, the best, its NDCG@10, seconds

    grid, parts = parts_of(baselines=["popularity"])  # not measured by these settings yet
    write_report(grid, parts, data, [])
    text = (grid.output_dir / "experiment.md").read_text()
    assert "leave-one-out" not in text
    assert "| ease |" not in text


def test_a_cluster_that_is_too_small_is_no_failure_of_a_model(tmp_path, data, monkeypatch):
    def too_small(cluster, gpus):
        raise UserError("cluster.workers=1 needs 1 CPUs, but the cluster has 0")

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(ray_train, "ray_session", lambda cluster: nullcontext())
    monkeypatch.setattr(ray_train, "gpus_per_worker_of", lambda cluster: 0.0)
    monkeypatch.setattr(ray_train, "require_resources", too_small)
    grid = GridConfig.model_validate(
        {"output_dir": tmp_path, "datasets": {"a": str(data["a"].path)}, "grid": {"k": 1}}
    )  # fmt: skip
    with pytest.raises(UserError, match="the cluster has 0"):
        run_experiment(grid, CONSOLE)
    assert {file.name for file in tmp_path.rglob("*") if file.is_file()} == {".lock", "grid.yaml"}
