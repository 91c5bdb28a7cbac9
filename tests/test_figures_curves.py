"""Curves of long, short, broken and empty runs are drawn, with the panels the run has values for."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from dmpo_dist.artifacts.log import StepRecord, ValidationRecord, by_step, read_log
from dmpo_dist.figures.curves import losses_apart, plot_curves, run_drawings, side_by_side_drawings
from dmpo_dist.figures.models import METHODS, looks_of, model_look, model_looks

TRAIN = {"loss": 0.6, "margin": 0.3, "accuracy": 0.7, "reward_positive": 0.1, "reward_negative": -0.2,
         "logp_positive": -12.0, "logp_negative": -15.0, "grad_norm": 1.0, "learning_rate": 1e-4,
         "groups_per_second": 8.0, "memory_gib": 0.5}  # fmt: skip
VALIDATION = {"ndcg@10": 0.4, "hr@1": 0.2, "mrr": 0.3, "auc": 0.7}
ALL = ["Loss", "Rewards", "Margin", "Accuracy", "Log-probability", "Gradient", "Learning", "Throughput", "Memory",
       "Validation"]  # fmt: skip


def train(step: int, **values) -> str:
    return json.dumps({"kind": "train", "step": step, "tokens_per_second": 1e4, **values})


def validation(step: int, **values) -> str:
    return json.dumps({"kind": "validation", "step": step, **values})


LONG = [line for s in range(1, 80) for line in (train(s, **TRAIN), validation(s, **VALIDATION))]
RUNS = {
    "train": (LONG, ALL),
    "sft": ([train(10, loss=3.0), train(20, loss=2.0), validation(20, **VALIDATION)], ["Loss", "Validation"]),
    "one_line": ([train(10, **TRAIN)], ALL[:-1]),
    "only_validation": ([validation(0, **VALIDATION)], ["Validation"]),
    "gaps": ([train(1, loss=np.nan, margin=None), train(2, loss=np.inf), train(3, loss=1.0)], ["Loss"]),
    "torn": ([train(1, loss=1.0), train(2, loss=0.9)[:20]], ["Loss"]),
    "empty": ([], []),
}


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures saved, in order."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    return figures


def plot(lines: list[str], folder: Path) -> Path:
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    plot_curves(folder / "metrics.jsonl", folder / "out" / "curves.png")
    return folder / "out" / "curves.png"


@pytest.mark.parametrize("run", RUNS)
def test_every_run_is_drawn_with_the_panels_it_has(run, tmp_path, drawn):
    lines, panels = RUNS[run]
    image = imread(plot(lines, tmp_path))
    assert image.shape[0] > 300
    assert image.std() > 0.01
    assert [axes.get_title(loc="left").split(":")[0].split()[0] for axes in drawn[0].axes] == panels


def test_the_best_step_is_marked_and_a_repeated_step_counts_once(tmp_path, drawn):
    lines = [validation(s, **{"ndcg@10": v}) for s, v in [(10, 0.1), (20, 0.9), (30, 0.2), (20, 0.3), (40, 0.25)]]
    plot(lines, tmp_path)  # step 20 was logged again after a resume
    (axes,) = drawn[0].axes
    assert axes.get_title(loc="right") == "best ndcg@10: step 20"
    curve = axes.get_lines()[0]
    assert list(curve.get_xdata()) == [10, 20, 30, 40]
    assert list(curve.get_ydata()) == [0.1, 0.3, 0.2, 0.25]


def curves(axes) -> list:
    """The lines that are not the mark of a step."""
    return [line for line in axes.get_lines() if len(line.get_xdata()) and line.get_label()[0] != "_"]


def test_two_points_are_no_line(tmp_path, drawn):
    plot([train(s, **TRAIN) for s in (1, 2)] + [validation(s, **VALIDATION) for s in (1, 2, 3)], tmp_path)
    dashes = {axes.get_title(loc="left"): {line.get_linestyle() for line in curves(axes)} for axes in drawn[0].axes}
    assert dashes.pop("Validation") == {"-", "--", ":", "-."}
    assert set().union(*dashes.values()) == {"None"}


def test_losses_of_sft_and_of_preferences_are_never_on_one_axis(tmp_path):
    """Nor is a preference loss with a likelihood term beside one without: what is drawn is the preference loss."""
    (tmp_path / "metrics.jsonl").write_text("\n".join(train(s, **TRAIN, preference_loss=0.5) for s in (1, 2, 3)))
    records = read_log(tmp_path / "metrics.jsonl").records
    steps, validated = by_step(records, StepRecord), by_step(records, ValidationRecord)
    runs = {name: (losses_apart(steps, stage), validated) for name, stage in (("a/sft", "sft"), ("b", "train"))}
    drawings = {d.title: d.draw.keywords["frame"] for d in side_by_side_drawings(runs, "auc", model_looks(runs))}
    assert {title: list(frame) for title, frame in drawings.items() if "oss" in title} == {
        "Loss of SFT": ["a/sft"],
        "Preference loss, without the likelihood term": ["b"],
    }
    assert drawings["Preference loss, without the likelihood term"]["b"].tolist() == [0.5] * 3
    assert losses_apart(steps.drop(columns="preference_loss"), "train")["preference_loss"].tolist() == [0.6] * 3


def test_a_model_keeps_its_colour(tmp_path, drawn):
    names = ["dmpo", "sft", "sft_continued", "item_knn", "mine", "theirs", "dmpo, K=3", "runs/x/dmpo-2"]
    looks = model_looks(names)
    for name in names:
        others = [one for one in names if one not in (name, "mine", "theirs")]
        for order in ([name, *others], [*others, name]):
            assert model_looks(order)[name].colour == looks[name].colour, "whatever stands beside it"
    assert looks["dmpo"].colour == looks["dmpo, K=3"].colour == looks["runs/x/dmpo-2"].colour == METHODS["dmpo"]
    assert len({(look.colour, look.marker) for look in looks.values()}) == len(names)
    assert len({looks[name].colour for name in ("dmpo", "sft", "sft_continued", "mine", "theirs")}) == 5
    assert model_look("dmpo_likelihood").colour != model_look("dmpo").colour == model_look("dmpo@1").colour
    assert looks_of({"run": "dmpo", "model": "dmpo"})["run"].colour == METHODS["dmpo"]

    plot([train(s, **TRAIN) for s in range(4)], tmp_path)  # a PNG: all lines of a run in one colour
    assert {line.get_color() for axes in drawn[0].axes for line in curves(axes)} == {METHODS["dmpo"]}
    frames = [by_step(read_log(tmp_path / "metrics.jsonl").records, kind) for kind in (StepRecord, ValidationRecord)]
    page = run_drawings(*frames, None, "", model_look("dmpo"))
    assert {look.colour for d in page for _, look in d.draw.keywords["lines"].values()} == {METHODS["dmpo"]}
