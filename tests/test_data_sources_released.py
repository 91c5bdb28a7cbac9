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
    assert any("HTML entities decoded in the titles of 2 rows" in note for note in data.notes)
    assert original.users() == data.users() == {"train": 1, "validation": 0, "test": 1}


@pytest.mark.parametrize("prompts", ["rebuild", "original"])
def test_a_text_that_names_both_titles_is_that_order_and_its_reverse(tmp_path: Path, prompts: str) -> None:
    """As in the files for SFT and in MovieLens' evaluation file; the reverse reads as in the files with pairs."""
    pairs = [released_row(["Halo", "Tetris"], "Wii", f"Doom {n}", better_first=n % 2 == 0) for n in range(3)]
    texts = [row | {"output": row["output"][0]} for row in pairs]
    write_released(tmp_path, texts, pairs)
    splits = load_released(tmp_path, None, prompts).splits
    assert splits["train"] == splits["test"]


@pytest.mark.parametrize(
    "name", ["rec_ml_dpo_ranking_2.json", "rec_ml_sft_ranking.json", "rec_ml_eval_ranking_old.json"]
)
def test_a_file_of_the_release_is_read_alone(tmp_path: Path, name: str) -> None:
    rows = [released_row([f"Halo {n}"], "Wii", "Doom") for n in range(60)] + [released_row(["Halo"], "Wii", "Wii")]
    text = json.dumps(rows)
    if "old" in name:  # objects without a comma between, and titles with genres
        text = "".join(map(json.dumps, rows)).replace("<Title:Wii>", "<Title:Wii, Genre:Action|Children's>")
    (tmp_path / name).write_text(text)
    found = [load_released(tmp_path / name, None, "rebuild", seed=1)]
    if "dpo" in name:  # a folder without the file to test on
        found.append(load_released(tmp_path, None, "rebuild", seed=1))
    for data in found:
        assert {split: len(groups) for split, groups in data.splits.items()} == {
            "train": 48,
            "validation": 6,
            "test": 6,
        }
        assert {group.chosen for groups in data.splits.values() for group in groups} == {"Wii"}
        assert "1 rows left out whose candidates are one title." in data.notes


def test_datasets_of_the_release_are_not_mixed(tmp_path: Path) -> None:
    for name, title in (("rec_Game", "Doom"), ("rec_ml_1m", "Alien")):
        for part in ("dpo_ranking_1", "eval_ranking"):
            (tmp_path / f"{name}_{part}.json").write_text(json.dumps([released_row(["Halo"], "Wii", title)]))
    with pytest.raises(UserError, match=r"several datasets; set data\.source\.category to one of rec_Game, rec_ml_1m"):
        load_released(tmp_path, None, "rebuild")
    films = load_released(tmp_path, None, "rebuild", category="rec_ml_1m")
    assert films.catalogue() == ["Alien", "Halo", "Wii"]
    with pytest.raises(UserError, match=r"of data\.source\.category=books \(there are rec_Game, rec_ml_1m\)"):
        load_released(tmp_path, None, "rebuild", category="books")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": " <Title:Wii> "}, r"row 1: 'output' is ' <Title:Wii>.*or a pair \[better order"),
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
    with pytest.raises(UserError, match=r"does not exist; set data\.source\.path"):
        load_released(tmp_path / "none", None, "rebuild")


def test_sdpo_rows(tmp_path: Path) -> None:
    rows = [
        {"history": ["A", "B"], "itemList": ["C", "D &amp; Co", "E"], "trueSelection": "D &amp; Co"},
        {"historyList": "A::B", "itemList": "D & Co::F", "trueSelection": "D & Co"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_sdpo(tmp_path / "rows.jsonl", seed=0)
    titles = ("D & Co", "C", "E", "F")
    assert data.splits["train"] == [PreferenceRow(None, "D & Co", titles[1:], ("A", "B"), titles, ((1, 3), (0, 2)))]


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
