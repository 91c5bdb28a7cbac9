"""The page as a whole: everything found is on it, whatever the data holds, with the same bytes every time."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pandas as pd
import pytest
from report_folder import NASTY, VISIBLE, card, evaluation_of, write_report_folder, write_run

from dmpo_dist.artifacts.evaluation import Evaluation
from dmpo_dist.cli import main
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.report import evaluate_scores, write_evaluation
from dmpo_dist.figures.models import FREE, METHODS
from dmpo_dist.formats import number
from dmpo_dist.report.downloads import as_csv, as_latex
from dmpo_dist.report.gather import gather
from dmpo_dist.report.headline import headline
from dmpo_dist.report.page import render, write_report
from dmpo_dist.report.parts import SECTIONS
from dmpo_dist.report.scores import ranked_requests, scored_models, spread_over, target_ranks
from dmpo_dist.tables import Cell, Table

VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}


class Page(HTMLParser):
    """What a browser would make of it: elements with attributes and text, and whether every tag is closed."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(content.decode())
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.links += [
            value for name, value in attributes if name in ("href", "src", "srcset", "action", "data", "style")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> Path:
    return write_report_folder(tmp_path_factory.mktemp("report") / "world")


@pytest.fixture(scope="module")
def content(everything) -> bytes:
    return render(gather([everything]))


def test_every_section_is_there_with_its_figures_and_its_alternative_texts(everything, content):
    page = Page(content)
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert [key for key in ids if key in SECTIONS] == list(SECTIONS)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(ids)
    charts = [a for a in page.all("svg") if a["class"] == "chart"]
    assert len(charts) == len(page.all("figure")) == len(page.all("figcaption")) >= 30
    assert all(a["role"] == "img" and {a["aria-labelledby"], a["aria-describedby"]} <= set(ids) for a in charts)
    assert page.all("image") == []
    assert not any("style" in attributes for _, attributes in page.elements)
    assert len(page.all("caption")) == len(page.all("table")) > 10
    assert all(a.get("scope") in ("col", "row") for a in page.all("th"))

    evaluation = json.loads((everything / "evaluation" / "evaluation.json").read_text())
    text = "".join(page.texts)
    dmpo = evaluation["models"]["dmpo"]["ndcg@10"]
    assert f"dmpo ranks with NDCG@10 {dmpo['value']:.3f} [{dmpo['low']:.3f}, {dmpo['high']:.3f}]" in text
    for c in evaluation["comparisons"]:
        assert number(c["difference"], "+.3f") in text
        assert f"[{number(c['low'], '+.3f')}, {number(c['high'], '+.3f')}]" in text
    assert "It is one of 2 training runs on this page." in text
    assert "Note: leave-one-out: not <b> comparable" in text
    assert "ease: regularization 300, chosen by its validation NDCG@10 of 0.510; 6 targets it had never seen" in text
    assert "32 requests scored again: log-probs moved by at most 3e-05 nats" in text
    assert (
        "Not shown as it is 1 in any order of 5 candidates: hr@5, hr@10, hr@20, recall@5, recall@10, recall@20." in text
    )
    assert "Sections without content" not in text
    assert "holds interaction data" in text
    assert "compared with 8 titles, all above it and the next below" in text


def test_nothing_is_loaded_from_anywhere(content):
    page = Page(content)
    saved = {a["href"] for a in page.all("a") if "download" in a}
    assert all(re.match(r"data:(text/csv|application/x-tex);base64,", link) for link in saved)
    assert {link for link in page.links if not link.startswith("#")} - saved == {"data:,"}
    assert not re.search(r"@import|url\((?!#)|https?:", content.decode())
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_what_the_data_holds_is_text_and_nothing_but_text(content):
    page = Page(content)
    assert len(page.all("script")) == 1
    assert page.all("img") == page.all("i") == page.all("b") == []
    for title in VISIBLE:
        assert title in page.texts
    assert "films & <i>more</i>" in page.texts
    assert "<u1>" in page.texts


def test_every_table_can_be_saved_with_all_its_digits(everything, tmp_path):
    """As CSV and LaTeX, by links in the page and by --tables."""
    folder, written = tmp_path / "tables", tmp_path / "page.html"
    folder.mkdir()
    (folder / "99-of-an-earlier-report.csv").touch()
    write_report([everything / "evaluation"], written, explanations=True, echo=lambda _: None, tables=folder)
    page = Page(written.read_bytes())
    links = [a for a in page.all("a") if "download" in a]
    saved = {a["download"]: base64.b64decode(a["href"].partition(",")[2]).decode() for a in links}
    assert len(saved) == len(links) == 2 * len(page.all("table"))
    assert {file.name: file.read_bytes().decode() for file in folder.iterdir()} == saved
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"--tables .*tables: holds other files than such tables"):
        write_report([everything], written, explanations=True, echo=lambda _: None, tables=folder)

    table = pd.read_csv(folder / "01-all-models-on-80-test-requests-1-4-candidates.csv").set_index("model")
    models = json.loads((everything / "evaluation" / "evaluation.json").read_text())["models"]
    assert table["NDCG@10"].to_dict() == {name: of_model["ndcg@10"]["value"] for name, of_model in models.items()}
    latex = saved["01-all-models-on-80-test-requests-1-4-candidates.tex"]
    assert latex.startswith("\\begin{tabular}{lrrrrrr}\n\\toprule\nmodel & NDCG@10 &")
    assert "\\textbf{" in next(line for line in latex.splitlines() if line.startswith("dmpo"))


