"""`dmpo explain` from prepared data and from a file: what it writes, and what it says to bad input."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner
from worlds import CONTEXT, SHAPE

from dmpo_dist.cli import app, main
from dmpo_dist.modeling.backbone import make_scratch_model

SETTINGS = ["data.path=data", "model.max_length=256", "evaluation.bootstrap_samples=100"]


@pytest.fixture(scope="module")
def project(world, tmp_path_factory):
    """A working directory with the world's data and model and another model, and the data."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("data", "model"):
        (folder / name).symlink_to(world.folder / name)
    make_scratch_model(folder / "other", SHAPE, world.titles, CONTEXT, seed=1)
    return folder, world.data


@pytest.fixture
def run(project, monkeypatch, capsys):
    """The command line in the project's folder -> (status, what it printed)."""
    monkeypatch.chdir(project[0])
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["dmpo", "explain", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return stopped.value.code, captured.out + captured.err

    return call


def test_what_is_written_and_shown(run, project):
    code, shown = run(
        "--model=model",
        "--users=3",
        "--faithfulness",
        "--faithfulness-users=8",
        "--reference=other",
        "--output=out",
        *SETTINGS,
    )
    assert code == 0, shown
    content = json.loads(Path("out/explanations.json").read_text())
    assert content.keys() == {"model", "reference", "method", "requests", "faithfulness"}
    assert (content["model"], content["reference"], len(content["requests"])) == ("model", "other", 3)
    rows = {row["user"]: row for row in project[1].test.to_list()}
    for entry in content["requests"]:
        row = rows[entry["user"]]
        assert (entry["title"], entry["item"], entry["candidates"]) == (row["positive"], row["positive_item"], 6)
        assert "".join(token["text"] for token in entry["tokens"]) == row["positive"] + "(end)"
        assert [(h["item"], h["title"]) for h in entry["history"]] == list(
            zip(row["history_items"], row["history"], strict=True)
        )
        assert entry["history"][0].keys() == {"item", "title", "contribution", "rank_without"}
        assert {"removed", "rank_before", "rank_after", "sentence"} <= entry["counterfactual"].keys()
        assert f"Why is {entry['title']!r} at rank {entry['rank']} of 6 for user {entry['user']}?" in shown
        assert entry["counterfactual"]["sentence"] in shown
    measured = json.loads(Path("out/explain_faithfulness.json").read_text())
    assert measured == content["faithfulness"]
    assert measured["requests"] + measured["left_out"] == 8
    assert Path("out/explain_faithfulness.png").read_bytes().startswith(b"\x89PNG")

    code, shown = run("--model=model", "--users=1", "--output=out", *SETTINGS)
    assert (code, "holds explanations.json already, which is kept" in shown) == (2, True)


def test_a_catalogue_leaves_out_what_was_taken(run, project):
    data = project[1]
    row = data.test[0]
    earlier = data.interactions[
        (data.interactions["user"] == row["user"]) & (data.interactions["timestamp"] < row["timestamp"])
    ]
    code, shown = run("--model=model", f"--user={row['user']}", "--catalogue=data", "--output=all", *SETTINGS)
    assert code == 0, shown
    assert "model has no reference (it does not say what it was trained from)" in shown
    [entry] = json.loads(Path("all/explanations.json").read_text())["requests"]
    assert entry["candidates"] == len(data.items) - earlier["item"].nunique()
    assert (entry["title"], entry["tokens"]) == (row["positive"], [])


@pytest.mark.parametrize("arguments", [[], ["--catalogue=data"]])
def test_popularity_ends_before_the_test(run, project, monkeypatch, arguments):
    """What happened from the cut on, the positives among it, moves no rank and no contribution; likes alone count."""
    seen = []
    monkeypatch.setattr("dmpo_dist.commands.explain.Explainer", lambda *given: seen.append(given[3]) or 1 / 0)
    user = project[1].test[0]["user"]
    with pytest.raises(ZeroDivisionError):
        run("--model=model", f"--user={user}", "ranking.popularity_weight=0.5", *arguments, *SETTINGS)
    data = project[1]
    before = data.interactions[data.interactions["timestamp"] < data.card.cuts["test"].timestamp]
    log = before[before["rating"] >= data.card.config["rating_threshold"]]
    assert dict(zip(data.items["item"], seen[0].counts, strict=True)) == {
        item: (log["item"] == item).sum() for item in data.items["item"]
    }
    assert seen[0].counts.sum() < len(data.interactions)


def test_a_file_of_requests(run, project):
    titles = project[1].items["title"].tolist()
    Path("users.csv").write_text(
        f'user,history,candidates\nanna,"{titles[0]}","{"|".join(titles[1:5])}"\n', encoding="utf-8"
    )
    arguments = ["--model=model", "--requests=users.csv", "--reference=other", *SETTINGS]
    code, shown = run(*arguments, "--user=anna")
    assert code == 0, shown
    assert "at rank 1 of 4 for user anna" in shown
    assert "The model saw one history item: its contribution is against a prompt without any history." in shown
    code, shown = run(*arguments, "--user=anna", f"--item={titles[2].upper()}")
    assert (code, f"Why is {titles[2]!r} at rank" in shown) == (0, True)
    assert "No removal" not in shown, "one title is all there is"
    assert "not in the catalogue" not in shown
    item = project[1].items.set_index("title")["item"]
    code, shown = run(*arguments, "--user=anna", f"--item={item[titles[3]]}")
    assert (code, f"Why is {titles[3]!r} at rank" in shown) == (0, True)
    Path("odd.csv").write_text(f'user,history,candidates\nanna,Hraet,"{titles[1]}|{titles[2]}"\n', encoding="utf-8")
    code, shown = run("--model=model", "--requests=odd.csv", *SETTINGS, "--user=anna")
    assert (code, "1 names are not in the catalogue, such as 'Hraet'" in shown) == (0, True)
    code, shown = run(*arguments, "--user=ana")
    assert (code, shown) == (
        2,
        "error: --user ana: not among the 1 users of users.csv, such as anna; the nearest name is 'anna'\n",
    )
    code, shown = run(*arguments, "--faithfulness", "--output=none")
    assert (code, "0 of 1 requests have a history of two items or more" in shown, Path("none").exists()) == (
        2,
        True,
        False,
    )


def first(project):
    row = project[1].test[0]
    known = {row["positive"], *row["negatives"], *row["history"]}
    return row, next(title for title in project[1].items["title"] if title not in known)


SMALL_ROWS = ["model.max_length=96", "evaluation.token_budget=96"]
BAD = {
    "nobody": ([], "say whom to explain: --user NAME, --users N"),
    "both": (["--user=USER", "--users=2"], "give one user by name, or how many to sample"),
    "item alone": (["--item=x", "--users=2"], "say for whom with --user"),
    "no folder": (["--faithfulness"], "give --output a folder"),
    "unknown user": (["--user=nobody"], "--user nobody: not among the"),
    "nearest title": (["--user=USER", "--item=NEARLY"], "no such title or item id, the nearest is 'POSITIVE'"),
    "not a candidate": (["--user=USER", "--item=OTHER"], "'OTHER' is not among the 6 candidates of user 'USER'"),
    "taken": (["--user=USER", "--item=TAKEN"], "has it in the history already"),
    "top": (["--user=USER", "--top=6"], "--top 6: user 'USER' has 6 candidates"),
    "rivals of few candidates": (["--user=USER", "--rivals=30"], "--rivals 30: has no effect here, as all candidates"),
    "top of few candidates": (["--user=USER", "--top=900"], "--top 900: user 'USER' has 6 candidates"),
    "few rivals": (
        ["--user=USER", "--rivals=19", "--catalogue=data", *SMALL_ROWS],
        "--rivals 19: with so few a title may not be seen to leave the top 20; give 20 or more",
    ),
    "few rivals for the top": (
        ["--user=USER", "--rivals=4", "--top=5", "--catalogue=data", *SMALL_ROWS],
        "--rivals 4: with so few a title may not be seen to leave the top 5; give 5 or more",
    ),
    "nothing measured": (["--user=USER", "--faithfulness-users=4"], "--faithfulness-users 4: says how to measure"),
    "base": (["--user=USER", "--reference=base"], "--reference base: model is a whole model without a base"),
    "start": (["--user=USER", "--reference=start"], "--reference start: model does not say what it was started from"),
    "two references": (["--user=USER", "--reference=start", "ranking.reference=model"], "give one of the two"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message(run, project, case):
    row, other = first(project)
    words = {"USER": row["user"], "POSITIVE": row["positive"], "OTHER": other, "TAKEN": row["history"][0]}
    words["NEARLY"] = row["positive"][:-1] + "§"

    def filled(text):
        for word, value in words.items():
            text = text.replace(word, value)
        return text

    code, shown = run("--model=model", *SETTINGS, *map(filled, BAD[case][0]))
    assert code == 2
    assert filled(BAD[case][1]) in shown
    assert len(shown.strip().splitlines()) == 1, "one message"


@pytest.mark.parametrize(
    ("flags", "measured"),
    [
        ("--users=6 --faithfulness", 6), ("--users=6 --faithfulness --faithfulness-users=9", 9), ("--users=6", 0),
        ("--faithfulness", 200),
    ],
)  # fmt: skip
def test_faithfulness_is_measured_on_the_users_that_are_explained(flags, measured, monkeypatch):
    found = []
    monkeypatch.setattr("dmpo_dist.commands.explain.explain", lambda order, *_: found.append(order.faithfulness))
    assert CliRunner().invoke(app, ["explain", "-m", "model", *flags.split()]).exit_code == 0
    assert found == [measured]
