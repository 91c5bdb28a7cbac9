"""The report: shapes, exact pairing, and files that are complete or untouched."""

import io
import json
import re

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from rich.console import Console

from dmpo_dist import tables
from dmpo_dist.artifacts.evaluation import Evaluation
from dmpo_dist.evaluation import report
from dmpo_dist.evaluation.comparisons import (
    COMPARED_METRICS,
    below_start_lines,
    comparison_lines,
    show_comparisons,
)
from dmpo_dist.evaluation.metrics import CATALOGUE_METRICS, METRICS, sure_hits
from dmpo_dist.evaluation.report import evaluate_scores, write_evaluation
from dmpo_dist.evaluation.tables import CATALOGUE_MARKDOWN, TABLE_METRICS, evaluation_table, markdown
from dmpo_dist.tables import Cell, Table

N = 120


@pytest.fixture(scope="module")
def rows() -> Dataset:
    negatives = [[f"n{j}" for j in range(3 + i % 4)] for i in range(N)]
    return Dataset.from_dict(
        {
            "user": [f"u{i}" for i in range(N)],
            "timestamp": list(range(1000, 1000 + N)),
            "positive": ["Positive"] * N,
            "positive_item": ["p"] * N,
            "negatives": [[f"Title of {item}" for item in items] for items in negatives],
            "negative_items": negatives,
        }
    )


@pytest.fixture(scope="module")
def scores(rows) -> dict[str, list[np.ndarray]]:
    rng = np.random.default_rng(0)
    noise = [rng.normal(size=1 + len(negatives)) for negatives in rows["negatives"]]
    lift = [np.eye(1, len(s))[0] for s in noise]
    return {
        "other": noise,
        "oracle": [s + 5 * e for s, e in zip(noise, lift, strict=True)],
        "dmpo": [s + 2 * e for s, e in zip(noise, lift, strict=True)],
        "sft": [2 * s + 4 * e for s, e in zip(noise, lift, strict=True)],  # ranks exactly as dmpo
        "random": noise,
    }


@pytest.fixture(scope="module")
def evaluation(scores, rows):
    return evaluate_scores(scores, rows, samples=200, seed=0).content()


def rendered(evaluation) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(evaluation_table(evaluation))
    return console.file.getvalue()


def test_shape_order_and_values(evaluation):
    assert list(evaluation["models"]) == ["random", "sft", "dmpo", "oracle", "other"]
    assert evaluation["requests"] == N
    assert evaluation["negatives"] == {"fewest": 3, "most": 6}
    for of_model in evaluation["models"].values():
        assert list(of_model) == list(METRICS)
        for cell in of_model.values():
            assert cell["low"] <= cell["value"] <= cell["high"]
    assert json.loads(json.dumps(evaluation, allow_nan=False)) == evaluation
    compared = {(c["a"], c["b"], c["metric"]) for c in evaluation["comparisons"]}
    assert compared == {
        ("dmpo", b, m) for b in ("random", "sft", "oracle", "other") for m in ("ndcg@10", "hr@1", "auc")
    }


def test_equal_rankings_have_no_difference_and_better_ones_do(evaluation):
    by_pair = {(c["b"], c["metric"]): c for c in evaluation["comparisons"]}
    same, better = by_pair["sft", "ndcg@10"], by_pair["random", "ndcg@10"]
    assert (same["difference"], same["low"], same["high"], same["p"]) == (0, 0, 0, 1)
    models = evaluation["models"]
    assert better["difference"] == pytest.approx(
        models["dmpo"]["ndcg@10"]["value"] - models["random"]["ndcg@10"]["value"]
    )
    assert better["low"] > 0
    assert better["p"] < 0.05
    lines = comparison_lines(evaluation)
    assert "dmpo against sft: ndcg@10 +0.000 [0.000, 0.000], paired over 120 users (no clear difference)" in lines
    assert any(line.startswith("dmpo against random: hr@1 +0.") and line.endswith("120 users") for line in lines)


