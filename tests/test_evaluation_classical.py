"""What goes to the classical baselines and comes back, with a stand-in for RecTools; and RecTools, if installed."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from worlds import prepared

from dmpo_dist.config.evaluation import EvaluationConfig
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.classical import RUNNER, _run, classical_scores, with_unknown
from dmpo_dist.evaluation.classical_environment import baseline_python, default_environment
from dmpo_dist.evaluation.whole_catalogue import WholeCatalogue

# A runner that remembers what it was given and scores an item by its number; odd items are unknown to it.
STAND_IN = """
import json, os, shutil, sys
import pandas as pd
folder = sys.argv[-1]
shutil.copytree(folder, {seen!r})
items = pd.read_parquet(folder + "/items.parquet")["item"]
requests = pd.read_parquet(folder + "/test_requests.parquet")
number = lambda item: float("nan") if int(item[1:]) % 2 else float(item[1:])
rows = [[number(i) for i in (items if c is None else c)] for c in requests["candidates"]]
for name in json.load(open(folder + "/job.json"))["models"]:
    pd.DataFrame({{"scores": rows}}).to_parquet(folder + "/scores_" + name + ".parquet", row_group_size=7)
json.dump({{"ease": {{"seconds": 1}}}}, open(folder + "/result.json", "w"))
json.dump([sys.argv[1:], dict(os.environ)], open({seen!r} + "/run.json", "w"))
print("ease: said something")
"""


def environment(folder, body: str):
    """An environment whose interpreter runs ``body`` instead of the runner."""
    (folder / "bin").mkdir(parents=True)
    (folder / "body.py").write_text(body)
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\n[ "$2" = -c ] && exit 0\nexec {sys.executable} {folder}/body.py "$@"\n')
    python.chmod(0o755)
    return folder


# What the runner imports of RecTools, with a training that never ends; it writes its process id first.
ENDLESS = """
import os, sys, time, types
def fit(self, dataset):
    open({started!r} + ".part", "w").write(str(os.getpid()))
    os.rename({started!r} + ".part", {started!r})
    time.sleep(600)
class Any:
    User, Item, Weight, Datetime = "user", "item", "weight", "datetime"
    construct = classmethod(lambda cls, log: None)
    def __init__(self, **options): pass
Any.fit = fit
names = ("Columns Dataset IdMap Interactions BERT4RecModel EASEModel SASRecModel Trainer seed_everything").split()
for module in ("rectools", "rectools.dataset", "rectools.models", "pytorch_lightning"):
    sys.modules[module] = types.SimpleNamespace(**dict.fromkeys(names, Any), __spec__=None)
import runpy
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module", params=["time", "leave_one_out"])
def data(request, tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("split") / "data", split=request.param, allow_leaks=True)


def test_what_goes_out_and_comes_back(data, tmp_path, monkeypatch):
    catalogue = data.card.cuts is not None  # one way with each split
    seen, said = tmp_path / "seen", []
    config = EvaluationConfig(baseline_environment=environment(tmp_path / "env", STAND_IN.format(seen=str(seen))))
    inherited = "SLURM_NTASKS RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR TORCHELASTIC_RUN_ID PYTHONPATH".split()
    for name in inherited:
        monkeypatch.setenv(name, "2")
    whole = WholeCatalogue(data) if catalogue else None
    found = classical_scores(["ease"], data, config, 7, whole, said.append)
    arguments, variables = json.loads((seen / "run.json").read_text())
    assert arguments[0] == "-I", "nothing of ours on its path"
    assert not variables.keys() & set(inherited)
    assert variables["OMP_NUM_THREADS"] == "1"
    assert said == ["ease: said something"]
    assert json.loads((seen / "job.json").read_text())["seed"] == 7
    log, requests = pd.read_parquet(seen / "test_log.parquet"), pd.read_parquet(seen / "test_requests.parquet")
    events = data.interactions.set_index(["user", "item"])
    assert (events.loc[list(zip(log["user"], log["item"], strict=True)), "rating"] >= 4).all()
    asked = dict(zip(data.test["user"][:], data.test["timestamp"][:], strict=True))
    own = log[log["user"].isin(asked)]
    assert (own["timestamp"] < own["user"].map(asked)).all(), "a user's own likes end before the request"
    if data.card.cuts:
        assert log["timestamp"].max() < data.card.cuts["test"].timestamp
    for row, sent, scores in zip(data.test, requests.itertuples(), found.candidates["ease"], strict=True):
        assert list(sent.history) == row["history_items"]
        group = [row["positive_item"], *row["negative_items"]]
        if not catalogue:
            assert list(sent.candidates) == sorted(group), "their order must not tell the positive"
        numbers = np.array([int(item[1:]) for item in group])
        known = numbers % 2 == 0
        if known.any():
            np.testing.assert_array_equal(scores[known], numbers[known])
            assert (scores[~known] == numbers[known].min() - 1).all()
    if catalogue:
        numbers = np.array([int(item[1:]) for item in data.items["item"]])
        scores = np.where(numbers % 2 == 0, numbers, numbers[numbers % 2 == 0].min() - 1).astype(float)
        expected = WholeCatalogue(data).scored([np.tile(scores, (len(data.test), 1))])
        assert len(data.test) > 7, "more than one row group comes back"
        np.testing.assert_array_equal(found.catalogue["ease"].shown, expected.shown)
        for metric, values in expected.metrics.items():
            np.testing.assert_array_equal(found.catalogue["ease"].metrics[metric], values)