def test_formulas_and_macros_in_names_stay_text():
    row = [Cell("=1+1"), Cell(r"\input{x} 5% $_#^~&", "@sum"), Cell("\u22120.5", key=-0.5), Cell("+0.2 [x]")]
    table = Table("t", ["a", "a", "-b", "c"], [row, [Cell("a heading")]], text_columns=2)
    assert as_csv(table).splitlines() == [
        "a,a 2,a: note,'-b,c",
        r"'=1+1,\input{x} 5% $_#^~&,'@sum,-0.5,'+0.2 [x]",
        "a heading,,,,",
    ]
    body = as_latex(table).split(r"\midrule")[1]
    assert r"=1+1 & \textbackslash input\{x\} 5\% \$\_\#\textasciicircum \textasciitilde \& (@sum) & -0.5" in body


def test_ranked_lists_mark_the_target_where_the_scores_put_it(everything, content):
    scores = pd.read_parquet(everything / "evaluation" / "scores.parquet")
    (folder, models) = everything / "evaluation", {"dmpo": "dmpo", "popularity": "popularity"}
    ranks = {model: target_ranks(folder, model) for model in models}
    for model, of_model in ranks.items():
        for request, group in scores[scores["model"] == model].groupby("request"):
            target = group.loc[group["is_positive"], "score"].item()
            assert of_model[request] == 1 + (group["score"] > target).sum()
    chosen = spread_over(ranks["dmpo"], 6)
    assert [ranks["dmpo"][request] for request in chosen] == sorted(ranks["dmpo"][request] for request in chosen)
    assert (ranks["dmpo"][chosen[0]], ranks["dmpo"][chosen[-1]]) == (ranks["dmpo"].min(), ranks["dmpo"].max())
    for request, found in zip(chosen, ranked_requests(folder, models, chosen), strict=True):
        for model, ranked in found.lists.items():
            assert ranked.target + 1 == ranks[model][request]
            assert ranked.titles[ranked.target] in NASTY
    marked = [a for a in Page(content).all("td") if a["class"] == "t target"]
    assert len(marked) == 6 * 3  # dmpo, sft and the best baseline

    better = int((ranks["dmpo"] < target_ranks(folder, "sft")).sum())
    assert f"higher by dmpo for {better} users" in "".join(Page(content).texts)


