"""Run folders read back: the table, the differences, the picture."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import Dataset
from matplotlib.image import imread
from rich.console import Console

from dmpo_dist.cli import main
from dmpo_dist.config import DataConfig, RunConfig, Source
from dmpo_dist.data.prepare import prepare
from dmpo_dist.evaluation.report import evaluate_scores, write_evaluation
from dmpo_dist.records.compare import find_evaluations, paired_lines, runs_as_json, show_comparison, show_runs
from dmpo_dist.records.read import find_runs, read_run

USERS, NEGATIVES = 60, 4


def write_run(folder: Path, stage: str, finished: bool = True, **config) -> Path:
    folder.mkdir(parents=True)
    settings = RunConfig.model_validate({"output_dir": folder, **config}).model_dump(mode="json")
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "environment.json").write_text(json.dumps({"git_commit": "0123456789abcdef-dirty"}))
    extra = {"margin": 0.5} if stage == "train" else {}
    records = [{"kind": "start", "time": 1e9 + len(folder.name), "stage": stage, "steps": 40}]
    for step in (10, 20, 30, 40):
        speed = 1.0 if step == 10 else 8.0  # the first line is slow
        records.append({"kind": "train", "step": step, "loss": 10 / step, "groups_per_second": speed, **extra})
        records.append({"kind": "validation", "step": step, "ndcg@10": 0.5 - abs(step - 20) / 100})
    if finished:
        records.append({"kind": "end", "selected_step": 20, "model": str(folder / "model")})
    lines = [json.dumps(record) for record in records]
    (folder / "metrics.jsonl").write_text("\n".join(lines if finished else [*lines[:-4], '{"kind": "tr']) + "\n")
    return folder


def rows(order: np.ndarray) -> Dataset:
    columns = {
        "user": [f"u{u}" for u in order], "timestamp": [int(u) for u in order],
        "positive": [f"title {u}" for u in order],
        "positive_item": [f"item {u}" for u in order],
        "negatives": [[f"title {u}-{n}" for n in range(NEGATIVES)] for u in order],
        "negative_items": [[f"item {u}-{n}" for n in range(NEGATIVES)] for u in order],
    }  # fmt: skip
    return Dataset.from_dict(columns)


@pytest.fixture
def three_runs(tmp_path):
    """Two finished runs that one evaluation ranks, and one that was cut short and never evaluated."""
    write_run(tmp_path / "a", "sft")
    write_run(tmp_path / "bb", "train", objective={"name": "sdpo", "beta": 0.5}, train={"learning_rate": 3e-4})
    write_run(tmp_path / "ccc", "train", finished=False)
    rng = np.random.default_rng(0)
    scores = {
        name: list(rng.normal(size=(USERS, 1 + NEGATIVES)) + lift * np.eye(1, 1 + NEGATIVES))
        for name, lift in (("sft", 0.5), ("dmpo", 1.5))
    }
    data = rows(np.arange(USERS))
    evaluation = evaluate_scores(scores, data, 1000, 0)
    evaluation.folders = {"sft": str(tmp_path / "a/model"), "dmpo": "bb/model"}  # the second as typed elsewhere
    write_evaluation(tmp_path / "evaluation", evaluation, scores, data)
    return tmp_path, evaluation, scores


def shown(show, *arguments) -> str:
    text = io.StringIO()
    show(*arguments, Console(file=text, width=250))
    return text.getvalue()


def test_the_table_says_what_each_run_is(three_runs):
    root, evaluation, _ = three_runs
    lines = shown(show_runs, find_runs(root), root).splitlines()
    a, bb, ccc = (next(line.split() for line in lines if line.split()[:1] == [name]) for name in ("a", "bb", "ccc"))
    assert a[1:3] == ["scratch", "sft"]
    assert bb[1:4] == ["scratch", "train", "sdpo"]
    test = f"{evaluation.models['dmpo']['ndcg@10'].value:.3f}"
    assert " ".join(bb[4:]).startswith(f"40/40 0.500 20 {test} 8.0 2001-09-09")
    assert bb[-2:] == ["01234567*", "finished"]
    assert " ".join(ccc[4:]).startswith("20/40 0.500 20 - 8.0")  # half a line and what followed it are gone
    assert ccc[-1] == "unfinished"


def test_a_run_that_is_being_extended_is_not_finished(tmp_path):
    log = write_run(tmp_path / "a", "train") / "metrics.jsonl"
    began = read_run(tmp_path / "a").began
    with log.open("a") as file:
        file.write(json.dumps({"kind": "start", "time": 2e9, "stage": "train", "steps": 80}) + "\n")
    run = read_run(tmp_path / "a")
    assert (run.end, run.steps, run.began) == (None, (40, 80), began)
    with log.open("a") as file:
        file.write(json.dumps({"kind": "step", "stage": "train", "step": 80, "loss": 0.1}) + "\n")
        file.write(json.dumps({"kind": "end", "selected_step": 60, "model": "m"}) + "\n")
    assert (read_run(tmp_path / "a").best_step, read_run(tmp_path / "a").steps) == (60, (80, 80))


def test_the_result_of_a_run_that_keeps_its_last_weights_is_not_the_best_step(tmp_path):
    for name in ("best", "last"):
        folder = write_run(tmp_path / name, "train", finished=False, train={"select": name})
        with (folder / "metrics.jsonl").open("a") as log:
            log.write('\n{"kind": "validation", "step": 30, "ndcg@10": 0.4}\n')
    assert [read_run(tmp_path / name).best_step for name in ("best", "last")] == [20, 30]


@pytest.mark.parametrize("width", [80, None])
def test_names_of_runs_stay_whole_on_a_narrow_terminal_and_in_a_pipe(three_runs, width):
    root, *_ = three_runs
    text = io.StringIO()
    console = Console(file=text, width=width or 40, force_terminal=width is not None, no_color=True)
    show_runs(find_runs(root), root, console)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text.getvalue()).splitlines()
    assert any(line.split()[:1] == ["ccc"] for line in lines)
    assert (max(map(len, lines)) <= 80) == (width == 80)
    assert ("commit" in lines[1]) == (width is None)
    found = json.loads(runs_as_json(find_runs(root), root))
    assert {run["run"]: run["finished"] for run in found} == {"a": True, "bb": True, "ccc": False}


def test_a_comparison_shows_what_differs_and_pairs_the_users(three_runs):
    root, evaluation, scores = three_runs
    runs = [read_run(root / name) for name in ("a", "bb")]
    text = shown(show_comparison, runs, ["a", "bb"], find_evaluations(root))
    keys = {line.split()[0] for line in text.splitlines() if line.strip()}
    assert {"objective.name", "objective.beta", "train.learning_rate"} <= keys
    assert not {"output_dir", "seed", "train.steps"} & keys
    assert {
        ("last_step", "40", "40"), ("margin", "at", "last_step", "-", "0.5"),
        ("loss", "at", "last_step", "0.25", "0.25"),
        ("selected_step", "20", "20"), ("validation/ndcg@10", "at", "selected_step", "0.5", "0.5"),
    } <= {tuple(line.split()) for line in text.splitlines()}  # fmt: skip
    for comparison in evaluation.comparisons:  # what the evaluation itself said of the same two
        expected = f"{comparison.difference:+.3f} [{comparison.low:.3f}, {comparison.high:.3f}]"
        assert f"bb against a: {comparison.metric} {expected}, paired over {USERS} users" in text

    order = np.random.default_rng(1).permutation(USERS)  # evaluated apart, its requests in another order
    apart = rows(order)
    alone = {"other": [scores["dmpo"][u] for u in order]}
    second = evaluate_scores(alone, apart, 100, 0)
    second.folders = {"other": str(root / "bb/model")}
    write_evaluation(root / "later", second, alone, apart)
    assert paired_lines(runs, ["a", "bb"], [root / "evaluation"]) == paired_lines(
        runs, ["a", "bb"], find_evaluations(root)
    )

    fewer = {"other": alone["other"][:50]}
    write_evaluation(root / "later", second, fewer, apart.select(range(50)))
    (line,) = paired_lines(runs, ["a", "bb"], find_evaluations(root))
    assert line == "bb against a: evaluated on other candidates, so not comparable"
    assert paired_lines([runs[0], read_run(root / "ccc")], ["a", "c"], [root / "evaluation"]) == [
        "c: no evaluation ranks its model"
    ]


def test_runs_on_different_files_of_ready_rows_are_not_paired(tmp_path):
    """Their rows have no items, and the same names of users and times whatever file they are from."""
    runs = []
    for name in "ab":
        rows = [{"prompt": f"{name} {i}", "chosen": f"{name} yes {i}", "rejected": f"{name} no {i}"} for i in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"path": str(tmp_path / f"{name}.jsonl")}
        data = prepare(DataConfig(source=Source(**source)), 0, tmp_path / f"data-{name}", lambda _: None)
        runs.append(read_run(write_run(tmp_path / name, "train")))
        scores = {"dmpo": [np.array([1.0, 0.0])] * len(data.test)}
        evaluation = evaluate_scores(scores, data.test, 10, 0)
        evaluation.folders = {"dmpo": str(tmp_path / name / "model")}
        write_evaluation(tmp_path / f"evaluation-{name}", evaluation, scores, data.test)
    assert paired_lines(runs, ["a", "b"], find_evaluations(tmp_path)) == [
        "b against a: evaluated on other candidates, so not comparable"
    ]


def test_curves_of_several_runs_and_user_mistakes(three_runs, capsys, monkeypatch):
    root, *_ = three_runs

    def dmpo(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["dmpo", "runs", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        return exit_.value.code, capsys.readouterr().err

    picture = root / "plots" / "all.png"
    assert dmpo("plot", root / "a", root / "bb", root / "ccc", "--output", picture) == (0, "")
    assert imread(picture).std() > 0.05
    for arguments, message in [
        (("plot", root / "a", root / "bb", "--output", picture), "exists already and is kept"),
        (
            ("plot", root / "a", root / "bb", "--output", root / "x.png", "--metric", "auk"),
            "no validation auk was logged; there is ndcg@10",
        ),
        (("compare", root / "a"), "give two or more different runs"),
        (("compare", root / "a", root / "a"), "give two or more different runs"),
        (("compare", root / "a", root / "evaluation"), "evaluation holds no training run"),
        (("list", root / "evaluation"), "holds no training run"),
        (("list", root / "nowhere"), "no such folder"),
    ]:
        code, error = dmpo(*arguments)
        assert (code, error.count("\n")) == (2, 1)
        assert message in error
    (root / "a" / "config.yaml").write_text("a: [")
    code, error = dmpo("list", root)
    assert code == 2
    assert "a/config.yaml: damaged, cannot be read" in error


@pytest.mark.parametrize("damage", ["cut", "a folder"])
def test_a_damaged_configuration_is_named(tmp_path, capsys, monkeypatch, damage):
    """A cut one may still be YAML; a folder in its stead is no missing file."""
    file = write_run(tmp_path / "runs/one", "train") / "config.yaml"
    text = file.read_text()
    file.unlink()
    file.mkdir() if damage == "a folder" else file.write_text(text[: text.index("model:")])
    monkeypatch.setattr("sys.argv", ["dmpo", "runs", "list", str(tmp_path / "runs")])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "config.yaml" in capsys.readouterr().err


def test_defaults_have_the_types_that_they_have_when_read_back():
    settings = RunConfig(model={"lora": {"r": 4}})
    again = RunConfig.model_validate(yaml.safe_load(yaml.safe_dump(settings.model_dump(mode="json"))))
    assert json.dumps(again.model_dump(mode="json")) == json.dumps(settings.model_dump(mode="json"))