def test_unknown_items_come_last_and_unknown_users_get_the_popular():
    scores = with_unknown(np.array([np.nan, 3.0, -1.0, np.nan]), np.array([9.0, 1, 1, 9]))
    assert scores.tolist() == [-2, 3, -1, -2]
    assert with_unknown(np.full(3, np.nan), np.array([2.0, 5, 0])).tolist() == [2, 5, 0]


def test_failures_say_what_to_do(data, tmp_path):
    broken = EvaluationConfig(
        baseline_environment=environment(tmp_path / "broken", "raise SystemExit('no memory left')")
    )
    with pytest.raises(UserError, match=r"failed in .*broken \(exit 1\):\nno memory left\nleave them out"):
        classical_scores(["ease"], data, broken, 0, None, print)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="none: is no environment with RecTools .it has no bin/python.; name one that"):
        baseline_python(tmp_path / "none", print)


def test_training_ends_with_the_command_that_asked_for_it(world, tmp_path):
    started = tmp_path / "started"
    folder = environment(tmp_path / "env", ENDLESS.format(started=str(started)))
    command = Path(sys.executable).with_name("dmpo")
    settings = [f"data.path={world.folder / 'data'}", f"output_dir={tmp_path / 'out'}", "evaluation.baselines=[ease]"]
    asked = [sys.executable, command, "evaluate", *settings, f"evaluation.baseline_environment={folder}"]
    with subprocess.Popen(asked, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert until(lambda: started.exists() or process.poll() is not None), "the training has not begun"
        assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
    assert until(lambda: not alive(int(started.read_text()))), "the training goes on without the command"


def test_a_runner_that_is_done_ends_well_though_its_input_is_open():
    source = RUNNER.read_text()
    watch = next(part for part in ast.parse(source).body if getattr(part, "name", "") == "_end_with_stdin")
    script = f"""
import os, sys, threading, time
{ast.get_source_segment(source, watch)}
threading.Thread(target=_end_with_stdin, daemon=True).start()
time.sleep(0.1)
"""
    with subprocess.Popen([sys.executable, "-I", "-c", script], stdin=subprocess.PIPE) as process:
        assert process.wait(60) == 0
    with subprocess.Popen([sys.executable, "-I", "-c", script + "time.sleep(60)"], stdin=subprocess.PIPE) as process:
        process.stdin.close()
        assert process.wait(60) == 1


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def until(condition, seconds: int = 120) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return bool(condition())


def test_an_environment_that_cannot_be_made(tmp_path, monkeypatch):
    def run(command, **_):
        if "venv" in command:
            (tmp_path / command[-1] / "bin").mkdir(parents=True)
            return subprocess.CompletedProcess(command, 0)
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no network")

    monkeypatch.setattr("dmpo_dist.evaluation.classical_environment.subprocess.run", run)
    with pytest.raises(
        UserError, match=r"cannot be made in .*new: ERROR: no network\n.*rectools(?s:.*)set evaluation.baseline_"
    ):
        baseline_python(tmp_path / "new", lambda _: None)
    assert not [path for path in tmp_path.iterdir() if "new" in path.name], "nothing half made is left"


@pytest.mark.integration
@pytest.mark.skipif(not default_environment().exists(), reason="the environment of the baselines is not made")
def test_rectools_itself(tmp_path):
    """EASE in closed form, and a network that learns which item follows which."""
    rng = np.random.default_rng(0)
    chains = [[f"i{(start + step) % 12}" for step in range(5)] for start in rng.integers(12, size=150)]
    log = pd.DataFrame(
        [(f"u{n}", item, step) for n, chain in enumerate(chains) for step, item in enumerate(chain)],
        columns=["user", "item", "timestamp"],
    )
    items = [*(f"i{n}" for n in range(12)), "never"]
    histories = [["i3", "i4"], ["i9", "i10", "i11"], ["never"]]
    pd.DataFrame({"item": items}).to_parquet(tmp_path / "items.parquet")
    log.to_parquet(tmp_path / "test_log.parquet")
    pd.DataFrame({"history": histories, "candidates": [None] * 3}).to_parquet(tmp_path / "test_requests.parquet")
    settings = EvaluationConfig().transformer.model_dump() | {"epochs": 20, "dropout": 0.0, "factors": 32}
    job = {"seed": 0, "threads": 1, "models": {"ease": {"regularization": [50.0]}, "sasrec": settings}}
    (tmp_path / "job.json").write_text(json.dumps(job))
    python = baseline_python(None, print)
    _run(python, tmp_path, print)  # as the product runs it

    taken = pd.crosstab(log["user"], log["item"]).reindex(columns=items[:12]).to_numpy(float)
    inverse = np.linalg.inv(taken.T @ taken + 50 * np.eye(12))
    weights = np.where(np.eye(12, dtype=bool), 0, inverse / -np.diag(inverse))
    history = np.array([[item in h for item in items[:12]] for h in histories], dtype=float)
    ease = np.stack(pd.read_parquet(tmp_path / "scores_ease.parquet")["scores"])
    np.testing.assert_allclose(ease[:2, :12], (history @ weights)[:2], atol=1e-4)
    assert np.isnan(ease[2]).all()
    assert np.isnan(ease[:, 12]).all()
    sasrec = np.stack(pd.read_parquet(tmp_path / "scores_sasrec.parquet")["scores"])
    assert [items[i] for i in np.nanargmax(sasrec[:2], axis=1)] == ["i5", "i0"]