def test_of_equal_scores_the_target_stands_last(tmp_path):
    rows = {"request": [0] * 3, "user": ["u"] * 3, "timestamp": [1] * 3, "item": list("abc"), "title": list("abc"),
            "is_positive": [True, False, False], "model": ["m"] * 3, "score": [1.0, 1.0, 2.0]}  # fmt: skip
    pd.DataFrame(rows).to_parquet(tmp_path / "scores.parquet")
    assert target_ranks(tmp_path, "m").tolist() == [2.5]
    assert ranked_requests(tmp_path, {"m": "m"}, [0])[0].lists["m"].target == 2
    pd.DataFrame({"model": ["m"]}).to_parquet(tmp_path / "scores.parquet")
    with pytest.raises(UserError, match=r"scores.parquet: has not the columns .*run `dmpo evaluate` again"):
        scored_models(tmp_path)


def test_the_headline_of_a_study_names_interval_sft_and_the_best_baseline(everything, tmp_path):
    study = shutil.copytree(everything / "study", tmp_path / "study")
    text = " ".join(headline(gather([study])))
    best = (
        r"On games the best of 24 settings, sdpo, K=1 on all examples, has NDCG@10 0\.505 \[0\.\d+, 0\.\d+\] "
        r"\(mean of 2 seeds, [^)]*\): ahead of sft \(\+0\.055 \[\+0\.045, \+0\.065\], paired\) and ahead of "
        r"popularity, the best baseline \(\+0\.105"
    )
    assert re.search(best, text)
    assert "HR@1: dmpo 0.355 at K=15 is behind that at K=1 (\u22120.135" in text
    (study / "differences.parquet").unlink()  # as earlier versions left it
    text = " ".join(headline(gather([study])))
    assert re.search(r"sdpo, K=1 on all examples, has NDCG@10 .*; sft 0\.450, popularity 0\.400 \(not compared", text)
    (study / "differences.parquet").write_bytes(b"PAR")
    with pytest.raises(UserError, match=r"differences.parquet: cannot be read"):
        gather([study])


def test_the_same_folder_gives_the_same_bytes(everything, content, tmp_path):
    """Also from another process with other hashes, and when the report lies in the folder it is about."""
    copy = shutil.copytree(everything, tmp_path / "world")
    command = [sys.executable, "-m", "dmpo_dist", "report", str(copy)]
    done = subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"written: {copy}/report.html" in done.stdout
    assert (copy / "report.html").read_bytes() == content
    write_report([copy], copy / "report.html", explanations=True, echo=lambda line: None)
    assert (copy / "report.html").read_bytes() == content


def test_explanations_of_users_can_be_left_out(everything):
    page = Page(render(gather([everything], explanations=False)))
    text = "".join(page.texts)
    assert "Sections without content in these folders: Ranked lists of a few users, Explanations" in text
    assert "<u1>" not in text
    assert VISIBLE[1] not in text


def test_runs_alone_name_what_is_absent_and_what_is_damaged(tmp_path):
    first, second = write_run(tmp_path / "a", "train", seed=1), write_run(tmp_path / "b", "train", seed=2)
    lines = (first / "metrics.jsonl").read_text().splitlines()
    (first / "metrics.jsonl").write_text("\n".join([*lines[:3], lines[3][:20], '{"step": 1}', *lines[5:]]))
    (second / "metrics.jsonl").write_text("\n".join([*lines[:40], lines[40][:9]]))
    (first / "link.txt").symlink_to(__file__)  # outside of what is reported on
    text = "".join(Page(render(gather([first, second]))).texts)
    assert "a/link.txt" in text
    assert "a/metrics.jsonl: 2 of 126 lines are damaged and left out (line 4, 5)" in text
    assert "b/metrics.jsonl: its last line is cut off" in text
    assert "38 of 120 steps, not finished" in text
    assert "Preference runs side by side" in text
    absent = "Results, Paired comparisons, User by user, Ranked lists of a few users, Strata, K sweep"
    assert f"Sections without content in these folders: {absent}" in text


