"""Tuning: what a search draws and refuses, baselines by the figures they would rank with, and what early stopping
remembers."""

import csv
from contextlib import nullcontext
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from dmpo_dist.artifacts.tuning import Search, Trial, Tuning
from dmpo_dist.cli import app
from dmpo_dist.cluster.tune import END, SHARE, VALUE, _remember
from dmpo_dist.commands.run_folder import open_run_folder
from dmpo_dist.commands.train import run_stage
from dmpo_dist.config import config_of, load_config
from dmpo_dist.config.tune import USUAL_SPACES
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.baselines import item_knn_scores
from dmpo_dist.evaluation.fitting_log import fitting_log, of_same_users
from dmpo_dist.evaluation.metrics import ranking_metrics
from dmpo_dist.records.read import read_run
from dmpo_dist.training.engine import single_rank
from dmpo_dist.tuning import stage as stage_module
from dmpo_dist.tuning.baselines import baseline_spaces, data_to_fit_on, search_baseline
from dmpo_dist.tuning.report import write_results
from dmpo_dist.tuning.run import tune
from dmpo_dist.tuning.space import require_baseline_spaces, require_stage_space, trial_values, value_of, with_values
from dmpo_dist.tuning.stage import run_folder

SPACE = {
    "train.learning_rate": {"loguniform": ["1e-6", 1e-2]},  # YAML reads 1e-6 as a text
    "train.negatives": {"integers": [2, 4]},
    "train.weight_decay": {"uniform": [0.1, 0.2]},
    "train.warmup_ratio": {"choice": [0, 0.1, "1e-1"]},
    "objective.name": {"choice": ["dmpo", "sdpo"]},
    "objective.beta": {"choice": [0.2, 0.4]},
    "evaluation.knn_neighbours": {"logintegers": [1, 4]},
}


def test_settings_are_within_their_axes_never_alike_and_stay_when_there_are_more():
    config = config_of({"objective.name": "sdpo"})
    found = trial_values(config, SPACE, 200, seed=3)
    assert found[0] == {key: value_of(config, key) for key in SPACE}, "the first are those of the configuration"
    assert found[:9] == trial_values(config, SPACE, 9, seed=3)
    assert found[1:9] != trial_values(config, SPACE, 9, seed=4)[1:]
    assert len({str(values) for values in found}) == len(found) == 200
    drawn = {key: [values[key] for values in found[1:]] for key in SPACE}
    rates = drawn["train.learning_rate"]
    assert 1e-6 <= min(rates) < 1e-5 < 1e-3 < max(rates) <= 1e-2
    assert sum(rate < 1e-4 for rate in rates) == pytest.approx(100, abs=25), "as many below the middle of the exponents"
    assert set(drawn["train.negatives"]) == {2, 3, 4}
    assert all(0.1 <= decay <= 0.2 for decay in drawn["train.weight_decay"])
    assert set(drawn["train.warmup_ratio"]) == {0.0, 0.1}
    assert set(drawn["evaluation.knn_neighbours"]) == {1, 2, 3, 4}
    assert {(v["objective.name"], v["objective.beta"]) for v in found[1:]} == {
        (name, beta) for name in ("dmpo", "sdpo") for beta in (0.2, 0.4)
    }, "another objective does not undo the beta drawn for it"
    for values in found[:20]:
        made = with_values(config, values)
        assert {key: value_of(made, key) for key in SPACE} == values
    few = trial_values(config, {"train.negatives": {"choice": [1, 2]}}, 20, seed=0)
    assert few[0]["train.negatives"] == 7
    assert len(few) == 3, "a small space has no more"


