"""`dmpo train` with a loss class from a file in the working directory, in one process and on Ray workers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"


def recipe() -> str:
    """The class that CONTRIBUTING shows, a hinge."""
    paragraph = CONTRIBUTING.read_text(encoding="utf-8").partition("**An objective.**")[2]
    return paragraph.partition("```python\n")[2].partition("```")[0]


@pytest.fixture(scope="module")
def project(world, tmp_path_factory):
    """A user's folder: prepared data, and a module that is on no path."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "data").symlink_to(world.data.path)
    (folder / "my_losses.py").write_text(recipe())
    return folder


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.faults)])  # a minute: nightly
def test_a_hinge_trains_and_its_first_loss_is_the_one_it_must_have(project, workers):
    """At the start no positive is ahead of a negative, so the loss is 1."""
    output = f"run-{workers}"
    settings = [
        "data.path=data", f"output_dir={output}", f"cluster.workers={workers}", "seed=0",
        "model.path=scratch", "model.max_length=128", "model.scratch.hidden_size=32", "model.scratch.layers=2",
        "model.scratch.intermediate_size=48", "model.scratch.vocab_size=400",
        "train.steps=20", "train.negatives=3", "train.global_batch_size=40", "train.learning_rate=3e-3",
        "train.log_every=1",
        "objective.import_path=my_losses:Hinge", "objective.kwargs.beta=1.0",
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    if workers == 1:
        environment |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "0"}
    command = [str(Path(sys.executable).with_name("dmpo")), "train", *settings]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    records = [json.loads(line) for line in (project / output / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "step"]
    assert losses[0] == pytest.approx(1.0, abs=1e-4)
    assert sum(losses[-5:]) / 5 < 0.8
    assert any(re.match("first preference loss 1.0000.., as it must be .1.000000", r.get("text", "")) for r in records)
    assert (project / output / "model" / "config.json").exists()
