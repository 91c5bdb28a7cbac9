"""Ready preference rows: merging, splitting, and one clear error for each kind of bad row."""

import json
from pathlib import Path

import pandas as pd
import pytest

from dmpo_dist.config import DataConfig, Source
from dmpo_dist.data.messages import messages_of
from dmpo_dist.data.prepare import prepare
from dmpo_dist.data.sources.preferences import PreferenceRow, load_preferences
from dmpo_dist.data.store import group_from_row
from dmpo_dist.errors import UserError


def row(prompt: object = "p", chosen: str = "yes", rejected: object = "no") -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def user(text: str | None) -> dict:
    return {"role": "user", "content": text}


def answer(text: str) -> dict:
    return {"role": "assistant", "content": text}


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.mark.parametrize("extension", ["jsonl", "json", "parquet"])
def test_every_format_gives_the_same_groups(tmp_path: Path, extension: str) -> None:
    rows = [row(rejected=["a", "b"]), row("q", rejected=["c"]), row(rejected=["b", "d"])]
    path = tmp_path / f"rows.{extension}"
    if extension == "jsonl":
        write_jsonl(path, rows)
    elif extension == "json":
        path.write_text(json.dumps(rows))
    else:
        pd.DataFrame(rows).to_parquet(path)
    preferences = load_preferences(path, seed=0)
    assert preferences.splits["train"] == [
        PreferenceRow("p", "yes", ("a", "b", "d")),
        PreferenceRow("q", "yes", ("c",)),
    ]
    assert preferences.notes[:2] == [
        "3 rows merged into 2 groups of equal prompt and chosen.",
        "1 repeated rejected responses dropped.",
    ]


@pytest.mark.parametrize("extension", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": [user("p")], "chosen": [answer("yes")], "rejected": [answer("no")]}],
        [{"prompt": [user("p")], "chosen": [answer("yes")], "rejected": [[answer("no")], [answer("maybe")]]}],
        [{"chosen": [user("p"), answer("yes")], "rejected": [user("p"), answer("no")]}],
        [{"prompt": [user("p")], "chosen": "yes", "rejected": ["no", "maybe"]}],
    ],
    ids=["one", "several", "implicit prompt", "mixed"],
)
def test_conversational_rows_are_their_texts(tmp_path: Path, rows: list, extension: str) -> None:
    path = tmp_path / f"rows.{extension}"
    pd.DataFrame(rows).to_parquet(path) if extension == "parquet" else write_jsonl(path, rows)
    (found,) = load_preferences(path, seed=0).splits["train"]
    assert (found.prompt, found.chosen, found.rejected[0]) == ("p", "yes", "no")
    assert set(found.rejected) <= {"no", "maybe"}