def test_runs_of_two_evaluations_are_paired_by_their_scores(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name, "train")
        evaluation, scores, rows = evaluation_of({"dmpo": str(tmp_path / name / "model")})
        write_evaluation(tmp_path / name / "evaluation", evaluation, scores, rows)
    page = Page(render(gather([tmp_path / "a", tmp_path / "b"])))
    assert "b against a: ndcg@10 +0.000 [0.000, 0.000], paired over 80 users (no clear difference)" in page.texts
    assert "That is the first of 2 evaluations below." in page.texts


def test_a_pair_of_single_seeds_is_not_named_as_their_models_over_all_seeds_are(tmp_path):
    runs = {f"{name}@{seed}": tmp_path / (name + "-1" * seed) for name in ("sft", "dmpo") for seed in (0, 1)}
    for run in runs.values():
        write_run(run, "train")
    evaluation, scores, rows = evaluation_of({})
    scores = {entry: scores[entry.partition("@")[0]] for entry in runs}
    evaluation = evaluate_scores(scores, rows, 100, 0)
    evaluation.folders = {e: str(run / "model") for e, run in runs.items()}
    write_evaluation(tmp_path / "evaluation", evaluation, scores, rows)
    texts = Page(render(gather([tmp_path]))).texts
    assert "dmpo \u2212 sft" in texts
    assert any(text.startswith("sft (sft@0) against dmpo (dmpo@0): ndcg@10") for text in texts)
    assert not any(" against dmpo:" in text for text in texts)


def test_an_evaluation_of_seeds_against_one_model_is_about_the_best_trained(tmp_path):
    """``name@seed`` folders, comparisons that share their second model, metrics that this version does not know."""
    models = {
        name: {
            "ndcg@10": {"value": v, "low": v - 0.01, "high": v + 0.01},
            "hr@1": v,
            "pooled_auc": 0.5,
            "new@3": {"value": 0.1},
        }
        for name, v in (("popularity", 0.6), ("sdpo", 0.5), ("sft", 0.4))
    }
    compared = [
        {"a": name, "b": "sft", "metric": "ndcg@10", "difference": 0.1, "low": 0.05, "high": 0.15, "p": 0.01}
        for name in ("popularity", "sdpo")
    ]
    compared[1]["seeds"] = ["0"]
    folders = {"sdpo@0": "a/model", "sdpo@1": "b/model", "sft@0": "c/model"}
    seeds = {"sdpo": {"0": {"ndcg@10": 0.5}, "1": {"ndcg@10": 0.5}}, "sft": {"0": {"ndcg@10": 0.4}}}
    evaluation = {
        "requests": 9,
        "negatives": {"fewest": 3, "most": 5},
        "models": models,
        "comparisons": compared,
        "folders": folders,
        "seeds": seeds,
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation | {"newer": {"unknown": [1]}}))
    page = Page(render(gather([tmp_path])))
    expected = (
        "On 9 test requests among 1 + 3 to 5 candidates, sdpo ranks with NDCG@10 0.500 [0.490, 0.510]: ahead of sft"
    )
    assert any(text.startswith(expected) for text in page.texts)
    assert {"minus sft", "sdpo", "popularity", "pooled AUC", "NEW@3", "on common seeds 0"} <= set(page.texts)


def test_a_model_named_with_an_at_sign_is_a_trained_one_and_so_are_its_seeds():
    """Its figures are blue and it is what the page is about: split as ``dmpo evaluate`` splits ``name@seed``."""
    figures = {name: {"ndcg@10": 0.5} for name in ("ours@home", "random")}
    content = {
        "requests": 9,
        "negatives": {"most": 4},
        "models": figures,
        "folders": {"ours@home@1": "a", "ours@home@0": "b"},
    }
    assert Evaluation.model_validate(content).trained == {"ours@home": "a"}


