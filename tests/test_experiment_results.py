"""Tables of an experiment: every figure once, means over seeds, each cell paired with its own start."""

import io
import json

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread
from rich.console import Console
from worlds import prepared

from dmpo_dist.artifacts.evaluation import Evaluation, ScoringRules
from dmpo_dist.config import DataConfig, Source, dump_config
from dmpo_dist.data.prepare import prepare
from dmpo_dist.evaluation.metrics import METRICS
from dmpo_dist.evaluation.report import evaluate_scores, write_evaluation
from dmpo_dist.experiment.baselines import baseline_fits
from dmpo_dist.experiment.grid import expand
from dmpo_dist.experiment.measure import measure_baselines
from dmpo_dist.experiment.methods import data_rows
from dmpo_dist.experiment.parts import make_parts
from dmpo_dist.experiment.report import write_report
from dmpo_dist.experiment.results import differences, evaluations, figures, points
from dmpo_dist.experiment.rules import rules_rows
from dmpo_dist.experiment.schema import GridConfig
from dmpo_dist.experiment.stamps import begin, evaluation_folder, model_settings, stamp
from dmpo_dist.figures.study import step_drawings

AXES = {"shots": [8, "all"], "k": [1, 3], "seed": [0, 1], "objective.beta": [0.5, 2.0],
        "sft.learning_rate": [1e-3, 1e-4]}  # fmt: skip


