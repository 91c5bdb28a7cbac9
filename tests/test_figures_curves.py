"""Curves of long, short, broken and empty runs are drawn, with the panels the run has values for."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from dmpo_dist.figures.curves import plot_curves

TRAIN = {"loss": 0.6, "margin": 0.3, "accuracy": 0.7, "logp_positive": -12.0, "logp_negative": -15.0, "grad_norm": 1.0}
VALIDATION = {"ndcg@10": 0.4, "hr@1": 0.2, "mrr": 0.3, "auc": 0.7}
ALL = ["Loss", "Margin", "Accuracy", "Log-probability", "Gradient", "Validation"]


def train(step: int, **values) -> str:
    return json.dumps({"kind": "train", "step": step, "learning_rate": 1e-4, "tokens_per_second": 1e4, **values})


def validation(step: int, **values) -> str:
    return json.dumps({"kind": "validation", "step": step, **values})


LONG = [line for s in range(1, 80) for line in (train(s, **TRAIN), validation(s, **VALIDATION))]
RUNS = {
    "train": (LONG, ALL),
    "sft": ([train(10, loss=3.0), train(20, loss=2.0), validation(20, **VALIDATION)], ["Loss", "Validation"]),
    "one_line": ([train(10, **TRAIN)], ALL[:5]),
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
