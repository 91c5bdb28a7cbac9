"""What `dmpo evaluate` holds in memory, and what the quickstart checks before it trains."""

import io
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console

from dmpo_dist.artifacts.evaluation import Evaluation, weights_digest
from dmpo_dist.artifacts.stamp import ModelStamp
from dmpo_dist.commands import evaluate as evaluation
from dmpo_dist.commands import kept_baselines, model_scores
from dmpo_dist.commands.kept_baselines import kept_baseline_scores
from dmpo_dist.commands.quickstart import quickstart
from dmpo_dist.commands.scored_parts import PARTS
from dmpo_dist.commands.scoring import score_with_progress
from dmpo_dist.config import DataConfig, ModelConfig, RunConfig, TemplateConfig
from dmpo_dist.data.prepare import prepare
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation import starts as starts_module
from dmpo_dist.evaluation.baseline_scores import BaselineScores, baseline_scores
from dmpo_dist.evaluation.report import evaluate_scores, write_evaluation
from dmpo_dist.evaluation.whole_catalogue import Ranked
from dmpo_dist.experiment.stamps import evaluated
from dmpo_dist.modeling.backbone import ModelSource
from dmpo_dist.modeling.ranking_model import RankingModel

CONSOLE = Console(file=io.StringIO(), width=100)


def test_a_model_is_gone_before_the_next_one_is_loaded(world, tmp_path, monkeypatch):
    """Models that are scored, and those that rank the whole catalogue after them."""
    held: weakref.WeakSet = weakref.WeakSet()
    ranked: list[str] = []

    class Scorer:
        orders = 1

        def __init__(self, path, config):
            assert not held, "two models in memory"
            held.add(self)

        def score_rows(self, rows, advance=lambda requests: None):
            advance(len(rows))
            return [np.arange(1.0 + len(negatives)) for negatives in rows["negatives"][:]]

    def rank_catalogue(name, path, whole, data, config, widths, *_):
        assert not held, "two models in memory"
        ranked.append(name)
        return dict.fromkeys(widths, whole.scored([np.zeros((len(world.data.test), 40))]))

    monkeypatch.setattr(model_scores, "load_ranking_model", Scorer)
    monkeypatch.setattr(
        model_scores,
        "PartScorer",
        lambda title, _, path, model, data, *given: (
            lambda split: score_with_progress(model, data.test, title, given[-1])
        ),
    )
    monkeypatch.setattr(model_scores, "_note_shortened", lambda *_: None)
    monkeypatch.setattr(evaluation, "template_of", lambda *_: TemplateConfig())
    for module in (evaluation, model_scores, starts_module):
        monkeypatch.setattr(module, "find_model", lambda path: ModelSource(path, path, False, ModelStamp()))
    monkeypatch.setattr(evaluation, "rank_catalogue", rank_catalogue)
    settings = {"bootstrap_samples": 100, "order_requests": 2, "baselines": ["random"], "catalogue_beams": [1, 8]}
    config = RunConfig.model_validate({"data": {"path": world.data.path}, "evaluation": settings})
    found = evaluation.evaluate({"sft": "a", "dmpo": "b"}, config, tmp_path / "out", CONSOLE, catalogue=True)
    by_beams = {f"{name}, {beams}" for name in ("sft", "dmpo") for beams in ("1 beam", "8 beams")}
    assert set(found.catalogue.models) == {"random", "sft", "dmpo"} | by_beams
    assert set(found.order.models) == {"sft", "dmpo"}
    assert f"[scoring sft     0s] {len(world.data.test)}/{len(world.data.test)} users" in CONSOLE.file.getvalue()
    assert ranked == ["sft", "dmpo"]
    assert torch.get_num_threads() == 1, "as many as OMP_NUM_THREADS says: more wait for each other on busy cores"