def finish(parts, data) -> None:
    """Make ``parts`` finished, with models that score at random, the cells' the better the larger K."""
    for number, part in enumerate(parts):
        begin(part)
        part.model.mkdir(parents=True)
        (part.run / "config.yaml").write_text(dump_config(part.config))
        lines = [{"kind": "start", "steps": 40}]
        lines += [{"kind": "train", "step": s, "loss": s / 10, "preference_loss": 1 / s} for s in (1, 10, 20, 30, 40)]
        lines += [{"kind": "validation", "step": s, "hr@1": (s + part.cell.seed) / 50} for s in (0, 20, 40)]
        (part.run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        rng = np.random.default_rng(number)
        for name in part.evaluate_on:
            rows = data[name].test
            lift = part.cell.k * np.eye(1, 5)[0] if part.role == "cell" else 0
            scores = {model: [rng.normal(size=5) + lift for _ in range(len(rows))] for model in part.measured}
            evaluation = evaluate_scores(scores, rows, 100, 0)
            evaluation.data = {"fingerprint": data[name].fingerprint}
            evaluation.settings = model_settings(part.config)
            write_evaluation(evaluation_folder(part, name), evaluation, scores, rows)
        stamp(part)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A finished experiment."""
    root = tmp_path_factory.mktemp("study")
    data = {name: prepared(root / name, seed, evaluation_negatives=4) for seed, name in enumerate("ab")}
    datasets = {name: str(root / name) for name in data}
    grid = GridConfig.model_validate(
        {"output_dir": root / "study", "datasets": datasets, "evaluate_on": "all", "arms": ["sft", "sft_continued"],
         "grid": [{**AXES, "dataset": "a"}, {"dataset": "b", "k": 1},
                  {"dataset": "b", "k": 1, "train.learning_rate": 1e-3}],
         "settings": {"evaluation": {"bootstrap_samples": 100}}}
    )  # fmt: skip
    parts = make_parts(grid, expand(grid), data)
    finish(parts, data)
    return grid, parts, data


@pytest.fixture(scope="module")
def found(study):
    grid, parts, data = study
    return evaluations(parts, data, grid.output_dir)


def test_every_figure_once_and_means_and_differences_agree_with_them(study, found):
    _, parts, data = study
    table = figures(found)
    assert len(table) == 2 * len(parts) * len(METRICS)
    assert not table.duplicated(["part", "evaluated_on", "model", "metric"]).any()
    of_cells = table[table["objective"].notna()]
    assert of_cells["final_train_loss"].unique().tolist() == [4.0]  # the last fifth of 40 steps is the line of step 40
    means = points(found, 100)
    key = ["dataset", "evaluated_on", "train_groups", "k", "model", "free", "metric"]
    expected = table.groupby(key, dropna=False)["value"].mean()
    assert len(expected) == len(means)
    values = means.set_index(key)["value"]
    pd.testing.assert_series_equal(values.sort_index(), expected.sort_index(), check_names=False)
    assert set(means[(means["dataset"] == "a")]["seeds"]) == {2}

    gains = differences(found, 100)
    assert set(gains["against"]) == {"sft", "sft_continued", "K=1"}
    over_k = gains[gains["against"] == "K=1"]
    assert set(over_k["k"]) == {3}
    for gain in over_k.to_dict("records"):
        point = [gain[name] for name in ("dataset", "evaluated_on", "train_groups")]
        more, fewer = (values[*point, k, "dmpo", gain["free"], gain["metric"]] for k in (3, 1))
        assert gain["value"] == pytest.approx(more - fewer)
    by_part = table.set_index(["part", "evaluated_on", "model", "metric"])["value"]
    for gain in gains[gains["against"] != "K=1"].to_dict("records"):
        averaged = [part for part in parts if part.role == "cell" and part.cell.objective == gain["model"]
                and part.cell.k == gain["k"] and part.cell.dataset == gain["dataset"]
                and ", ".join(f"{k}={v}" for k, v in part.free) == gain["free"]
                and (part.shots or len(data[part.cell.dataset].train)) == gain["train_groups"]]  # fmt: skip
        wanted = []
        for part in averaged:
            of_other = ("sft.",) if gain["against"] == "sft" else ("sft.", "train.")
            rate = [axis for axis in part.free if axis[0].startswith(of_other)]
            (other,) = (p for p in parts if p.role == {"sft": "start"}.get(gain["against"], "continued")
                        and p.cell.dataset == part.cell.dataset and p.cell.seed == part.cell.seed
                        and p.shots == part.shots and list(p.free) == rate)  # fmt: skip
            own = (part.cell.dataset, gain["metric"])
            wanted.append(
                by_part[part.title, own[0], gain["model"], own[1]]
                - by_part[other.title, own[0], gain["against"], own[1]]
            )
        assert gain["value"] == pytest.approx(np.mean(wanted))
        assert gain["seeds"] == len(averaged)


def test_the_fewest_negatives_are_those_of_all_seeds(found):
    """Seed 1 has no cell of K=1, so that the difference over both seeds is from K=2."""
    one = found[found["objective"].notna() & (found["k"] == 1)]
    cells = pd.concat([found, one.assign(k=pd.array([2] * len(one), dtype="Int64"))], ignore_index=True)
    cells = cells[~(cells["objective"].notna() & (cells["k"] == 1) & (cells["seed"] == 1))]
    gains = differences(cells, 100)
    gains = gains[gains["against"].str.startswith("K=") & (gains["k"] == 3)]
    assert set(gains["against"]) == {"K=2"}
    assert set(gains["seeds"]) == {2}


def test_cells_without_a_start_are_compared_with_the_model_before_training(tmp_path):
    data = {"a": prepared(tmp_path / "a", 0, evaluation_negatives=4)}
    grid = GridConfig.model_validate(
        {"output_dir": tmp_path / "study", "datasets": {"a": str(tmp_path / "a")}, "arms": ["zero_shot"],
         "grid": {"start": "zero_shot", "k": [1, 3], "seed": [0, 1]},
         "settings": {"evaluation": {"bootstrap_samples": 100}}}
    )  # fmt: skip
    parts = make_parts(grid, expand(grid), data)
    assert {part.role for part in parts} == {"cell"}
    finish(parts, data)
    found = evaluations(parts, data, grid.output_dir)
    before = found[found["model"] == "untuned"]
    assert before["seed"].tolist() == [0, 1]
    assert before[["k", "objective"]].isna().all(axis=None)
    assert set(before["free"]) == {""}
    gains = differences(found, 100)
    gains = gains[(gains["against"] == "untuned") & (gains["metric"] == "ndcg@10")]
    means = points(found, 100).set_index(["model", "metric", "k"])["value"]
    assert gains["k"].tolist() == [1, 3]
    for gain in gains.to_dict("records"):
        cell = means["dmpo", "ndcg@10", gain["k"]]
        assert gain["value"] == pytest.approx(cell - means["untuned", "ndcg@10"].item())
        assert gain["seeds"] == 2


def test_objectives_are_compared_with_the_first_of_the_grid(found):
    """The cells of K=3 as those of another objective at K=1: their differences are those over K."""
    others = found["objective"].notna() & (found["k"] == 3)
    named = found["objective"].mask(others, "sdpo")
    cells = found.assign(objective=named, model=found["model"].mask(others, "sdpo"), k=found["k"].mask(others, 1))
    key, figures_of = ["train_groups", "free", "metric"], ["value", "low", "high", "p", "seeds"]
    gains = differences(cells, 100)
    over_objectives = gains[gains["against"] == "dmpo"]
    assert set(over_objectives["model"]) == {"sdpo"}
    over_k = differences(found, 100)
    over_k = over_k[over_k["against"] == "K=1"]
    assert len(over_k) > 0
    pd.testing.assert_frame_equal(
        over_objectives.set_index(key)[figures_of].sort_index(), over_k.set_index(key)[figures_of].sort_index()
    )


def test_the_methods_sheet_tells_ready_rows_from_a_split_log(tmp_path):
    lines = [{"history": ["A", "B"], "ranked": [[f"C{n}"], ["D", "E", "F"][: 2 + n % 2]]} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = Source(kind="preferences", path=tmp_path / "rows.jsonl")
    (row,) = data_rows({"x": prepare(DataConfig(source=source), 0, tmp_path / "x", lambda line: None)})
    assert row["validation and test from"] == "ready rows"
    assert row["candidates"] == "as given"
    assert row["training negatives"] == "2 to 3 as given"


def test_intervals_over_seeds_are_those_of_the_evaluate_command(study, found):
    _, parts, data = study
    same = {"dataset": "a", "evaluated_on": "a", "free": "objective.beta=0.5, sft.learning_rate=0.001"}
    chosen = [
        part
        for part in parts
        if (part.role, part.cell.dataset, part.cell.shots, part.cell.k) == ("cell", "a", None, 1)
        and {("objective.beta", 0.5), ("sft.learning_rate", 1e-3)} <= set(part.cell.free)
    ]
    starts = {part.start for part in chosen}
    chosen += [part for part in parts if part.role == "start" and part.name in starts]
    scores = {}
    for part in chosen:
        (model,) = part.measured
        table = pd.read_parquet(evaluation_folder(part, "a") / "scores.parquet")
        scores[f"{model}@{part.cell.seed}"] = [g.to_numpy() for _, g in table.groupby("request")["score"]]
    assert sorted(scores) == ["dmpo@0", "dmpo@1", "sft@0", "sft@1"]
    evaluation = evaluate_scores(scores, data["a"].test, 100, 0).content()

    def row_of(frame, **more):
        wanted = same | {"k": 1, "model": "dmpo", "metric": "ndcg@10"} | more
        (row,) = frame[frame["shots"].isna() & (frame[list(wanted)] == pd.Series(wanted)).all(axis=1)].to_dict(
            "records"
        )
        return [row[name] for name in ("value", "low", "high")]

    ours = evaluation["models"]["dmpo"]["ndcg@10"]
    assert ours["low"] < ours["value"] < ours["high"]
    assert row_of(points(found, 100)) == pytest.approx([ours[name] for name in ("value", "low", "high")])
    (pair,) = (c for c in evaluation["comparisons"] if (c["b"], c["metric"]) == ("sft", "ndcg@10"))
    wanted = [pair[name] for name in ("difference", "low", "high")]
    assert row_of(differences(found, 100), against="sft") == pytest.approx(wanted)


def test_the_report_draws_what_the_grid_has_and_names_what_is_missing(study):
    grid, parts, data = study
    parts = [
        part
        for part in parts
        if ("objective.beta", 2.0) not in part.free and ("sft.learning_rate", 1e-4) not in part.free
    ]
    (parts[-1].folder / "done.json").unlink()
    write_report(grid, parts, data, ["cells/x: the loss became nan"])
    text = (grid.output_dir / "experiment.md").read_text()
    assert f"{len(parts) - 1} of {len(parts)} models" in text
    assert "- cells/x: the loss became nan" in text
    for name in ("few_shot.png", "k_sweep.png", "steps.png", "cross_domain.png"):
        assert f"]({name})" in text
        assert imread(grid.output_dir / name).std() > 0.05
    drawings = step_drawings(pd.read_parquet(grid.output_dir / "curves.parquet"))
    assert any("dmpo, K=3, objective.beta=0.5" in drawing.alt for drawing in drawings)
    assert all("0.010 at 0, 0.410 at 20, 0.810 at 40" in drawing.alt for drawing in drawings if "a, " in drawing.title)
    rows = pd.read_parquet(grid.output_dir / "experiment.parquet")
    assert parts[-1].title not in set(rows["part"])
    stamp(parts[-1])
    plain = grid.model_copy(update={"evaluate_on": "own"})
    few = [part for part in parts if part.cell.k == 1 and part.shots is None]
    write_report(plain, few, {"b": data["b"], "a": data["a"]}, [])
    assert not (grid.output_dir / "few_shot.png").exists()
    assert not (grid.output_dir / "k_sweep.png").exists()


def test_baselines_on_both_logs_rules_and_methods_stand_on_the_page(study):
    grid, _, data = study
    more = {"settings": {"evaluation": {"bootstrap_samples": 100, "fit_on": ["log", "shots"]}}}
    grid = GridConfig.model_validate(grid.model_dump(mode="json") | more)
    chosen = {("objective.beta", 0.5), ("sft.learning_rate", 1e-3)}
    parts = [part for part in make_parts(grid, expand(grid), data) if {*part.free} <= chosen]
    fits = baseline_fits(list(data), parts, grid.output_dir)
    assert [(fit.dataset, fit.few, fit.shots) for fit in fits] == [
        ("a", False, None), ("a", True, 8), ("a", True, None), ("b", False, None), ("b", True, None)
    ]  # fmt: skip
    own = grid.model_copy(update={"draw_shots": "per_seed", "output_dir": grid.output_dir / "own"})
    drawn = baseline_fits(list(data), make_parts(own, expand(own), data), own.output_dir)
    assert [(fit.shots, fit.seed, fit.config.data.shots_seed) for fit in drawn if fit.dataset == "a" and fit.few] == [
        (8, 0, 0), (8, 1, 1), (None, None, 0)
    ]  # fmt: skip
    measure_baselines(fits, data, Console(file=io.StringIO()))
    found = evaluations(parts, data, grid.output_dir)
    assert set(found[found["part"].isna()]["model"]) == {
        "random", "popularity", "item_knn", "oracle", "popularity (same users)", "item_knn (same users)"
    }  # fmt: skip

    # Each cell against the baseline that was fitted on its own groups, and against the one on the whole log.
    gains = differences(found, 100)
    values = points(found, 100).set_index(["dataset", "evaluated_on", "train_groups", "k", "model", "free", "metric"])
    cells = gains[(gains["dataset"] == "a") & (gains["metric"] == "ndcg@10")]
    assert set(cells["train_groups"]) == {8, len(data["a"].train)}
    for gain in cells[cells["against"] == "item_knn (same users)"].to_dict("records"):
        at = ("a", "a", gain["train_groups"])
        cell = values.loc[(*at, gain["k"], gain["model"], gain["free"], "ndcg@10"), "value"]
        rows = found[(found["model"] == gain["against"]) & (found["train_groups"] == gain["train_groups"])]
        baseline = Evaluation.read(rows["folder"].iloc[0]).models[gain["against"]]["ndcg@10"].value
        assert gain["value"] == pytest.approx(cell - baseline)
        assert gain["low"] < gain["value"] < gain["high"]

    # Rules of one model: the chosen one is named, and without any the table is not there.
    assert rules_rows(found) == []
    part = next(part for part in parts if part.role == "cell")
    evaluation = Evaluation.read(evaluation_folder(part, "a"))
    (figures_of_dmpo,) = evaluation.models.values()
    choice = {"rule": "prior", "prior_weight": 0.5, "validation": {"sum": 0.5, "prior 0.5": 0.6}}
    rules = {"models": {"dmpo": {rule: figures_of_dmpo for rule in ("sum", "prior")}}, "chosen": {"dmpo": choice}}
    evaluation.rules = ScoringRules.model_validate(rules)
    evaluation.write(evaluation_folder(part, "a"))
    (row,) = rules_rows(evaluations([part], data, grid.output_dir))
    assert row["chosen"] == "prior, weight 0.5"
    assert row["sum"] == row["prior"] != ""

    write_report(grid, parts, data, [])
    text = (grid.output_dir / "experiment.md").read_text()
    for words in (
        "| item_knn (same users) |", "NDCG@10 minus that of others, paired:", "## Scoring rules", "## Methods",
        "prior, weight 0.5", "fitted on nothing but the likes that the 8 training groups show",
        "Training started from random weights",
    ):  # fmt: skip
        assert words in text, words