def test_conversations_of_several_messages_are_kept_whole(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief"}, user("p"), answer("a"), user("q")]
    rows = [
        row(turns, [answer("yes")], [answer("no")]),
        {"chosen": [*turns, answer("y")], "rejected": [*turns, answer("n")]},
    ]
    found = load_preferences(write_jsonl(tmp_path / "rows.jsonl", rows), seed=0).splits["train"]
    assert [messages_of(group.prompt) for group in found] == [turns, turns]
    assert [(group.chosen, *group.rejected) for group in found] == [("yes", "no"), ("y", "n")]


def test_contradictions_and_entities_are_counted(tmp_path: Path) -> None:
    rows = [row("p", "a", ["b", "c"]), row("p", "b", ["a", "d"]), row("p", "c", "a"), row("q", "b", "a &#39;")]
    notes = load_preferences(write_jsonl(tmp_path / "rows.jsonl", rows), seed=0).notes
    assert (
        "2 pairs of responses are preferred both ways after the same prompt, the first 'a' and 'b' after 'p'"
        in notes[0]
    )
    assert notes[1].startswith("1 of 4 groups hold HTML entities")
    assert not any(
        "both ways" in n for n in load_preferences(write_jsonl(tmp_path / "r.jsonl", rows[:1]), seed=0).notes
    )


def test_a_single_file_is_split_by_prompt(tmp_path: Path) -> None:
    rows = [row(f"p{n // 2}", f"yes{n}", "no") for n in range(120)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    splits = load_preferences(path, seed=1).splits
    prompts = {split: {g.prompt for g in groups} for split, groups in splits.items()}
    assert [len(prompts[s]) for s in ("train", "validation", "test")] == [48, 6, 6]
    assert sum(map(len, splits.values())) == 120
    assert len(set.union(*prompts.values())) == 60
    assert load_preferences(path, seed=1).splits == splits
    assert load_preferences(path, seed=2).splits != splits


def test_prepared_from_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [row("p", rejected=["a", "b"]), row("q")])
    (folder / "test.json").write_text(json.dumps([row("q"), row("new")]))
    said: list[str] = []
    config = DataConfig(source=Source(kind="preferences", path=folder))
    with pytest.raises(UserError, match=r"1 of 2 training histories also occur in evaluation(?s:.*)--allow-leaks"):
        prepare(config, seed=0, output=tmp_path / "out", echo=said.append)
    data = prepare(config, seed=0, output=tmp_path / "out", echo=said.append, allow_leaks=True)
    assert data.card.counts == {"train": 2, "validation": 0, "test": 2}
    assert data.items is None
    assert data.interactions is None
    group = group_from_row(data.train[0])
    assert (group.prompt, group.history, group.positive, group.negatives) == ("p", (), "yes", ("a", "b"))
    assert len({*data.train["user"], *data.test["user"]}) == 4
    assert "**leak**" in (tmp_path / "out" / "card.md").read_text()


def test_users_are_sampled_and_keys_of_a_log_are_named(tmp_path: Path) -> None:
    """Rows with equal prompts are one user's; ``data.max_test_users`` had no effect on rows like these."""
    folder = tmp_path / "rows"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [row(f"p{n}") for n in range(9)])
    write_jsonl(folder / "test.jsonl", [row(f"q{n // 2}", rejected=[f"no {n}"], chosen=f"yes {n}") for n in range(40)])
    made = {}
    for seed in (0, 1):
        said: list[str] = []
        config = DataConfig(
            source=Source(kind="preferences", path=folder), max_test_users=5, max_validation_users=3, min_history=2
        )
        data = prepare(config, seed=seed, output=tmp_path / str(seed), echo=said.append)
        asked = [group_from_row(one).prompt for one in data.test]
        assert (data.card.counts, data.card.users["test"]) == ({"train": 9, "validation": 0, "test": 10}, 5)
        assert sorted(map(asked.count, asked)) == [2] * 10
        assert data.card.dropped["test"] == {"over_max_test_users": 15}
        assert "These rows are ready-made: data.min_history has no effect on them." in said
        made[seed] = asked
    assert made[0] != made[1]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": "p", "chosen": "yes"}, r"row 2: no 'rejected' \(the row has 'prompt', 'chosen'\)"),
        (row(chosen=" "), r"row 2: 'chosen' is an empty string"),
        (row(rejected=["no", ""]), r"row 2: 'rejected' is an empty string"),
        (row(rejected=[]), r"row 2: 'rejected' is an empty list"),
        (row(rejected=["no", "yes"]), r"row 2: chosen 'yes' is also rejected"),
        (row(rejected=7), r"row 2: 'rejected' is 7; it must be a string or a list of strings"),
        (row(prompt=["p"]), r"row 2: 'prompt' is \['p'\]; it must be a string"),
        (row([user("p"), user("q")]), r"row 2: 'prompt' has messages of user, user; what can be read is .*not wrapped"),
        (row([user("p"), answer("a")]), r"row 2: 'prompt' has messages of user, assistant; .*apply_chat_template"),
        (row([user(None), answer("a"), user("q")]), "row 2: the content of 'prompt' is None"),
        (row(rejected=[user("no")]), r"row 2: 'rejected' has messages of user; one of assistant can be read"),
        (row([user(None)]), r"row 2: the content of 'prompt' is None; it must be a string"),
        (
            {"chosen": [user("p"), answer("yes")], "rejected": [user("q"), answer("no")]},
            "row 2: .* begin with the same messages",
        ),
        ({"chosen": [user("p"), answer("yes")], "rejected": "no"}, "row 2: .* begin with the same messages"),
        ("p", r"row 2: 'p' is not an object"),
    ],
)
def test_bad_rows(tmp_path: Path, bad: object, message: str) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [row(), bad])
    with pytest.raises(UserError, match=r"rows\.jsonl, " + message):
        load_preferences(path, seed=0)


def test_files_of_a_folder_that_are_not_read_are_named(tmp_path: Path) -> None:
    for name in ("train.jsonl", "train-2.jsonl", "test.json", "notes.txt"):
        (tmp_path / name).write_text(json.dumps(row()))
    (tmp_path / "test.json").write_text(json.dumps([row()]))
    found = load_preferences(tmp_path, seed=0)
    assert [note for note in found.notes if note.startswith("Not read")] == [
        "Not read: train-2.jsonl; rows are read from files named train, validation, test."
    ]
    for name in ("valid.jsonl", "dev.parquet"):
        (tmp_path / name).write_text("")
        with pytest.raises(UserError, match=rf"{name}: rows of that split are read from validation\.\w+; rename"):
            load_preferences(tmp_path, seed=0)
        (tmp_path / name).unlink()


def test_bad_files(tmp_path: Path) -> None:
    def load(name: str, text: str) -> None:
        (tmp_path / name).write_text(text)
        load_preferences(tmp_path / name, seed=0)

    with pytest.raises(UserError, match=r"a\.jsonl, row 3: not valid JSON"):
        load("a.jsonl", json.dumps(row()) + "\n\n{")
    with pytest.raises(UserError, match=r"a\.json, row 2: not valid JSON"):
        load("a.json", "[\n{]")
    with pytest.raises(UserError, match=r"b\.json: holds a dict"):
        load("b.json", "{}")
    with pytest.raises(UserError, match=r"b\.jsonl: holds no rows"):
        load("b.jsonl", "\n")
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read"):
        load("a.parquet", "PAR")
    with pytest.raises(UserError, match=r"unknown format '\.csv'"):
        load("a.csv", "x")
    with pytest.raises(UserError, match=r"no training rows; looked for train\.jsonl"):
        load_preferences(tmp_path, seed=0)
    with pytest.raises(UserError, match=r"no such file"):
        load_preferences(tmp_path / "nowhere", seed=0)
    with pytest.raises(UserError, match=r"needs data\.source\.path"):
        load_preferences(None, seed=0)