def test_settings_that_nothing_reads_are_named(world, tmp_path):
    settings = {
        "bootstrap_samples": 100,
        "baselines": ["random"],
        "fit_on": ["log", "shots"],
        "knn_neighbours": 7,
        "ease_regularization": [5.0],
        "transformer": {"factors": 32},
        "prior_weights": [0.5],
        "candidate_orders": 3,
    }
    said = {}
    for rule in ("sum", "auto"):
        config = RunConfig.model_validate({"data": {"path": world.data.path}, "evaluation": settings | {"rule": rule}})
        console = Console(file=io.StringIO(), width=200)
        evaluation.evaluate({}, config, tmp_path / rule, console)
        notes = [line.split() for line in console.file.getvalue().splitlines() if "has no effect" in line]
        said[rule] = {note[1].partition("=")[0].partition(".")[2] for note in notes}
    assert said["sum"] == set(settings) - {"bootstrap_samples", "baselines"}
    assert said["auto"] == said["sum"] - {"prior_weights"}


def test_what_was_kept_of_another_log_is_not_taken_though_its_rows_are_the_same(tmp_path):
    """Users with a single like have no rows, and fingerprints are of rows and items; but baselines count their likes,
    and they say what may be ranked in a whole catalogue."""
    rng = np.random.default_rng(0)
    likes = [
        (f"u{user}", f"i{item}", 5, 100 * user + number, f"Title {item}")
        for user in range(20) for number, item in enumerate(rng.permutation(15)[:6])
    ]  # fmt: skip
    datasets = []
    for name, more in (("a", []), ("b", [(f"z{user}", "i7", 5, 90_000, "Title 7") for user in range(30)])):
        columns = ["user", "item", "rating", "timestamp", "title"]
        pd.DataFrame(likes + more, columns=columns).to_csv(tmp_path / f"{name}.csv", index=False)
        made = {"negatives_per_group": 3, "evaluation_negatives": 5, "split": "leave_one_out"}
        settings = DataConfig.model_validate({"source": {"path": tmp_path / f"{name}.csv"}} | made)
        datasets.append(prepare(settings, 0, tmp_path / name, echo=lambda _: None, allow_leaks=True))
    before, now = datasets
    assert before.fingerprint == now.fingerprint
    config = RunConfig.model_validate({"evaluation": {"baselines": ["pop_fitted", "item_knn"]}})
    for data in datasets:
        kept = kept_baseline_scores(data, config, False, tmp_path / "out", lambda _: None)
        expected = baseline_scores(data, config, False, lambda _: None)
        for name, scores in expected.scores.items():
            assert [row.tolist() for row in kept.scores[name]] == [row.tolist() for row in scores], name
    found = evaluate_scores(expected.scores, now.test, 10, 0)
    found.data, found.settings = before.about(), {}
    write_evaluation(tmp_path / "study", found, expected.scores, now.test)
    assert evaluated(tmp_path / "study", before, {})
    assert not evaluated(tmp_path / "study", now, {})
    del found.data["log"]  # as earlier versions wrote it
    found.write(tmp_path / "study")
    assert evaluated(tmp_path / "study", now, {})


