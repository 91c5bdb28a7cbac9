"""`dmpo explain` from prepared data and from a file: what it writes, and what it says to bad input."""

import json
import sys
from pathlib import Path

import pytest

from dmpo_dist.cli import main
from dmpo_dist.config import DataConfig, ScratchModel
from dmpo_dist.data.prepare import prepare
from dmpo_dist.modeling.backbone import make_scratch_model

SETTINGS = ["data.path=data", "model.max_length=256", "evaluation.bootstrap_samples=100"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    source = {"simulator": {"users": 60, "items": 40, "events_per_user": 14}}
    sizes = {"negatives_per_group": 6, "evaluation_negatives": 4, "max_history": 5}
    data = prepare(DataConfig.model_validate({"source": source, **sizes}), 0, folder / "data", echo=lambda _: None)
    scratch = ScratchModel(hidden_size=16, layers=1, heads=2, intermediate_size=16, vocab_size=300)
    for seed, name in enumerate(("model", "other")):
        make_scratch_model(folder / name, scratch, data.items["title"].tolist(), 256, seed)
    return folder, data


@pytest.fixture
def run(world, monkeypatch, capsys):
    """The command line in the world's folder -> (status, what it printed)."""
    monkeypatch.chdir(world[0])
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["dmpo", "explain", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return stopped.value.code, captured.out + captured.err

    return call


def test_what_is_written_and_shown(run, world):
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
    rows = {row["user"]: row for row in world[1].test.to_list()}
    for entry in content["requests"]:
        row = rows[entry["user"]]
        assert (entry["title"], entry["item"], entry["candidates"]) == (row["positive"], row["positive_item"], 5)
        assert "".join(token["text"] for token in entry["tokens"]) == row["positive"] + "(end)"
        assert [(h["item"], h["title"]) for h in entry["history"]] == list(
            zip(row["history_items"], row["history"], strict=True)
        )
        assert entry["history"][0].keys() == {"item", "title", "contribution", "rank_without"}
        assert {"removed", "rank_before", "rank_after", "sentence"} <= entry["counterfactual"].keys()
        assert f"Why is {entry['title']!r} at rank {entry['rank']} of 5 for user {entry['user']}?" in shown
        assert entry["counterfactual"]["sentence"] in shown
    measured = json.loads(Path("out/explain_faithfulness.json").read_text())
    assert measured == content["faithfulness"]
    assert measured["requests"] + measured["left_out"] == 8
    assert Path("out/explain_faithfulness.png").read_bytes().startswith(b"\x89PNG")

    code, shown = run("--model=model", "--users=1", "--output=out", *SETTINGS)
    assert (code, "holds explanations.json already, which is kept" in shown) == (2, True)


def test_a_catalogue_leaves_out_what_was_taken(run, world):
    data = world[1]
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
def test_popularity_ends_before_the_test(run, world, monkeypatch, arguments):
    """What happened from the cut on, the positives among it, moves no rank and no contribution."""
    seen = []
    monkeypatch.setattr("dmpo_dist.commands.explain.Explainer", lambda *given: seen.append(given[3]) or 1 / 0)
    user = world[1].test[0]["user"]
    with pytest.raises(ZeroDivisionError):
        run("--model=model", f"--user={user}", "ranking.popularity_weight=0.5", *arguments, *SETTINGS)
    data = world[1]
    log = data.interactions[data.interactions["timestamp"] < data.card.cuts["test"].timestamp]
    assert dict(zip(data.items["item"], seen[0].counts, strict=True)) == {
        item: (log["item"] == item).sum() for item in data.items["item"]
    }
    assert seen[0].counts.sum() < len(data.interactions)


def test_a_file_of_requests(run, world):
    titles = world[1].items["title"].tolist()
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


def first(world):
    row = world[1].test[0]
    known = {row["positive"], *row["negatives"], *row["history"]}
    return row, next(title for title in world[1].items["title"] if title not in known)


BAD = {
    "nobody": ([], "say whom to explain: --user NAME, --users N"),
    "both": (["--user=USER", "--users=2"], "give one user by name, or how many to sample"),
    "item alone": (["--item=x", "--users=2"], "say for whom with --user"),
    "no folder": (["--faithfulness"], "give --output a folder"),
    "unknown user": (["--user=nobody"], "--user nobody: not among the"),
    "nearest title": (["--user=USER", "--item=NEARLY"], "no such title or item id, the nearest is 'POSITIVE'"),
    "not a candidate": (["--user=USER", "--item=OTHER"], "'OTHER' is not among the 5 candidates of user 'USER'"),
    "taken": (["--user=USER", "--item=TAKEN"], "has it in the history already"),
    "top": (["--user=USER", "--top=5"], "--top 5: user 'USER' has 5 candidates"),
    "base": (["--user=USER", "--reference=base"], "--reference base: model is a whole model without a base"),
    "start": (["--user=USER", "--reference=start"], "--reference start: model does not say what it was started from"),
    "two references": (["--user=USER", "--reference=start", "ranking.reference=model"], "give one of the two"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message(run, world, case):
    row, other = first(world)
    words = {"USER": row["user"], "POSITIVE": row["positive"], "OTHER": other, "TAKEN": row["history"][0]}
    words["NEARLY"] = row["positive"][:-1] + "§"

    def filled(text):
        for word, value in words.items():
            text = text.replace(word, value)
        return text

    code, shown = run("--model=model", *map(filled, BAD[case][0]), *SETTINGS)
    assert code == 2
    assert filled(BAD[case][1]) in shown
    assert len(shown.strip().splitlines()) == 1, "one message"