def test_runs_on_a_few_of_the_groups_were_trained_on_that_data(tmp_path):
    for name, shots in (("few", 16), ("other", 8)):
        run = write_run(tmp_path / name, "train", data={"shots": shots})
        environment = json.loads((run / "environment.json").read_text())
        environment["data_fingerprint"] = hashlib.sha256(b"f1 16 shots").hexdigest()
        (run / "environment.json").write_text(json.dumps(environment))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(card()))
    texts = Page(render(gather([tmp_path]))).texts
    assert "By its fingerprint, these runs were trained on this data: few." in texts
    assert "These runs were trained on other data: other." in texts


def test_a_card_of_other_data_is_said_to_be_that(tmp_path):
    write_run(tmp_path / "run", "train")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(card() | {"fingerprint": "f2"}))
    assert "These runs were trained on other data: run." in Page(render(gather([tmp_path]))).texts


def test_colours_can_be_read_in_both_schemes():
    """WCAG AA: 4.5 for text on the page and on its boxes, 3 for lines and bars."""
    style = (resources.files("dmpo_dist.report") / "templates" / "style.css").read_text()
    schemes = [dict(re.findall(r"--(\w+): (#\w+);", block)) for block in re.findall(r":root \{.*?\}", style, re.S)]
    assert len(schemes) == 3  # light, dark, print
    for scheme in schemes:
        for text in ("text", "soft", "link", "warn"):
            assert min(contrast(scheme[text], scheme["page"]), contrast(scheme[text], scheme["box"])) >= 4.5
        drawn = [*(f"c{i}" for i in range(14)), "up", "down"]
        assert min(contrast(scheme[name], scheme["page"]) for name in drawn) >= 3
        assert contrast(scheme["text"], scheme["mark"]) >= 4.5
    variables = dict(re.findall(r'\[stroke="(#\w+)"\] \{ stroke: var\(--(c\d+)\)', style))
    for colour in (*METHODS.values(), *FREE):  # on a light page a model has the colour that it has in PNG files
        assert schemes[0][variables[colour.lower()]] == schemes[2][variables[colour.lower()]] == colour.lower()


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
        channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_user_mistakes_are_one_clear_line(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run", "sft")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.html").write_text("<p>not a report")
    broken = {}
    for name, file, text in [
        ("version", "evaluation.json", '{"requests": 2, "negatives": {"most": 4}, "models": {"sft": {"hr@1": [0.5]}}}'),
        ("json", "evaluation.json", '{"requests": 2'),
        ("explained", "explanations.json", '{"model": "m"}'),
        ("card", "dataset.json", "{}"),
        ("study", "experiment.parquet", "PAR"),
        ("environment", "environment.json", "[]"),
    ]:
        broken[name] = (
            shutil.copytree(run, tmp_path / name) if name != "environment" else write_run(tmp_path / name, "sft")
        )
        (broken[name] / file).write_text(text)
    for arguments, message in [
        ([tmp_path / "nowhere"], "nowhere: no such folder; give what was output_dir"),
        ([tmp_path / "empty"], "empty holds no run: no config.yaml with metrics.jsonl, no evaluation.json"),
        ([run, "--output", tmp_path / "notes.html"], "notes.html exists already and is not a dmpo report"),
        ([run, "--output", tmp_path / "page.pdf"], "must end in .html"),
        ([broken["version"]], "evaluation.json: models.sft.hr@1: input should be a valid dictionary"),
        ([broken["json"]], "evaluation.json: damaged, not JSON"),
        ([broken["explained"]], "explanations.json: requests: field required; made by another version?"),
        ([broken["card"]], "dataset.json: name: field required; damaged, or not the card of prepared data"),
        ([broken["study"]], "experiment.parquet: cannot be read"),
        ([broken["environment"]], "environment.json: the file: input should be a valid dictionary"),
    ]:
        monkeypatch.setattr("sys.argv", ["dmpo", "report", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        error = capsys.readouterr().err
        assert (exit_.value.code, error.count("\n")) == (2, 1), error
        assert message in error
    write_report([broken["explained"]], tmp_path / "without.html", explanations=False, echo=lambda line: None)
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="metrics.jsonl: cannot be read"):
        gather([run])
