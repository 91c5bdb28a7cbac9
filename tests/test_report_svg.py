"""Charts say what the figures are: places on the page are linear in the values, and nothing is lost or mixed up."""

import re
from xml.etree.ElementTree import fromstring

import numpy as np
import pandas as pd
import pytest
from report_world import study

from dmpo_dist.artifacts.environment import Environment
from dmpo_dist.artifacts.log import Log, StepRecord
from dmpo_dist.records.read import Run
from dmpo_dist.report.curves import MOST_POINTS, run_figures
from dmpo_dist.report.records import read_study
from dmpo_dist.report.study import cells_table, shots_figures, sweep_figures, transfer_table
from dmpo_dist.report.svg import HEIGHT, WIDTH, IntervalRow, Line, Panel, interval_chart, line_chart


def places(chart: str) -> list[np.ndarray]:
    """(n, 2) corners of each line."""
    lines = [e.get("points") for e in fromstring(chart).iter("polyline")]
    return [np.array([[float(v) for v in point.split(",")] for point in line.split()]) for line in lines]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e7])
def test_lines_are_linear_in_their_values_and_stay_inside(scale):
    x, y = np.arange(20.0), scale * np.random.default_rng(0).normal(size=20)
    (corners,) = places(line_chart([Panel([Line("a", list(zip(x, y, strict=True)))])], "alt", "step"))
    assert corners.min() >= 0
    assert corners[:, 0].max() <= WIDTH
    assert corners[:, 1].max() <= HEIGHT
    for of_chart, values, sign in ((corners[:, 0], x, 1), (corners[:, 1], y, -1)):  # upwards is a smaller coordinate
        slope, intercept = np.polyfit(values, of_chart, 1)
        assert slope * sign > 0
        np.testing.assert_allclose(slope * values + intercept, of_chart, atol=0.06)  # of a tenth of a unit


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-12])
def test_a_level_line_and_a_single_point_are_drawn(value):
    for points in ([(1.0, value)], [(0.0, value), (5.0, value)]):
        (corners,) = places(line_chart([Panel([Line("a", points)])], "alt", "step"))
        assert np.isfinite(corners).all()
        assert 0 < corners[0, 1] < HEIGHT


def test_a_whisker_has_its_figure_where_it_belongs():
    rows = [IntervalRow("a", 0.2, 0.1, 0.3), IntervalRow("group"), IntervalRow("b" * 40, -0.4, -0.5, -0.2)]
    chart = fromstring(interval_chart(rows, "alt", zero=True))
    whiskers = [e for e in chart.iter("line") if e.get("class") == "whisker"]
    ends = np.array([[float(e.get("x1")), float(e.get("x2"))] for e in whiskers]).ravel()
    dots = [float(e.get("cx")) for e in chart.iter("circle")]
    zero = next(float(e.get("x1")) for e in chart.iter("line") if e.get("class") == "zero")
    drawn, values = np.array([*ends, *dots, zero]), np.array([0.1, 0.3, -0.5, -0.2, 0.2, -0.4, 0.0])
    slope, intercept = np.polyfit(values, drawn, 1)
    np.testing.assert_allclose(slope * values + intercept, drawn, atol=0.06)
    assert "b" * 40 in [e.text for e in chart.iter("title")]  # cut in its column, whole on demand
    assert [e.text for e in chart.iter("text")][-1] == "\u22120.400"


def test_a_long_series_keeps_its_spikes_and_few_points(tmp_path):
    loss = np.ones(20_000)
    loss[7_001], loss[13_002] = 50.0, -40.0
    records = [StepRecord(step=step, loss=value) for step, value in enumerate(loss)]
    (figure,) = run_figures(Run(tmp_path, {}, Environment(), Log(records)))
    raw, smooth = places(figure.chart)
    assert max(len(raw), len(smooth)) <= MOST_POINTS + 2
    assert raw[:, 1].max() - raw[:, 1].min() > 0.8 * 0.7 * HEIGHT  # both spikes: nearly the whole height of the plot
    assert "running mean" in figure.note.lower()


def test_a_sweep_shows_seed_means_and_never_mixes_models(tmp_path):
    rows = study()
    boundary = rows[rows["objective"] == "dmpo"].assign(free="objective.negative_selection=boundary")
    boundary["value"] += 0.1
    pd.concat([rows.assign(free=""), boundary]).to_parquet(tmp_path / "experiment.parquet")
    rows = read_study(tmp_path / "experiment.parquet")
    figures = sweep_figures(rows)
    assert {re.sub(",.*", "", f.title) for f in figures} == {"games", "films"}
    legend = {label for label, _ in figures[0].legend}
    assert legend == {"dmpo", "sdpo", "dmpo, objective.negative_selection=boundary", "sft", "popularity"}
    said = re.search(r"HR@1, dmpo: ([\d., at]+)", figures[-1].chart)[1]
    own = rows[
        (rows["objective"] == "dmpo") & (rows["free"] == "") & (rows["dataset"] == "games") & rows["shots"].isna()
    ]
    own = own[(own["metric"] == "hr@1") & (own["evaluated_on"] == "games")]
    expected = [f"{value:.3f} at {k:g}" for k, value in own.groupby("k")["value"].mean().items()]
    assert said.strip(", ").startswith(", ".join(expected))
    assert len(shots_figures(rows)) == 2
    table = transfer_table(rows)
    assert table.columns[1:] == ["films \u2192 films", "films \u2192 games", "games \u2192 films", "games \u2192 games"]
    by_model = {row[0].text: [float(cell.text) for cell in row[1:]] for row in table.rows}
    assert not {"sft", "popularity"} & by_model.keys()
    assert np.diff(by_model["sdpo, K=15"]) == pytest.approx([-0.2, 0.0, 0.2])
    assert len(cells_table(rows).rows) == 3 * 4 * 2 * 4 + 2 * 2  # curves x K x data x (home, away, 2 sizes), 2 levels