REFUSED = {
    "train.lr": ({"choice": [1]}, "unknown key; the nearest known key is train.learning_rate"),
    "train.negatives": ({"integers": [0, 3]}, r"train\.negatives: .* greater than or equal to 1"),
    "model.lora": ({"choice": [None, {"rank": 4}]}, r"model\.lora\.rank: unknown key"),
    "seed": ({"choice": [1, 2]}, "the best of several seeds is luck"),
    "data.k_core": ({"choice": [1, 2]}, "decided when data is prepared"),
    "train.select_metric": ({"choice": ["auc"]}, "says how trials are compared"),
    "sft.steps": ({"choice": [1]}, "changes nothing that dmpo train learns"),
    "train.learning_rate": ({"loguniform": [0, 1]}, "needs a low above 0"),
    "train.weight_decay": ({"uniform": [1, 0]}, "low below high"),
    "train.steps": ({"gauss": [1, 2]}, "should be 'choice', 'uniform'"),
    "train.epochs": ({"choice": []}, "choice has no values"),
    "train.log_every": ({"integers": [1.5, 2]}, "needs whole numbers"),
    "train.schedule": ({"uniform": ["a", 1]}, "two numbers"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_an_axis_that_cannot_be_tuned_is_refused(key):
    axis, words = REFUSED[key]
    with pytest.raises(UserError, match=words):
        require_stage_space(config_of({"tune.space": {key: axis}}), "preference")


def test_what_else_is_refused_before_any_trial(world, tmp_path):
    good = {"tune.space": {"train.negatives": {"choice": [1]}}, "data.path": world.folder / "data"}
    console = Console(quiet=True)
    for more, words in (
        ({"tune.space": {}}, "tune.space is empty: say which keys"),
        ({"cluster.workers": 2}, "cluster.workers=2: a trial trains with one worker"),
        ({"tune.baselines": {"item_knn": {"train.steps": {"choice": [1]}}}}, "is no setting of item_knn, which has"),
        (
            {"tune.baselines": {"ease": {"evaluation.knn_neighbours": {"choice": [5, 9]}}}},
            "ease.evaluation.knn_neighbours: is no setting of ease, which has evaluation.ease_regularization",
        ),
        (
            {"evaluation.baselines": ["bert4rec", "random", "sasrec"]},
            "bert4rec and sasrec share evaluation.transformer",
        ),
        ({"cluster.storage_path": "store"}, "cluster.storage_path=store has no effect: each trial"),
        (
            {"evaluation.fit_on": ["log", "shots"]},
            "baselines are tuned on one of them; tune with evaluation.fit_on=.log",
        ),
        ({"train.negatives": 9}, "train.negatives=9, but the prepared data holds 6"),
        (
            {"train.negatives": 3, "tune.space": {"train.negatives": {"integers": [1, 9]}}},
            "tune.space.train.negatives: train.negatives=9, but the prepared data holds 6",
        ),
        (
            {"model.path": str(world.adapter), "tune.space": {"model.lora.r": {"choice": [4, 8]}}},
            "tune.space.model.lora.r: .* is an adapter, whose shape training keeps",
        ),
        (
            {"train.steps": 3, "tune.space": {"train.epochs": {"choice": [1, 2]}}},
            "tune.space.train.epochs: has no effect while train.steps is set",
        ),
    ):
        with pytest.raises(UserError, match=words):
            tune(config_of(good | {"output_dir": tmp_path / "tuned"} | more), console)
    assert not (tmp_path / "tuned").exists()
    for name, space in USUAL_SPACES.items():
        require_baseline_spaces(config_of({}), {name: space})


def test_a_dry_run_refuses_a_key_that_does_not_exist():
    space = "tune.space={{{}: {{choice: [1.0e-4, 2.0e-4]}}}}"
    wrong, right = (
        CliRunner().invoke(app, ["tune", "--dry-run", space.format(key)])
        for key in ("train.learning_rat", "train.learning_rate")
    )
    assert isinstance(wrong.exception, UserError)
    assert "train.learning_rat" in str(wrong.exception)
    assert right.exit_code == 0, right.output
    assert "train.learning_rate:" in right.output


@pytest.mark.parametrize(("select", "step"), [("best", 3), ("last", 6)])
def test_a_trial_counts_by_the_weights_that_it_leaves(tmp_path, monkeypatch, select, step):
    figures = pd.DataFrame({"ndcg@10": {0: 0.5, 3: 0.55, 6: 0.41}})
    run = SimpleNamespace(validation=figures, config={"train": {"select": select}}, stage="preference", steps=(6, 6))
    monkeypatch.setattr(stage_module, "has_begun", lambda folder: True)
    monkeypatch.setattr(stage_module, "read_run", lambda folder: run)
    search = Search(name="train", metric="ndcg@10", space={}, asked=1, hours=None, seconds=0, trials=[])
    watch = stage_module._Watch(search, [{}], [1], tmp_path, lambda: None, Console(quiet=True))
    entry = watch._update(1)
    assert (entry.step, entry.value, entry.start) == (step, figures["ndcg@10"][step], 0.5)


def test_settings_with_which_training_fails_are_not_the_best(tmp_path, monkeypatch):
    """It was validated before it diverged, and better than all others; what would be left of them is kept meanwhile."""
    monkeypatch.setattr(stage_module, "has_begun", lambda folder: False)
    trials = [
        Trial(number=1, values={}, state="done", value=0.4, step=6),
        Trial(number=2, values={}, state="begun", value=0.7, step=3),
    ]
    search = Search(name="train", metric="ndcg@10", space={}, asked=2, hours=None, seconds=0, trials=trials)
    model = run_folder(tmp_path, 1) / "model"
    model.mkdir(parents=True)
    watch = stage_module._Watch(search, [{}, {}], [1, 2], tmp_path, lambda: None, Console(quiet=True))
    watch.ended(0, "")
    assert (search.best.number, model.is_dir()) == (1, True), "the other one may still fail"
    search.trials[0].state = "done"
    watch.ended(1, "training diverged")
    assert [(trial.state, trial.value) for trial in search.trials] == [("done", 0.4), ("failed", 0.7)]
    assert (search.best.number, model.is_dir()) == (1, True)


@pytest.mark.parametrize(("whole_trials", "best"), [(False, 1), (True, 2)])
def test_where_the_last_weights_count_a_trial_that_was_stopped_is_not_the_best(whole_trials, best):
    """ASHA stopped it at a third, ahead of what the others came to in the end; nobody knows where it would have."""
    trials = [
        Trial(number=1, values={}, state="stopped", value=0.6, step=3, share=33),
        Trial(number=2, values={}, state="done", value=0.5, step=9, share=100),
        Trial(number=3, values={}, state="out of time", value=0.55, step=3, share=33),
    ]
    search = Search(
        name="train", metric="ndcg@10", space={}, asked=3, hours=1, trials=trials, whole_trials=whole_trials
    )
    assert search.best.number == best


def test_a_baseline_is_tuned_by_the_figure_that_it_ranks_with_within_its_budget(world, tmp_path):
    config = config_of(
        {
            "data.path": world.folder / "data", "output_dir": tmp_path / "tuned", "tune.trials": 4, "tune.hours": 1,
            "tune.baselines": {"item_knn": {"evaluation.knn_neighbours": {"integers": [1, 3]}}},
        }
    )  # fmt: skip
    [(name, space)] = baseline_spaces(config, world.data).items()
    values = trial_values(config, space, 4, seed=0)
    search = Search(name=name, metric="ndcg@10", space=space, asked=4, hours=1, seconds=3600, trials=[])
    search_baseline(search, values, config, world.data, lambda: None, Console(quiet=True))
    assert search.trials == [], "no time left"
    search.seconds, kept = 0, []
    search_baseline(
        search, values[:2], config, world.data, lambda: kept.append(len(search.trials)), Console(quiet=True)
    )
    search_baseline(search, values, config, world.data, lambda: None, Console(quiet=True))
    assert (kept, [trial.number for trial in search.trials]) == ([1, 2], [1, 2, 3, 4])
    known = fitting_log(world.data, "validation")
    for trial in search.trials:
        scores = item_knn_scores(world.data.validation, known, trial.values["evaluation.knn_neighbours"])
        assert trial.value == ranking_metrics(scores)["ndcg@10"].mean()
    assert search.best.value == max(trial.value for trial in search.trials)

    # the files: the chosen settings in a configuration that a command takes, and every trial in the table
    open_run_folder(config, "train", resume=False)
    stage = Search(name="dmpo train", metric="ndcg@10", asked=2, hours=1, space={"train.steps": {"choice": [5, 9]}})
    stage.trials = [
        Trial(number=1, values={"train.steps": 5}, state="done", value=0.5, start=0.6, step=5),
        Trial(number=2, values={"train.steps": 9}, state="failed", error="the loss became nan"),
    ]
    tuning = Tuning(data={"path": "d", "fingerprint": "f" * 64}, validation_requests=12, searches=[stage, search])
    tuning.write(tmp_path / "tuned")
    assert Tuning.read(tmp_path / "tuned") == tuning
    write_results(tuning, config)
    best = load_config([tmp_path / "tuned" / "best.yaml"])
    assert best.train.steps == 5
    assert best.evaluation.knn_neighbours == search.best.values["evaluation.knn_neighbours"]
    assert {"tune", "output_dir"}.isdisjoint(yaml.safe_load((tmp_path / "tuned" / "best.yaml").read_text()))
    rows = list(csv.DictReader((tmp_path / "tuned" / "trials.csv").open()))
    assert [(row["search"], row["trial"]) for row in rows] == [
        *(("dmpo train", str(n)) for n in (1, 2)), *(("item_knn", str(n)) for n in (1, 2, 3, 4)),
    ]  # fmt: skip
    sheet = (tmp_path / "tuned" / "tune.md").read_text()
    assert "No trial ranks better than the start (ndcg@10 0.6000)" in sheet
    assert "trial 2: the loss became nan" in sheet


def test_baselines_are_fitted_on_what_an_evaluation_would_fit_on(world):
    """By few groups another number of neighbours may be the best than by the whole log."""
    config = config_of({"data.path": world.folder / "data", "data.shots": 20, "evaluation.fit_on": ["shots"]})
    few, whole = (fitting_log(data, "validation") for data in (data_to_fit_on(config, world.data), world.data))
    pd.testing.assert_frame_equal(few, fitting_log(of_same_users(world.data, config.data), "validation"))
    assert 0 < len(few) < len(whole)
    assert data_to_fit_on(config_of({"data.shots": 20}), world.data) is world.data


def test_a_trial_finds_files_that_were_given_from_the_working_directory(tmp_path, monkeypatch):
    """Ray Tune starts it in a folder of its own; a path may come from an axis, too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    given = {"data.path": "data", "model.path": "model", "reference.cache": "disk", "reference.path": "ref"}
    config = config_of(given | {"output_dir": "tuned"})
    made = stage_module._of_trial(config, {"deepspeed": "own.json"}, tmp_path / "tuned/trials/001/run")
    assert (made.deepspeed, made.model.path, str(made.data.path), str(made.reference.path)) == tuple(
        f"{tmp_path}/{name}" for name in ("own.json", "model", "data", "ref")
    )


def test_earlier_trials_count_when_a_search_goes_on():
    """Of a new trial that is worse than two thirds of the earlier ones at the same share of its steps, no more."""
    schedulers = pytest.importorskip("ray.tune.schedulers")

    def verdicts(earlier, value):
        scheduler = schedulers.ASHAScheduler(
            time_attr=SHARE, metric=VALUE, mode="max", max_t=100, grace_period=10, reduction_factor=3,
            stop_last_trials=False,
        )  # fmt: skip
        _remember(scheduler, earlier)
        trial = type("Trial", (), {"trial_id": "new"})()
        scheduler.on_trial_add(None, trial)
        return [scheduler.on_trial_result(None, trial, {SHARE: s, VALUE: value}) for s in (5, 12, 20, 35)]

    earlier = [[(12, 0.3), (35, 0.5)], [(12, 0.2), (35, 0.1)], [(12, 0.1)]]
    assert verdicts([], 0.0) == ["CONTINUE"] * 4
    assert verdicts(earlier, 0.05)[:2] == ["CONTINUE", "STOP"]
    assert verdicts(earlier, 0.35) == ["CONTINUE"] * 3 + ["STOP"], "the second comparison is three times later"
    assert verdicts(earlier, 0.6) == ["CONTINUE"] * 4


class Killed(BaseException):
    """Ends a trial where SIGKILL would."""


def test_a_killed_search_goes_on_where_it_was(world, tmp_path, monkeypatch):
    """Without Ray: trials one after the other in this process. tests/integration/test_tune.py has the real thing."""
    kill_at, run = [(3, 3)], []

    def one_after_the_other(jobs, body, watch, cluster, concurrent, seconds, halving, scratch):
        for number, job in enumerate(jobs):
            folder, heard = job.config.output_dir.parent.name, []

            def report(content, number=number, folder=folder, heard=heard):
                heard.append(content)
                watch.reported(number, content)
                if kill_at and kill_at[0] == (int(folder), len(heard)):
                    raise Killed(kill_at.pop())

            run.append(folder)
            watch.began(number)
            body(job, report)
            assert list(heard[-1]) == [SHARE, VALUE, END]
            watch.ended(number, "")

    monkeypatch.setattr("dmpo_dist.tuning.stage.run_trials", one_after_the_other)
    monkeypatch.setattr("dmpo_dist.tuning.stage.ray_session", lambda cluster: nullcontext())
    settings = {
        "data.path": world.folder / "data", "model.path": str(world.model), "output_dir": tmp_path / "tuned",
        "model.max_length": 128, "deepspeed": "zero0", "sft.learning_rate": 0.003, "sft.steps": 12,
        "sft.global_batch_size": 8, "sft.validate_every": 3, "sft.checkpoint_every": 2, "tune.stage": "sft",
        "tune.trials": 3, "tune.baselines": {}, "tune.space": {"sft.learning_rate": {"choice": [0.001, 1e30]}},
    }  # fmt: skip
    config = config_of(settings)
    console = Console(quiet=True)
    with pytest.raises(Killed):
        tune(config, console)
    first = (tmp_path / "tuned/trials/001/run/metrics.jsonl").read_text()
    states = [(trial.number, trial.state) for trial in Tuning.read(tmp_path / "tuned").searches[0].trials]
    assert states == [(1, "done"), (2, "failed"), (3, "begun")]
    [search] = tune(config, console, resume=True).searches
    assert run == ["001", "002", "003", "003"]
    assert first == (tmp_path / "tuned/trials/001/run/metrics.jsonl").read_text()
    assert "resumed from step 8" in (tmp_path / "tuned/trials/003/log.txt").read_text()
    diverged = [trial for trial in search.trials if trial.values["sft.learning_rate"] == 1e30]
    assert [trial.state for trial in diverged] == ["failed"]
    assert "training diverged" in diverged[0].error
    for trial in search.trials:
        if trial not in diverged:
            shown = read_run(run_folder(tmp_path / "tuned", trial.number)).validation["ndcg@10"]
            assert (trial.state, list(shown.index)) == ("done", [0, 3, 6, 9, 12])
            assert trial.value == shown[shown.index > 0].max()
            assert trial.start == shown[0]
    kept = [path.parent.parent.name for path in (tmp_path / "tuned").glob("trials/*/run/model")]
    assert kept == [f"{search.best.number:03}"], "only the best trial keeps its weights"

    # the best configuration trains to the figures of its trial
    best = load_config([tmp_path / "tuned/best.yaml"], [f"output_dir={tmp_path}/again"])
    with single_rank():
        run_stage("sft", best, console)
    again = read_run(tmp_path / "again").validation["ndcg@10"]
    assert again.max() == read_run(run_folder(tmp_path / "tuned", search.best.number)).validation["ndcg@10"].max()

    # more trials and no time for them
    with pytest.raises(UserError, match=r"differs from .* in seed"):
        tune(config_of(settings | {"seed": 1}), console, resume=True)
    late = tune(config_of(settings | {"tune.trials": 9, "tune.hours": 1e-9}), console, resume=True)
    assert len(late.searches[0].trials) == 3
