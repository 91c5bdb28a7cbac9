"""Rows as other projects released them: how they become groups, and what is said to a bad one."""

import json
from pathlib import Path

import pytest

from dmpo_dist.data.sources.preferences import PreferenceRow
from dmpo_dist.data.sources.released import load_released, load_sdpo
from dmpo_dist.errors import UserError


def released_row(history: list[str], better: str, worse: str, better_first: bool = True) -> dict:
    listed = [better, worse] if better_first else [worse, better]
    question = "Rank the likelihood of the user shopping the two Video Games  <Title:{}>  and  <Title:{}> ."
    shown = "  ".join(f"<Title:{title}>" for title in history)
    orders = [f" <Title:{a}> ,  <Title:{b}> " for a, b in ((better, worse), (worse, better))]
    return {"instruction": f"The user's history:  {shown} . {question.format(*listed)}", "input": "", "output": orders}


def write_released(folder: Path, train: list, test: list, k: int = 2) -> Path:
    (folder / f"rec_Game_dpo_ranking_{k}.json").write_text(json.dumps(train))
    (folder / "rec_Game_eval_ranking.json").write_text(json.dumps(test))
    return folder


def test_released_rows_of_one_history_are_one_group(tmp_path: Path) -> None:
    history = ["Halo. Rank 1", "Command &amp; Conquer"]
    rows = [released_row(history, "Wii", "Doom"), released_row(history, "Wii", "Tom &amp; Co", better_first=False)]
    write_released(tmp_path, rows, [released_row(["Halo"], "Doom", "Wii")])
    data = load_released(tmp_path, None, "rebuild")
    titles = ("Wii", "Doom", "Tom & Co")
    assert data.splits["train"] == [
        PreferenceRow(None, "Wii", titles[1:], ("Halo. Rank 1", "Command & Conquer"), titles, ((0, 2), (1, 2)))
    ]
    assert data.catalogue() == ["Command & Conquer", "Doom", "Halo", "Halo. Rank 1", "Tom & Co", "Wii"]
    assert data.shown_at() == {"train": {"2": [1, 1]}, "test": {"2": [1, 0]}}
    original = load_released(tmp_path, 2, "original")
    assert [(group.prompt, group.chosen, group.rejected) for group in original.splits["train"]] == [
        (row["instruction"], row["output"][0], (row["output"][1],)) for row in rows
    ]
    assert original.catalogue() is None
    assert original.users() == data.users() == {"train": 1, "validation": 0, "test": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": " <Title:Wii> ,  <Title:Doom> "}, r"row 1: 'output' is ' <Title:Wii>.*a pair \[better order"),
        ({"output": [" <Title:Wii> ,  <Title:Halo> ", "x"]}, r"row 1: 'output' must hold the two listed titles"),
        ({"instruction": "Rank these"}, r"row 1: 'instruction' does not read"),
        ({"instruction": 3}, r"row 1: .* is not an object with 'instruction'"),
    ],
)
def test_bad_released_rows(tmp_path: Path, change: dict, message: str) -> None:
    good = released_row(["Halo"], "Wii", "Doom")
    write_released(tmp_path, [good | change], [good])
    with pytest.raises(UserError, match=message):
        load_released(tmp_path, None, "rebuild")
    with pytest.raises(UserError, match=r"no \.\.\._dpo_ranking_K\.json for .*=7; K there: 2"):
        load_released(tmp_path, 7, "rebuild")
    with pytest.raises(UserError, match=r"no such folder; set data\.source\.path"):
        load_released(tmp_path / "none", None, "rebuild")


def test_sdpo_rows(tmp_path: Path) -> None:
    rows = [
        {"history": ["A", "B"], "itemList": ["C", "D", "E"], "trueSelection": "D"},
        {"historyList": "A::B", "itemList": "D::F", "trueSelection": "D"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_sdpo(tmp_path / "rows.jsonl", seed=0)
    titles = ("D", "C", "E", "F")
    assert data.splits["train"] == [PreferenceRow(None, "D", titles[1:], ("A", "B"), titles, ((1, 3), (0, 2)))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"itemList": ["C", "E"]}, r"row 1: the candidates in 'itemList' lack the target 'D'"),
        ({"itemList": ["D"]}, r"row 1: 'itemList' holds nothing but the target"),
        ({"history": []}, r"row 1: 'history' is \[\]; it must be a list of titles"),
        ({"trueSelection": None}, r"row 1: 'trueSelection' is None"),
    ],
)
def test_bad_sdpo_rows(tmp_path: Path, change: dict, message: str) -> None:
    row = {"history": ["A", "B"], "itemList": ["C", "D"], "trueSelection": "D"} | change
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    with pytest.raises(UserError, match=message):
        load_sdpo(tmp_path / "rows.json", seed=0)
