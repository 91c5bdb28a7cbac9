"""Preparing a folder: whole or not at all, repeatable, and read back as written."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from datasets import load_from_disk

from dmpo_dist.config import DataConfig, Simulator, Source, TemplateConfig
from dmpo_dist.data import groups
from dmpo_dist.data.folder import check
from dmpo_dist.data.prepare import prepare
from dmpo_dist.data.splits import SPLITS
from dmpo_dist.data.store import ROW_FEATURES, PreparedData, group_from_row, texts_of_data
from dmpo_dist.errors import UserError


def small(**changes: object) -> DataConfig:
    world = Source(simulator=Simulator(users=120, items=80, events_per_user=16, taste_dim=4))
    return DataConfig(**({"source": world, "negatives_per_group": 8, "train_requests_per_user": 1} | changes))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    return prepare(small(), seed=0, output=tmp_path_factory.mktemp("data") / "sim", echo=lambda line: None)


def test_round_trip(prepared: PreparedData) -> None:
    again = PreparedData.load(prepared.path)
    assert again.fingerprint == prepared.fingerprint
    assert again.card == prepared.card
    assert not [p for p in prepared.path.parent.iterdir() if p != prepared.path], "nothing temporary stays behind"
    for split in SPLITS:
        rows = getattr(again, split)
        assert rows.features == ROW_FEATURES
        assert rows.to_list() == getattr(prepared, split).to_list()
        assert len(rows) == again.card.counts[split] > 0
    titles = dict(zip(again.items["item"], again.items["title"], strict=True))
    for row, count in [(again.train[0], 8), (again.test[0], 19)]:
        group = group_from_row(row)
        assert group.history == tuple(titles[i] for i in row["history_items"])
        assert group.negatives == tuple(titles[i] for i in row["negative_items"])
        assert len(set(group.negatives) - {group.positive}) == count
        assert len(row["oracle"]) == 1 + count
        assert group.prompt is None
    assert set(again.interactions["item"]) <= set(titles)


def test_the_fingerprint_is_the_content(prepared: PreparedData, tmp_path: Path) -> None:
    said: list[str] = []
    same = prepare(small(), seed=0, output=tmp_path / "new" / "same", echo=said.append)
    assert same.fingerprint == prepared.fingerprint
    assert "users to evaluate" in said[-1]
    assert str(same.card.counts["test"]) in said[-1]
    other = prepare(small(negatives="popularity"), seed=0, output=tmp_path / "other", echo=said.append)
    assert other.fingerprint != prepared.fingerprint
    assert other.test.to_list() == prepared.test.to_list(), "evaluation candidates do not depend on training negatives"


def test_the_card_tells_cuts_drops_and_settings(prepared: PreparedData) -> None:
    card = json.loads((prepared.path / "dataset.json").read_text())
    cuts = card["cuts"]
    assert all(row["timestamp"] < cuts["validation"]["timestamp"] for row in prepared.train)
    assert all(row["timestamp"] >= cuts["test"]["timestamp"] for row in prepared.test)
    assert cuts["test"]["utc"].startswith("2023-")
    assert card["config"]["negatives_per_group"] == 8
    assert card["dropped"]["train"]["short_history"] > 0
    text = (prepared.path / "card.md").read_text()
    assert prepared.fingerprint in text
    assert cuts["test"]["utc"] in text
    assert "negatives_per_group: 8" in text


def test_validation_and_test_are_seeded_samples(prepared: PreparedData, tmp_path: Path) -> None:
    settings = small(max_validation_users=5, max_test_users=4)
    few = prepare(settings, seed=0, output=tmp_path / "few", echo=lambda line: None)
    assert (len(few.validation), len(few.test)) == (5, 4)
    for split in ("validation", "test"):
        assert all(row in getattr(prepared, split).to_list() for row in getattr(few, split))
        left_out = len(getattr(prepared, split)) - len(getattr(few, split))
        assert few.card.dropped[split][f"over_max_{split}_users"] == left_out


def test_an_existing_output_is_refused_and_untouched(tmp_path: Path) -> None:
    output = tmp_path / "taken"
    output.mkdir()
    (output / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match=r"taken: exists already.*choose another data\.path"):
        prepare(small(), seed=0, output=output)
    assert [p.name for p in tmp_path.rglob("*")] == ["taken", "notes.txt"]
    with pytest.raises(UserError, match=r"cannot be written"):
        prepare(small(), seed=0, output=output / "notes.txt" / "below", echo=lambda line: None)


def test_nothing_left_shows_every_stage(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        prepare(small(min_history=60), seed=0, output=tmp_path / "x")
    message = str(error.value)
    assert "no train and no test requests are left" in message
    for part in ("interactions of 120 users", "likes (rating >= data.rating_threshold=4)", "data.min_history=60"):
        assert part in message
    with pytest.raises(UserError, match=r"81 negatives are asked for.*lower data\.negatives_per_group"):
        prepare(small(negatives_per_group=81), seed=0, output=tmp_path / "x")
    with pytest.raises(UserError, match=r"79 negatives are asked for.*lower data\.evaluation_negatives"):
        prepare(small(evaluation_negatives=79), seed=0, output=tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_early_requests_without_candidates_are_counted(tmp_path: Path) -> None:
    """A lone first user sees only items of their own: that request is dropped, the others stay."""
    lines = ["user,item,rating,timestamp,title"]
    lines += [f"first,i{n},5,{n + 1},Title {n}" for n in range(6)] + ["second,i5,5,6,Title 5", "first,i6,5,8,Title 6"]
    lines += ["second,i6,5,7,Title 6", "late,i40,3,10,Title 40"]
    lines += [
        f"u{u},i{(u * 5 + n) % 30},5,{100 * u + n + 20},Title {(u * 5 + n) % 30}" for u in range(12) for n in range(6)
    ]
    (tmp_path / "log.csv").write_text("\n".join(lines))
    config = DataConfig(
        source=Source(kind="csv", path=tmp_path / "log.csv"),
        negatives_per_group=2,
        evaluation_negatives=2,
        min_history=2,
    )
    data = prepare(config, seed=0, output=tmp_path / "out", echo=lambda line: None)
    assert data.card.dropped["train"]["few_candidates"] == 1
    assert "first" not in data.train["user"]
    assert "1 users with one interaction give no request." in data.card.notes


def test_few_shot_subsets_are_nested(prepared: PreparedData) -> None:
    rows = [{json.dumps(row, sort_keys=True) for row in prepared.few(n).train.to_list()} for n in (4, 16, 64)]
    assert [len(part) for part in rows] == [4, 16, 64]
    assert rows[0] < rows[1] < rows[2] < {json.dumps(row, sort_keys=True) for row in prepared.train.to_list()}
    few = PreparedData.for_training(DataConfig(path=prepared.path, shots=4))
    assert few.test.to_list() == prepared.test.to_list()
    assert few.fingerprint != prepared.fingerprint
    others = PreparedData.for_training(DataConfig(path=prepared.path, shots=16, shots_seed=1))
    drawn = {json.dumps(row, sort_keys=True) for row in others.train.to_list()}
    assert len(drawn) == 16
    assert len(drawn & rows[1]) < 8, "another draw, of which few are in the first"
    assert prepared.few(16).fingerprint != others.fingerprint
    assert {json.dumps(row, sort_keys=True) for row in prepared.few(4, 1).train.to_list()} < drawn
    after = PreparedData.for_training(DataConfig(path=prepared.path, shots=48, shots_skip=16))
    assert {json.dumps(row, sort_keys=True) for row in after.train.to_list()} == rows[2] - rows[1]
    assert after.fingerprint not in {prepared.few(48).fingerprint, prepared.few(64).fingerprint}
    for key in ("shots_seed", "shots_skip"):
        with pytest.raises(ValueError, match=f"{key} has no effect while all groups are used"):
            DataConfig.model_validate({key: 1})
    with pytest.raises(UserError, match=r"data\.shots=9999, but .* holds \d+ training groups"):
        prepared.few(9999)
    with pytest.raises(UserError, match=r"data\.shots=4 after data\.shots_skip=9999, but .* or data\.shots_skip"):
        prepared.few(4, shots_skip=9999)


def test_leave_one_out_warns_of_the_future(tmp_path: Path) -> None:
    said: list[str] = []
    data = prepare(small(split="leave_one_out", k_core=5), seed=0, output=tmp_path / "loo", echo=said.append)
    finding = next(f for f in data.card.leaks if f.check == "training after requests")
    train, asked = (
        np.array(data.train["timestamp"]),
        np.array(data.validation["timestamp"][:] + data.test["timestamp"][:]),
    )
    assert finding.verdict == "warning"
    assert finding.figures["training_rows_in_the_future"] == (train >= asked.min()).sum() > 0
    assert any("WARNING" in line and "leave-one-out" in line for line in said)
    assert data.card.cuts is None
    assert "Leave-one-out" in (tmp_path / "loo" / "card.md").read_text()
    assert data.interactions["item"].value_counts().min() >= 5
    assert all(len(row["oracle"]) == 20 for row in data.test)
    assert any("5-core of the whole log" in note for note in data.card.notes)


@pytest.mark.parametrize("kind", ["uniform", "dislikes", "popularity", "in_batch"])
def test_under_leave_one_out_no_negative_is_taken_later(tmp_path: Path, kind: str) -> None:
    config = small(split="leave_one_out", negatives=kind, train_requests_per_user=3, negatives_per_group=24)
    data = prepare(config, seed=0, output=tmp_path / "loo", echo=lambda line: None)
    events = data.interactions
    taken = dict(zip(zip(events["user"], events["item"], strict=True), events["timestamp"], strict=True))
    first = events.groupby("item")["timestamp"].min().to_dict()
    left_out = 0
    for row in data.train:
        when = [taken.get((row["user"], item)) for item in row["negative_items"]]
        assert all(t is None or (kind == "dislikes" and t < row["timestamp"]) for t in when)
        own = [item for (user, item), t in taken.items() if user == row["user"] and t > row["timestamp"]]
        left_out += sum(first[item] < row["timestamp"] for item in own)
    assert left_out > 0
    assert any(f"there were {left_out} of those to leave out" in note for note in data.card.notes)


def test_under_leave_one_out_what_is_liked_later_is_no_dislike(tmp_path: Path) -> None:
    """With data.repeats=keep the item of a held-out like may have been rated low before."""
    lines = ["user,item,rating,timestamp,title"]
    for u in range(12):
        takes = [(n, 2 if n < 6 else 5, n) for n in range(12)] + [(0, 5, 20), (1, 5, 21), (2, 2, 5)]
        lines += [f"u{u},i{(u + n) % 30},{rating},{1000 * u + t},Title {(u + n) % 30}" for n, rating, t in takes]
    (tmp_path / "log.csv").write_text("\n".join(lines))
    config = DataConfig(
        source=Source(kind="csv", path=tmp_path / "log.csv"), split="leave_one_out", repeats="keep",
        negatives="dislikes", negatives_per_group=3, evaluation_negatives=3,
    )  # fmt: skip
    data = prepare(config, seed=0, output=tmp_path / "out", echo=lambda line: None)
    disliked = 0
    for row in data.train:
        own = data.interactions[data.interactions["user"] == row["user"]]
        later = set(own.loc[own["timestamp"] > row["timestamp"], "item"])
        assert not later & {*row["negative_items"]}
        disliked += len({*row["negative_items"]} & {*own["item"]})
    assert disliked > len(data.train), "dislikes that stay are drawn"


def test_a_log_without_dislikes_has_no_dislikes_to_draw(tmp_path: Path) -> None:
    """As one without ratings, all of whose interactions are likes."""
    lines = ["user,item,timestamp,title"]
    lines += [f"u{u},i{(u + n) % 30},{50 * u + n},Title {(u + n) % 30}" for u in range(20) for n in range(12)]
    (tmp_path / "log.csv").write_text("\n".join(lines))
    config = DataConfig(source=Source(kind="csv", path=tmp_path / "log.csv"), negatives="dislikes")
    with pytest.raises(UserError, match=r"no rating of log lies below .*threshold=4, .*set data\.negatives=uniform"):
        prepare(config, seed=0, output=tmp_path / "out", echo=lambda line: None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["uniform", "dislikes", "popularity", "in_batch"])
def test_negatives_do_not_depend_on_the_target(tmp_path: Path, kind: str) -> None:
    """Two likes in one second are two requests of one user and time: both get the same negatives, not the two."""
    lines = ["user,item,rating,timestamp,title"]
    lines += [
        f"u{u},i{(u * 7 + n * 3) % 40},{5 - n % 3},{50 * u + n // 2},Title {(u * 7 + n * 3) % 40}"
        for u in range(20)
        for n in range(12)
    ]
    (tmp_path / "log.csv").write_text("\n".join(lines))
    config = DataConfig(
        source=Source(kind="csv", path=tmp_path / "log.csv"),
        negatives=kind,
        negatives_per_group=4,
        evaluation_negatives=4,
        train_requests_per_user=4,
    )
    train = prepare(config, seed=0, output=tmp_path / "out", echo=lambda line: None).train.to_list()
    requests: dict[tuple[str, int], list[dict]] = {}
    for row in train:
        requests.setdefault((row["user"], row["timestamp"]), []).append(row)
    twins = [rows for rows in requests.values() if len(rows) == 2]
    assert twins
    for a, b in twins:
        assert a["negatives"] == b["negatives"]
        assert a["history"] == b["history"]
        assert not {a["positive"], b["positive"]} & {*a["negatives"], *a["history"]}


def test_what_is_not_prepared_data_is_named(prepared: PreparedData, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        target = tmp_path / name
        target.mkdir()
        (target / "dataset.json").write_text((prepared.path / "dataset.json").read_text())
        return target

    with pytest.raises(UserError, match=r"no such folder.*dmpo data prepare"):
        PreparedData.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no dataset\.json"):
        PreparedData.load(tmp_path)
    with pytest.raises(UserError, match=r"without_rows: damaged or incomplete .*cannot be read"):
        PreparedData.load(copy("without_rows"))
    broken = copy("broken")
    (broken / "dataset.json").write_text("{")
    with pytest.raises(UserError, match=r"dataset\.json: damaged"):
        PreparedData.load(broken)
    (broken / "dataset.json").write_text(json.dumps(prepared.card.content() | {"format_version": 9}))
    with pytest.raises(UserError, match=r"format version 9, this dmpo reads version 1"):
        PreparedData.load(broken)


@pytest.mark.skipif("DMPO_MOVIELENS" not in os.environ, reason="DMPO_MOVIELENS names no folder")
def test_real_movielens(tmp_path: Path) -> None:
    source = Source(kind="movielens", path=Path(os.environ["DMPO_MOVIELENS"]), duplicate_titles="merge")
    data = prepare(DataConfig(source=source), seed=0, output=tmp_path / "ml", echo=lambda line: None)
    assert len(data.test) == len(set(data.test["user"])) > 0
    assert all(row["oracle"] == [] for row in data.test)
    assert load_from_disk(str(tmp_path / "ml" / "train")).num_rows == len(data.train)


def test_auto_takes_as_many_requests_of_a_user_as_make_enough_groups(tmp_path: Path, monkeypatch) -> None:
    def count(limit: object) -> int:
        config = small(train_requests_per_user=limit, min_history=1)
        made = prepare(config, 0, tmp_path / f"{limit}-{groups.ENOUGH_GROUPS}", lambda line: None)
        assert limit != "auto" or any("train_requests_per_user=auto takes up to" in note for note in made.card.notes)
        return len(made.train)

    assert count("auto") == count(99) > count(1)
    monkeypatch.setattr(groups, "ENOUGH_GROUPS", 2)
    assert count("auto") == count(1)


def test_a_log_of_repeats_is_prepared_without_a_leak(tmp_path: Path) -> None:
    """Histories may hold their target, and negatives are items that their user never took."""
    rng = np.random.default_rng(0)
    lines = ["user,item,timestamp,title"]
    for user in range(60):
        lines += [f"u{user},i{item},{t * 60 + user},Title {item}" for t, item in enumerate(rng.integers(0, 8, 20) * 5)]
        lines += [f"u{user},i{item},{rng.integers(600)},Title {item}" for item in rng.integers(0, 40, 4)]
    (tmp_path / "log.csv").write_text("\n".join(lines))
    config = DataConfig(
        source=Source(path=tmp_path / "log.csv"), repeats="keep", negatives_per_group=4, evaluation_negatives=4
    )
    data = prepare(config, 0, tmp_path / "out", lambda line: None)
    assert [row for row in data.test if row["positive_item"] in row["history_items"]]
    taken = set(zip(data.interactions["user"], data.interactions["item"], strict=True))
    assert not [item for row in data.test for item in row["negative_items"] if (row["user"], item) in taken]
    assert "leak" not in {finding.verdict for finding in data.card.leaks}


def test_fields_of_items_and_users_are_kept(tmp_path: Path) -> None:
    lines = [f"{n % 20},{(n * 7 + n // 20) % 30},{n},T{(n * 7 + n // 20) % 30}" for n in range(400)]
    (tmp_path / "log.csv").write_text("user,item,timestamp,title\n" + "\n".join(lines))
    (tmp_path / "users.csv").write_text("id;age\n" + "\n".join(f"{n};{n + 20}" for n in range(20)))
    source = Source(
        path=tmp_path / "log.csv",
        columns={"name": "title"},
        users_path=tmp_path / "users.csv",
        users_columns={"user": "id", "age": "age"},
    )
    config = DataConfig(source=source, negatives_per_group=4, evaluation_negatives=4)
    data = prepare(config, 0, tmp_path / "out", lambda line: None)
    check(data.path, lambda line: None)
    assert data.items["name"].tolist() == data.items["title"].tolist()
    texts = texts_of_data(TemplateConfig(item="{title} ({name})\n", preamble="Aged {age}: "), data)
    assert texts.of_user("7") == {"age": "27"}
    assert texts.of_items(["T3"]) == {"T3": {"name": "T3"}}
