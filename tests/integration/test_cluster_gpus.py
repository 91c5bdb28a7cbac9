"""Under a real Ray, workers that are to have no GPU see none, whatever the driver sees."""

import os
import sys

import pytest
from ray import cloudpickle

from dmpo_dist.cluster.actors import map_over_actors
from dmpo_dist.cluster.train import ray_session
from dmpo_dist.cluster.tune import END, SHARE, VALUE, Halving, run_trials
from dmpo_dist.config import ClusterConfig

pytestmark = pytest.mark.integration


class Heard:
    """A watch that keeps the reports."""

    def __init__(self):
        self.reports = []

    def began(self, trial): ...

    def reported(self, trial, report):
        self.reports.append(report)

    def ended(self, trial, error): ...

    def tick(self): ...


def seen(_):
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def look():
    return seen


def trial(job, report):
    report({SHARE: 100.0, VALUE: 0.0, END: repr(seen(job))})


def test_actors_and_trials_without_gpus_see_none(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find this file by its name
    cluster, heard = ClusterConfig(gpus_per_worker=0), Heard()
    with ray_session(cluster):
        assert [*map_over_actors(cluster, look, (), [1])] == [""]
        run_trials([1], trial, heard, cluster, 1, None, Halving(10, 3), tmp_path / "scratch")
    assert [report[END] for report in heard.reports] == ["''"]