def test_without_dmpo_there_is_nothing_to_compare(scores, rows):
    alone = evaluate_scores({"oracle": scores["oracle"]}, rows, samples=100, seed=0).content()
    assert alone["comparisons"] == []
    assert "oracle" in rendered(alone)


def test_table_fits_100_columns_and_marks_the_best_that_is_not_the_oracle(evaluation):
    text = rendered(evaluation)
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "\u2026" not in text
    bold = {
        str(name): [bool(cell.spans) and "bold" in [span.style for span in cell.spans] for cell in cells]
        for name, *cells in zip(*(column._cells for column in evaluation_table(evaluation).columns), strict=True)
    }
    assert all(bold["dmpo"] + bold["sft"])
    assert not any(bold["oracle"])
    assert not any(bold["random"] + bold["other"])


def test_what_is_1_in_any_order_is_left_out_and_said(evaluation):
    """Of at most 7 candidates hr@10 is 1 for everybody; hr@5 is not."""
    assert [column.header for column in evaluation_table(evaluation).columns[1:]] == [
        m for m in TABLE_METRICS if m != "hr@10"
    ]
    line = "Not shown as it is 1 in any order of 7 candidates: hr@10"
    assert line in rendered(evaluation)
    assert f"{line}, hr@20." in markdown(evaluation)
    assert "| hr@1 | hr@5 | ndcg@5 | ndcg@10 |" in markdown(evaluation)
    for name in sure_hits(6):
        assert all(of_model[name]["value"] == 1 for of_model in evaluation["models"].values())
    assert sure_hits(20) == ()


def test_twelve_rows_with_seeds_fit_100_columns(scores, rows):
    """The paper's table: baselines, zero-shot, SFT, DPO, S-DPO and DMPO, three seeds each, all against SFT."""
    rng = np.random.default_rng(1)
    names = ["random", "popularity", "pop_fitted", "item_knn", "ease", "sasrec", "zero_shot", "oracle"]
    trained = [f"{name}@{seed}" for name in ("sft", "sft_continued", "dpo_pairs", "sdpo", "dmpo") for seed in range(3)]
    made = {name: [s + rng.normal(size=len(s)) / 2 for s in scores["dmpo"]] for name in [*names, *trained]}
    whole = evaluate_scores(made, rows, samples=100, seed=0, against=["sft", "sft_continued"]).content()
    console = Console(file=io.StringIO(), width=100)
    console.print(evaluation_table(whole))
    for part in show_comparisons(whole):
        console.print(part)
    text = console.file.getvalue()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 100
    assert "\u2026" not in text
    lines = text.splitlines()
    assert lines[0].startswith("120 requests")
    for name in [*names, "sft", "sft_continued", "dpo_pairs", "sdpo", "dmpo"]:
        assert any(line.split()[:1] == [name] for line in lines), f"{name} is broken over lines"
    sections = [line.strip() for line in lines if line.strip().startswith("against ")]
    assert sections == ["against sft", "against sft_continued"]
    assert sum("[" in line for line in lines) == 12 + 11, "each of the others against each of the two, and they once"


def test_a_stage_below_its_start_is_warned_of(scores, rows):
    starts = {"other": "dmpo", "dmpo": "sft"}
    found = evaluate_scores(scores, rows, samples=200, seed=0, starts=starts).content()
    pairs = evaluate_scores(scores, rows, samples=200, seed=0, against=["sft", "dmpo", "sft"]).content()["comparisons"]
    assert len(pairs) == len({(frozenset((c["a"], c["b"])), c["metric"]) for c in pairs}), "a pair counts once"
    expected = [c for b in ("dmpo", "sft") for c in pairs if c["b"] == b and starts.get(c["a"]) == b]
    assert found["against_start"] == expected
    lines = below_start_lines(found)  # dmpo ranks exactly as its start
    assert [line.split()[3:7] for line in lines] == [["other", "against", "dmpo:", m] for m in COMPARED_METRICS]
    assert all(f"- {line}\n" in markdown(found) for line in lines)
    assert below_start_lines(evaluate_scores(scores, rows, samples=200, seed=0).content()) == []