def test_baselines_are_fitted_once_in_an_evaluation_that_is_interrupted(tmp_path, monkeypatch):
    fitted: list[str] = []
    rng = np.random.default_rng(0)

    def fit(data, config, catalogue, echo):
        fitted.append(data.fingerprint)
        ranked = Ranked({"hr@1": rng.random(3), "ndcg@10": np.array([0.1 + 0.2, 0.0, 1e-300])}, np.array([4, 0, 2]))
        return BaselineScores(
            {"ease": [rng.normal(size=4), rng.normal(size=2), np.array([np.pi, -0.0])]},
            {"ease": ranked} if catalogue else {},
            {"ease": {"settings": {"regularization": 500}, "seconds": 0.1}},
        )

    monkeypatch.setattr(kept_baselines, "baseline_scores", fit)
    data, other = (SimpleNamespace(fingerprint=name, log_digest="log") for name in ("data", "other"))
    config = RunConfig()

    def kept(data=data, config=config, catalogue=True):
        return kept_baseline_scores(data, config, catalogue, tmp_path, lambda _: None)

    first, again = kept(), kept()
    assert len(fitted) == 1
    for of, expected in zip(again.scores["ease"], first.scores["ease"], strict=True):
        assert of.tobytes() == expected.tobytes()
    for name, values in first.catalogue["ease"].metrics.items():
        assert again.catalogue["ease"].metrics[name].tobytes() == values.tobytes()
    assert again.catalogue["ease"].shown.tolist() == [4, 0, 2]
    assert again.details == first.details
    seed = config.model_copy(update={"seed": 5})
    for changed in ({"data": other}, {"config": seed}, {"catalogue": False}):
        before = len(fitted)
        kept(**changed)
        assert len(fitted) == before + 1
    kept()
    assert len(fitted) == 4
    for file in (tmp_path / PARTS).iterdir():
        file.write_text(file.read_text().replace("500", "501"))
    kept()
    assert len(fitted) == 5, "a damaged file is no file"


def test_histories_that_a_model_sees_only_in_part_are_counted(world):
    said = []
    for length in (90, 512):  # the first holds the template and a title or two
        console = Console(file=io.StringIO(), width=200)
        model = RankingModel.load(str(world.model), ModelConfig(max_length=length))
        model_scores._note_shortened("small", model, world.data.test, console)
        said.append(console.file.getvalue())
    assert f"of {len(world.data.test)} test histories without their oldest titles" in said[0]
    assert said[1] == ""


def test_what_a_stage_started_from_is_found_by_folder(tmp_path, monkeypatch):
    starts = {"sft0": "base", "sft1": "base", "dmpo0": "sft0", "dmpo1": "sft1", "other0": "sft1", "base": "elsewhere"}
    stamps = {str(tmp_path / name): ModelStamp(start=str(tmp_path / start)) for name, start in starts.items()}
    found = lambda path: ModelSource(path, path, False, stamps[str(Path(path).absolute())])  # noqa: E731
    monkeypatch.setattr(starts_module, "find_model", found)
    monkeypatch.chdir(tmp_path)
    entries = {"zero": "base", "sft@0": "sft0", "sft@1": "sft1", "dmpo@0": "dmpo0", "dmpo@1": "dmpo1"}
    assert starts_module.starts_of(entries) == {"sft": "zero", "dmpo": "sft"}
    assert starts_module.starts_of(entries | {"dmpo@0": "other0"}) == {"sft": "zero"}, "another seed's start"


def test_figures_are_of_the_weights_that_were_ranked(tmp_path):
    ModelStamp(digests={"model.safetensors": "1"}).write(tmp_path)
    found = Evaluation(
        requests=1,
        negatives={"fewest": 1, "most": 1},
        models={"dmpo": {"hr@1": 0.5}},
        folders={"dmpo": str(tmp_path)},
        weights={"dmpo": weights_digest(tmp_path)},
    )
    assert found.name_of(tmp_path) == "dmpo"
    ModelStamp(digests={"model.safetensors": "2"}).write(tmp_path)
    assert found.name_of(tmp_path) is None, "trained again in place"
    assert found.name_of(tmp_path, same_weights=False) == "dmpo"
    earlier = found.model_copy(update={"weights": {}})
    assert earlier.name_of(tmp_path) == "dmpo", "of a version that did not say"


def test_the_quickstart_looks_at_the_baselines_environment_first(tmp_path):
    (tmp_path / "none").mkdir()
    settings = {"baselines": ["random", "ease"], "baseline_environment": tmp_path / "none"}
    config = RunConfig.model_validate({"output_dir": tmp_path / "out", "evaluation": settings})
    with pytest.raises(UserError, match="is no environment with RecTools"):
        quickstart(config, CONSOLE)
    assert not (tmp_path / "out").exists()
