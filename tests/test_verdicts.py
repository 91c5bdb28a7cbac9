"""One rule says which differences are clear, and everything that is shown goes by it."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm

from dmpo_dist.artifacts.evaluation import Evaluation
from dmpo_dist.evaluation.comparisons import below_start_lines, comparison_lines, comparison_table
from dmpo_dist.explanation.view import faithfulness_sentence
from dmpo_dist.figures.explanations import faithfulness_drawings
from dmpo_dist.report.gather import Material
from dmpo_dist.report.headline import headline
from dmpo_dist.report.intervals import comparison_drawings
from dmpo_dist.report.tables import comparisons_table
from dmpo_dist.verdicts import judge

nan = math.nan
CASES = {
    "interval and p agree": ((0.008, 0.034, 0.002), "ahead of"),
    "the same below 0": ((-0.034, -0.008, 0.002), "behind"),
    "low is above 0 by rounding alone": ((1e-16, 0.049, 0.052), "level with"),
    "low prints as 0": ((4e-4, 0.049, 0.002), "level with"),
    "high prints as 0": ((-0.049, -4e-4, 0.002), "level with"),
    "p prints as .05": ((0.001, 0.05, 0.0498), "level with"),
    "p disagrees": ((0.001, 0.05, 0.06), "level with"),
    "the interval disagrees": ((-0.01, 0.05, 0.01), "level with"),
    "no difference at all": ((0.0, 0.0, 1.0), "level with"),
    "no p, as in old files": ((0.1, 0.2, None), "level with"),
    "no interval": ((None, None, 0.001), "level with"),
    "nan": ((nan, nan, nan), "level with"),
    "p is nan": ((0.1, 0.2, nan), "level with"),
}


@pytest.mark.parametrize("case", CASES)
def test_interval_and_p_must_agree_as_they_are_printed(case):
    difference, verdict = CASES[case]
    (judged,) = judge([difference])
    assert judged.verdict == verdict
    low, high, p = difference
    mirrored = (None if high is None else -high, None if low is None else -low, p)
    assert judge([mirrored])[0].verdict == {"ahead of": "behind", "behind": "ahead of"}.get(verdict, verdict)


def test_many_comparisons_need_more_than_one_small_p():
    """Ten of which one has p .04 show nothing; a difference that stands alone, or one among many as clear, does."""
    one, chance = (0.001, 0.05, 0.04), (-0.02, 0.03, 0.6)
    assert judge([one])[0].clear
    assert not any(judged.clear for judged in judge([one] + [chance] * 9))
    assert all(judged.clear for judged in judge([one] * 10))
    assert judge([one] * 10)[0].p == pytest.approx(0.04)
    # those without a p-value are no comparisons
    assert judge([one, (0.1, 0.2, None), (0.1, 0.2, nan)])[0].p == pytest.approx(0.04)
    assert judge([]) == []


def test_of_many_true_nulls_few_are_ever_called_clear():
    """Benjamini and Hochberg: without any true difference at most 5 % of tables have a clear one (seed fixed)."""
    z = np.random.default_rng(0).normal(size=(400, 12))
    tables = [[(v - 1.96, v + 1.96, 2 * norm.sf(abs(v))) for v in row] for row in z]
    wrong = sum(any(judged.clear for judged in judge(table)) for table in tables)
    assert wrong <= 0.07 * len(tables)
    assert sum(low > 0 or high < 0 for table in tables for low, high, _ in table) > 0.04 * z.size  # by intervals alone


def comparison(b: str, low: float, high: float, p: float | None, metric: str = "ndcg@10") -> dict:
    return {"a": "dmpo", "b": b, "metric": metric, "difference": (low + high) / 2, "low": low, "high": high, "p": p}


COMPARED = [
    comparison("sft_continued", 1e-16, 0.049, 0.052),
    comparison("popularity", 0.1, 0.2, 0.002),
    comparison("item_knn", -0.2, -0.1, 0.002),
    comparison("sft", 0.001, 0.05, None),
]


def evaluation() -> Evaluation:
    names = ["dmpo", *(c["b"] for c in COMPARED)]
    models = {name: {"ndcg@10": {"value": 0.5 + i / 100}} for i, name in enumerate(names)}
    content = {
        "requests": 9,
        "negatives": {"most": 4},
        "models": models,
        "comparisons": COMPARED,
        "against_start": COMPARED,
    }
    return Evaluation.model_validate(content | {"folders": {"dmpo": "a", "sft": "b", "sft_continued": "c"}})


def test_terminal_markdown_page_and_figures_agree():
    found = evaluation()
    clear = {"popularity": True, "item_knn": True, "sft_continued": False, "sft": False}
    said = {line.split()[2].rstrip(":"): "no clear" not in line for line in comparison_lines(found.content())}
    assert said == clear
    soft = {row[0].text.strip(): row[1].kind for row in comparison_table(found.content()).rows if len(row) > 1}
    assert {name: kind != "soft" for name, kind in soft.items()} == clear
    strong = {row[0].text.split()[-1]: row[1].kind for row in comparisons_table(found).rows}
    assert {name: kind == "strong" for name, kind in strong.items()} == clear
    (drawing,) = comparison_drawings(found.comparisons, {})
    filled = {row.label: not row.hollow for row in drawing.draw.keywords["rows"] if row.value is not None}
    assert filled == clear
    assert [line.split()[5].rstrip(":") for line in below_start_lines(found.content())] == ["item_knn"]


def test_the_headline_goes_by_the_rule():
    material = Material("x", {}, {"e": evaluation()}, {}, {}, {}, {}, {}, {}, [], [], [])
    (text,) = headline(material)
    assert "level with sft_continued (+0.025 [+0.000, +0.049], paired)" in text
    assert "behind item_knn" in text
    other_way = evaluation()  # of `dmpo evaluate --against dmpo`, whose differences are others minus dmpo
    other_way.comparisons = [
        c.model_copy(update={"a": c.b, "b": c.a, "difference": -c.difference, "low": -c.high, "high": -c.low})
        for c in other_way.comparisons
    ]
    assert headline(replace(material, evaluations={"e": other_way})) == [text]


def test_faithfulness_needs_the_sign_test_too():
    area = {"area": 0.4, "low": 0.1, "high": 0.7, "users_above": 9, "users_below": 1, "sign_test_p": 0.02}
    inverse = area | {"area": -0.4, "low": -0.7, "high": -0.1}
    areas = {"attribution_vs_random": area, "inverse_vs_random": inverse}
    assert faithfulness_sentence(areas).startswith("Faithful")
    unsure = areas | {"attribution_vs_random": area | {"sign_test_p": 0.2}}
    assert faithfulness_sentence(unsure).startswith("Not shown")
    assert faithfulness_sentence(areas | {"inverse_vs_random": inverse | {"high": -1e-9}}).startswith("Partly")
    (drawing,) = faithfulness_drawings({"curves": {}, "areas": unsure})
    rows = [row.hollow for row in drawing.draw.keywords["rows"] if row.value is not None]
    assert rows == [True, False]