def test_seeds_are_one_row_and_stay_in_the_json(scores, rows, tmp_path):
    made = {"dmpo@1": scores["dmpo"], "dmpo@0": scores["other"], "sft": scores["sft"]}
    found = evaluate_scores(made, rows, samples=200, seed=0, against=["sft"])
    whole = found.content()
    assert list(whole["models"]) == ["sft", "dmpo"]
    assert list(whole["seeds"]) == ["dmpo"]
    each = [
        evaluate_scores({"one": s}, rows, 100, 0).content()["models"]["one"] for s in (scores["other"], scores["dmpo"])
    ]
    for label, alone in zip("01", each, strict=True):
        assert whole["seeds"]["dmpo"][label] == pytest.approx({m: cell["value"] for m, cell in alone.items()})
    mean = np.mean([cell["ndcg@10"]["value"] for cell in each])
    assert whole["models"]["dmpo"]["ndcg@10"]["value"] == pytest.approx(mean)
    (row,) = [c for c in whole["comparisons"] if c["metric"] == "ndcg@10"]
    assert (row["a"], row["b"]) == ("dmpo", "sft")
    assert row["difference"] == pytest.approx(mean - whole["models"]["sft"]["ndcg@10"]["value"])
    assert row["low"] < row["difference"] < row["high"]
    write_evaluation(tmp_path, found, made, rows)
    assert set(pd.read_parquet(tmp_path / "scores.parquet")["model"]) == set(made)
    assert "dmpo (2 seeds)" in (tmp_path / "evaluation.md").read_text()


def test_a_pair_with_unequal_seeds_is_compared_on_the_common_ones(scores, rows):
    """Exactly as if the others were not there, and it is said."""
    dmpo = {f"dmpo@{label}": scores[name] for label, name in zip("012", ("dmpo", "other", "oracle"), strict=True)}
    sft = {"sft@0": scores["other"], "sft@1": scores["oracle"]}
    whole = evaluate_scores(dmpo | sft, rows, samples=200, seed=0).content()
    both = evaluate_scores({name: s for name, s in (dmpo | sft).items() if name != "dmpo@2"}, rows, 200, 0).content()
    assert whole["comparisons"] == both["comparisons"]
    assert [c["seeds"] for c in whole["comparisons"]] == [["0", "1"]] * 3
    assert "paired over 120 users, on common seeds 0, 1" in comparison_lines(whole)[0]
    assert comparison_lines(both)[0].split(" (")[0].endswith("120 users")
    apart = evaluate_scores(dmpo | {"sft@7": scores["other"]}, rows, samples=200, seed=0).content()
    assert "120 users, no common seeds" in comparison_lines(apart)[0]


