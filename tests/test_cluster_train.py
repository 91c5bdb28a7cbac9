"""Starting Ray: what its workers find on their path."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dmpo_dist
from dmpo_dist.cluster.train import keep_package_first, ray_session
from dmpo_dist.config import ClusterConfig
from dmpo_dist.errors import UserError


def test_a_clone_in_the_working_directory_does_not_hide_the_package(tmp_path, monkeypatch):
    """With an editable install Python would take the folder for the package, as no real one is on the same path."""
    clone = tmp_path / "dmpo_dist"
    (clone / "docs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    keep_package_first(None)
    assert os.environ["PYTHONPATH"].split(os.pathsep)[1:] == ["/elsewhere"]
    found = [sys.executable, "-c", "import dmpo_dist.errors; print(dmpo_dist.__file__)"]  # looks in the directory first
    shown = subprocess.run(found, capture_output=True, text=True, check=True).stdout.strip()
    assert Path(shown) == Path(dmpo_dist.__file__)
    with pytest.raises(UserError, match="holds a folder dmpo_dist, which workers on 10.0.0.1:6379 would take"):
        keep_package_first("10.0.0.1:6379")

    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.chdir(Path(dmpo_dist.__file__).parents[1])  # in the clone itself lies the real one
    keep_package_first("10.0.0.1:6379")
    assert os.environ["PYTHONPATH"] == "/elsewhere"


def test_under_torchrun_no_workers_are_started_by_ray(monkeypatch):
    """They would inherit its RANK and wait for each other in vain."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(UserError, match="start it without torchrun"), ray_session(ClusterConfig(workers=1)):
        pass
