"""Charts of a page: the same bytes every time, text that stays text, figures that are in them and never mixed up."""

import re
from importlib import resources
from xml.etree.ElementTree import Element, fromstring

import numpy as np
import pandas as pd
import pytest
from report_folder import NASTY, study

from dmpo_dist.artifacts.log import StepRecord, ValidationRecord, by_step
from dmpo_dist.figures.curves import run_drawings
from dmpo_dist.figures.intervals import IntervalRow, interval_drawing
from dmpo_dist.figures.models import FREE, METHODS, model_look, model_looks
from dmpo_dist.figures.study import few_shot_drawings, matrix_drawings, sweep_drawings
from dmpo_dist.figures.style import PALETTE, Drawing, chart, looks
from dmpo_dist.report.records import read_study
from dmpo_dist.report.study import cells_table, points_of, transfer_table

ROWS = [IntervalRow("a", 0.2, 0.1, 0.3), IntervalRow("group"), IntervalRow("b" * 40, -0.4, -0.5, -0.2)]


def svg(drawing: Drawing) -> Element:
    return fromstring(str(chart(drawing, 1)))


def corners(line: Element) -> np.ndarray:
    """(n, 2) points of a path."""
    return np.array([[float(v) for v in pair] for pair in re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", line.get("d"))])


def lines(drawing: Drawing, colour: str) -> list[np.ndarray]:
    root = svg(drawing)
    return [corners(e) for e in root.iter("path") if e.get("stroke") == colour.lower() and "clip-path" in e.attrib]


def spread(values: np.ndarray) -> float:
    return values.max() - values.min()


def test_the_same_figures_give_the_same_bytes_and_ids_of_their_own():
    drawing = interval_drawing("NDCG@10", ROWS, zero=True)
    one, same, other = chart(drawing, 1), chart(drawing, 1), chart(drawing, 2)
    assert one == same
    ids = [set(re.findall(r'id="(.*?)"', str(element))) for element in (one, other)]
    assert ids[0] & ids[1] == set()
    referred = re.findall(r'href="#(.*?)"|url\(#(.*?)\)|aria-\w+="(.*?)"', str(one))
    assert {name for names in referred for name in names if name} <= ids[0]


def test_text_is_text_with_a_title_and_a_description():
    root = svg(interval_drawing("NDCG@10", ROWS, zero=True))
    texts = [e.text for e in root.iter("text")]
    assert {"a", "group", "+0.200", "\u22120.400"} <= set(texts)
    assert [e.tag for e in root][:2] == ["title", "desc"]
    assert root.find("title").text == "NDCG@10"
    assert (
        "a +0.200 [+0.100, +0.300]; group " + "b" * 40 + " \u22120.400 [\u22120.500, \u22120.200]"
        in root.find("desc").text
    )
    assert {e.text for e in root.iter("title")} >= {f"{'b' * 40} \u22120.400 [\u22120.500, \u22120.200]"}  # on its dot
    assert root.get("viewBox").startswith("0 0 338.4 ")
    assert not {"width", "height", "style"} & root.attrib.keys()
    assert not any("style" in e.attrib or e.tag in ("style", "metadata", "image") for e in root.iter())


@pytest.mark.parametrize("name", [*NASTY, "a $\\frac{1}{2}$ b", "]]>&amp;"])
def test_any_name_is_drawn_as_it_is(name):
    """Whatever markup it looks like; what cannot be printed becomes a question mark, and a long name is cut."""
    root = svg(interval_drawing(name, [IntervalRow(name, 0.5)]))
    (label,) = [e.text for e in root.iter("text") if e.text[:3] == name[:3]]
    assert len(label) <= 28
    assert label.isprintable()
    if name.isprintable() and len(name) <= 28:
        assert label == name


def test_whiskers_and_dots_are_where_their_figures_are():
    drawing = interval_drawing("x", [r for r in ROWS if r.value is not None], zero=True)
    ends = [line[:, 0] for line in lines(drawing, "#555555") if spread(line[:, 1]) == 0]
    zero = [line[0, 0] for line in lines(drawing, "#555555") if spread(line[:, 0]) == 0]
    dots = [float(e.get("x")) for e in svg(drawing).iter("use") if e.get("fill") == "#555555"]
    drawn, values = np.array([*np.ravel(ends), *dots, *zero]), np.array([0.1, 0.3, -0.5, -0.2, 0.2, -0.4, 0.0])
    slope, intercept = np.polyfit(values, drawn, 1)
    assert slope > 0
    np.testing.assert_allclose(slope * values + intercept, drawn, atol=0.02)


def test_a_long_series_keeps_its_spikes_and_few_points():
    loss = np.ones(20_000) + np.random.default_rng(0).normal(size=20_000) / 100
    loss[7_001], loss[13_002] = 50.0, -40.0
    records = [StepRecord(step=step, loss=value) for step, value in enumerate(loss)]
    frames = [by_step(records, kind) for kind in (StepRecord, ValidationRecord)]
    (drawing,) = run_drawings(*frames, best=None, metric="", look=model_look("dmpo"))
    raw, smooth = lines(drawing, "#0072b2")
    assert max(len(raw), len(smooth)) < 2_500
    height = float(svg(drawing).get("viewBox").split()[-1])
    assert spread(raw[:, 1]) > 0.65 * height  # both spikes: nearly the whole height of the plot
    assert spread(smooth[:, 1]) < 0.1 * height
    assert "running mean" in drawing.note.lower()


def test_the_page_has_a_colour_for_each_that_a_chart_uses():
    style = (resources.files("dmpo_dist.report") / "templates/style.css").read_text()
    known = set(re.findall(r'\[(?:fill|stroke)="(#\w+)"\]', style))
    of_looks = looks(range(49))
    assert len({(look.colour, look.marker) for look in of_looks.values()}) == 49

    def draw(axes):
        for number, look in of_looks.items():
            axes.plot([0, number], look.dash, color=look.colour, marker=look.marker, label=str(number))

    def draw_models(axes):
        for name, look in model_looks([*METHODS, *map(str, range(9))]).items():
            axes.plot([0, 1], look.dash, color=look.colour, marker=look.marker, label=name)

    drawings = [
        Drawing("all looks", "alt", draw),
        Drawing("models", "alt", draw_models),
        interval_drawing("x", [IntervalRow("a", 0.5, hollow=True)]),
    ]
    used = {c for drawing in drawings for c in re.findall(r'(?:fill|stroke)="(#\w+)"', chart(drawing, 1))}
    assert {colour.lower() for colour in (*PALETTE, *METHODS.values(), *FREE)} <= used <= known


@pytest.fixture
def grid(tmp_path) -> pd.DataFrame:
    """Two models under one name, apart by a free axis."""
    rows = study()
    boundary = rows[rows["objective"] == "dmpo"].assign(free="objective.negative_selection=boundary")
    boundary["value"] += 0.1
    pd.concat([rows.assign(free=""), boundary]).to_parquet(tmp_path / "experiment.parquet")
    return read_study(tmp_path / "experiment.parquet")


def test_a_sweep_shows_seed_means_and_never_mixes_models(grid):
    drawings = sweep_drawings(points_of(grid))
    assert {re.sub(",.*", "", drawing.title) for drawing in drawings} == {"games", "films"}
    legend = {e.text for e in svg(drawings[0]).iter("text")}
    assert legend >= {"dmpo", "sdpo", "dmpo, objective.negative_selection=boundary", "SFT", "popularity"}
    drawing = next(drawing for drawing in drawings if drawing.title.startswith("games, all training groups: HR@1"))
    said = re.search(r" dmpo: ([\d., at]+)", drawing.alt)[1]
    own = grid[
        (grid["objective"] == "dmpo") & (grid["free"] == "") & (grid["dataset"] == "games") & grid["shots"].isna()
    ]
    own = own[(own["metric"] == "hr@1") & (own["evaluated_on"] == "games")]
    expected = [f"{value:.3f} at {k:g}" for k, value in own.groupby("k")["value"].mean().items()]
    assert said.strip(", ").startswith(", ".join(expected))
    assert len(few_shot_drawings(points_of(grid), ["ndcg@10"])) == 2


def test_transfer_is_of_what_was_evaluated_elsewhere(grid):
    table = transfer_table(grid)
    assert table.columns[1:] == ["films \u2192 films", "films \u2192 games", "games \u2192 films", "games \u2192 games"]
    by_model = {row[0].text: [float(cell.text) for cell in row[1:]] for row in table.rows}
    assert not {"sft", "popularity"} & by_model.keys()
    assert np.diff(by_model["sdpo, K=15"]) == pytest.approx([-0.2, 0.0, 0.2])
    drawing = next(drawing for drawing in matrix_drawings(points_of(grid)) if drawing.title == "sdpo, K=15")
    texts = [e.text for e in svg(drawing).iter("text")]
    assert {f"{value:.3f}" for value in by_model["sdpo, K=15"]} <= set(texts)
    assert len(cells_table(grid).rows) == 3 * 4 * 2 * 4 + 2 * 2  # curves x K x data x (home, away, 2 sizes), 2 levels