def test_strata_are_in_the_files(scores, rows, tmp_path):
    half = np.arange(N) < N // 2
    strata = {"popularity": {"head": half, "tail": ~half}}
    found = evaluate_scores(scores, rows, samples=100, seed=0, strata=strata)
    head = found.content()["strata"]["popularity"]["head"]
    assert head["requests"] == N // 2
    alone = evaluate_scores({"dmpo": scores["dmpo"][: N // 2]}, rows.select(range(N // 2)), 100, 0).content()["models"][
        "dmpo"
    ]
    for metric, cell in head["models"]["dmpo"].items():
        assert cell == pytest.approx(alone[metric])
    write_evaluation(tmp_path, found, scores, rows)
    assert f"| NDCG@10 | head ({N // 2}) | tail ({N // 2}) |" in (tmp_path / "evaluation.md").read_text()


def test_the_markdown_has_the_catalogue_as_the_terminal_has_it(evaluation):
    figure = {"value": 0.1, "low": 0.05, "high": 0.25}
    result = {
        "items": 400,
        "models": {"other": dict.fromkeys(CATALOGUE_METRICS, figure)},
        "coverage@10": {"other": 0.5},
        "gini@10": {"other": 0.75},
    }
    text = markdown(evaluation | {"catalogue": result})
    assert f"{N} requests among all 400 items" in text
    assert "| other |" + " **0.100** (0.050\u20130.250) |" * len(CATALOGUE_MARKDOWN) + " 0.500 | 0.750 |" in text
    assert "among all" not in markdown(evaluation)


def test_written_files(tmp_path, evaluation, scores, rows):
    folder = tmp_path / "new" / "evaluation"
    write_evaluation(folder, Evaluation.model_validate(evaluation), scores, rows)
    assert sorted(p.name for p in folder.iterdir()) == ["evaluation.json", "evaluation.md", "scores.parquet"]
    assert json.loads((folder / "evaluation.json").read_text()) == evaluation
    table = pd.read_parquet(folder / "scores.parquet")
    assert len(table) == len(scores) * sum(1 + len(negatives) for negatives in rows["negatives"])
    assert table.groupby(["model", "request"])["is_positive"].sum().eq(1).all()
    assert set(table.loc[table["is_positive"], "item"]) == {"p"}
    one = table[(table["model"] == "sft") & (table["user"] == "u5")]
    np.testing.assert_array_equal(one["score"], scores["sft"][5])
    assert one["title"].tolist() == ["Positive", *rows[5]["negatives"]]
    assert set(one["timestamp"]) == {1005}
    assert "dmpo against random" in (folder / "evaluation.md").read_text()


def test_rows_of_finished_answers_have_no_items(tmp_path, evaluation, scores, rows):
    bare = rows.remove_columns(["positive_item", "negative_items"])
    bare = bare.add_column("positive_item", [""] * N).add_column("negative_items", [[]] * N)
    write_evaluation(tmp_path, Evaluation.model_validate(evaluation), scores, bare)
    table = pd.read_parquet(tmp_path / "scores.parquet")
    assert table["item"].isna().all()
    assert table["title"].notna().all()


def test_a_failed_write_leaves_the_old_files(tmp_path, evaluation, scores, rows, monkeypatch):
    found = Evaluation.model_validate(evaluation)
    write_evaluation(tmp_path, found, scores, rows)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="finite number"):
        found.models["sft"]["mrr"].value = float("nan")
    with monkeypatch.context() as patch:
        patch.setattr(report, "markdown", lambda evaluation: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_evaluation(tmp_path, found, {"random": scores["random"]}, rows)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_scores_that_do_not_match_name_the_model_and_the_request(scores, rows):
    with pytest.raises(ValueError, match="scores of sft: 119 requests scored, but there are 120"):
        evaluate_scores({"sft": scores["sft"][1:]}, rows, samples=100, seed=0)
    with pytest.raises(ValueError, match="scores of sft: request 0 has 4 candidates, but 5 scores"):
        evaluate_scores({"sft": [np.zeros(5), *scores["sft"][1:]]}, rows, samples=100, seed=0)
    with pytest.raises(ValueError, match="scores of sft: request 0: score nan"):
        evaluate_scores({"sft": [np.full(4, np.nan), *scores["sft"][1:]]}, rows, samples=100, seed=0)


def test_any_name_keeps_the_rows_of_a_markdown_table():
    """Names of models, and settings that a study's table shows, may hold what ends a cell or a row."""
    table = Table("", ["a|b", "c"], [[Cell("x|y\nz", "of|it"), Cell("1", kind="strong")], [Cell("w")]])
    lines = tables.markdown(table).splitlines()
    assert [len(re.split(r"(?<!\\)\|", line)) for line in lines] == [4, 4, 4, 4]
    assert lines[2] == r"| x\|y z (of\|it) | **1** |"
