"""Leak check: every kind of planted leak is found and named, and sound data passes."""

import copy
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dmpo_dist.cli import main
from dmpo_dist.config import DataConfig, Simulator, Source
from dmpo_dist.data.candidate_leaks import look_up, overlap, overlapping
from dmpo_dist.data.leaks import canonical, check_leaks, leaks
from dmpo_dist.data.prepare import prepare
from dmpo_dist.data.sources.released import load_released
from dmpo_dist.data.splits import SPLITS
from dmpo_dist.data.store import PreparedData
from dmpo_dist.errors import UserError


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    world = Source(simulator=Simulator(users=300, items=80, events_per_user=16, taste_dim=4))
    config = DataConfig(source=world, negatives_per_group=8)
    return prepare(config, seed=0, output=tmp_path_factory.mktemp("leaks") / "data", echo=lambda line: None)


def rows_of(data: PreparedData) -> dict[str, list[dict]]:
    return {split: copy.deepcopy(getattr(data, split).to_list()) for split in SPLITS}


def found(rows: dict[str, list[dict]], data: PreparedData, **options: object) -> list[str]:
    return [finding.check for finding in leaks(check_leaks(rows, data.interactions, **options))]


def share_history(rows: dict) -> None:
    rows["train"][0]["history_items"] = rows["test"][0]["history_items"]
    rows["train"][0]["user"] = rows["test"][0]["user"]


def look_ahead(rows: dict) -> None:
    rows["test"][0]["timestamp"] = min(row["timestamp"] for row in rows["test"])
    rows["test"][0]["history_items"].append(rows["test"][0]["positive_item"])


def train_late(rows: dict) -> None:
    rows["train"][0]["timestamp"] = rows["test"][0]["timestamp"] + 1


def disjoint_halves(rows: dict) -> None:
    """Targets from one half of the catalogue, negatives from the other; both halves are equally popular."""
    for row in rows["train"] + rows["test"]:
        number = int(row["positive_item"][1:])
        row["positive_item"] = f"i{number // 2 * 2:02d}"
        row["negative_items"] = [f"i{int(item[1:]) // 2 * 2 + 1:02d}" for item in row["negative_items"]]
        row["history_items"] = [item for item in row["history_items"] if item != row["positive_item"]]


def negatives_of_the_target(rows: dict) -> None:
    """The negatives of an evaluated request are one list that its target decides."""
    for row in rows["validation"] + rows["test"]:
        drawn = np.random.default_rng(int(row["positive_item"][1:])).choice(80, 20, replace=False)
        row["negative_items"] = [item for item in (f"i{n:02d}" for n in drawn) if item != row["positive_item"]][:19]


def negatives_of_the_target_in_validation_alone(rows: dict) -> None:
    negatives_of_the_target(rows)
    rows["test"] = []


def escape(rows: dict) -> None:
    for row in rows["train"]:
        row["history"] = [title.replace(" ", " &amp; ").upper() for title in row["history"]]
        row["positive"] = row["positive"].replace(" ", " &amp; ").upper()
        row["negatives"] = [title.replace(" ", " &amp; ").upper() for title in row["negatives"]]
    for row in rows["test"] + rows["validation"]:
        row["history"] = [title.replace(" ", " & ") for title in row["history"]]
        row["positive"] = row["positive"].replace(" ", " & ")
        row["negatives"] = [title.replace(" ", " & ") for title in row["negatives"]]


def space_before_targets(rows: dict) -> None:
    for row in rows["test"]:
        row["positive"] = " " + row["positive"]


def target_twice(rows: dict) -> None:
    for row in rows["test"]:
        row["negatives"][0] = row["positive"].upper()


@pytest.mark.parametrize(
    ("plant", "check"),
    [
        (share_history, "histories shared by splits"),
        (look_ahead, "future items in histories"),
        (train_late, "training after requests"),
        (disjoint_halves, "candidate look-up"),
        (negatives_of_the_target, "overlap of candidates"),
        (negatives_of_the_target_in_validation_alone, "overlap of candidates"),
        (escape, "titles written differently"),
        (escape, "style of titles"),
        (space_before_targets, "style of titles"),
        (target_twice, "duplicate titles"),
    ],
)
def test_a_planted_leak_is_found(sound: PreparedData, plant: Callable[[dict], None], check: str) -> None:
    rows = rows_of(sound)
    assert found(rows, sound) == []
    plant(rows)
    assert check in found(rows, sound)


def test_the_probe_learns_only_from_training(sound: PreparedData) -> None:
    """Candidates without any pattern are not guessable: HR@1 is chance within its interval."""
    rng = np.random.default_rng(0)
    items = [f"i{n}" for n in range(60)]
    rows = rows_of(sound)
    for row in (row for split in rows.values() for row in split):
        row["positive_item"], *row["negative_items"] = rng.choice(items, 5, replace=False).tolist()
        row["history_items"] = []
    probe = next(f for f in check_leaks(rows, None) if f.check == "candidate look-up")
    assert probe.verdict == "ok"
    assert probe.figures["low"] < probe.figures["chance"] < probe.figures["high"]


def test_overlap_is_that_of_every_pair_of_requests() -> None:
    rng = np.random.default_rng(0)
    sets = [[str(i) for i in rng.choice(30, rng.integers(2, 9), replace=False)] for _ in range(80)]
    found = overlap(sets, np.arange(40, 80))
    for column, t in enumerate(range(40, 80)):
        negatives, others = set(sets[t][1:]), [items for n, items in enumerate(sets) if n != t]
        shared = [(items[0] == sets[t][0], len(negatives & set(items))) for items in others]
        assert found.same[column] == max([count for same, count in shared if same], default=-1)
        assert found.other[column] == max(count for same, count in shared if not same)
        most = max(count for _, count in shared)
        assert found.alike[column] == pytest.approx(np.mean([same for same, count in shared if count == most]))
        assert found.chance[column] == pytest.approx(np.mean([same for same, _ in shared]))


@pytest.mark.parametrize("shelf", [["yes", "no"], [f"i{n}" for n in range(20)]])
def test_candidates_that_are_always_the_same_tell_nothing(shelf: list[str]) -> None:
    rng = np.random.default_rng(0)
    rows: dict[str, list] = {split: [] for split in SPLITS}
    for n in range(600):
        target, *others = rng.permutation(shelf).tolist()
        row = {"user": str(n), "positive": target, "positive_item": target, "negative_items": others}
        rows[SPLITS[n % 3]].append(row)
    assert overlapping(rows).verdict == "ok"


def test_without_popularity_the_look_up_only_warns(sound: PreparedData) -> None:
    """Finished prompts without a log: popular items are likelier targets, and nothing says how popular they are."""
    rows = rows_of(sound)
    disjoint_halves(rows)
    for row in (row for split in rows.values() for row in split):
        row["history_items"] = []
    probe = look_up(rows, None)
    assert probe.verdict == "warning"
    assert "do not tell popularity" in probe.text


def test_an_uneven_place_is_a_leak_where_prompts_show_it(sound: PreparedData) -> None:
    rows = rows_of(sound)
    shown_at = {"train": {"2": [90, 10]}, "test": {"2": [52, 48]}}
    assert found(rows, sound, shown_at=shown_at) == []
    for row in rows["train"] + rows["test"]:
        row["prompt"] = f"Which of the two? {row['user']} {row['timestamp']}"
    assert found(rows, sound, shown_at=shown_at) == ["position of the target"]
    assert found(rows, sound, shown_at={"test": {"2": [52, 48]}}) == []


def test_leave_one_out_trains_on_the_future_and_says_so(sound: PreparedData) -> None:
    rows = rows_of(sound)
    train_late(rows)
    assert found(rows, sound, leave_one_out=True) == []
    warned = next(f for f in check_leaks(rows, sound.interactions, None, True) if f.check == "training after requests")
    assert warned.verdict == "warning"
    assert warned.figures["training_rows_in_the_future"] == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [("Matrix, The (1999)", "The Matrix (1999)"), ("Tom &amp; Jerry", "TOM & JERRY"), ("Halo  3 - PC", "Halo 3: PC")],
)
def test_titles_that_are_one(one: str, other: str) -> None:
    assert canonical(one) == canonical(other)
    assert canonical("Heat (1995)") != canonical("Heat (1986)")
    assert canonical("!!!") == "!!!"


def test_the_commands_stop_at_a_leak(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": f"p{n % 30}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(60)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(f"{row}\n".replace("'", '"') for row in rows))
    prepare_it = ["data", "prepare", "data.source.kind=preferences", f"data.source.path={tmp_path}"]
    for arguments, status in [
        ([*prepare_it, f"data.path={tmp_path}/out"], 2),
        ([*prepare_it, f"data.path={tmp_path}/out", "--allow-leaks"], 0),
        (["data", "check", f"{tmp_path}/out"], 2),
    ]:
        monkeypatch.setattr("sys.argv", ["dmpo", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == status
        said = capsys.readouterr()
        assert ("30 of 30 training histories also occur in evaluation" in said.err) == (status == 2)
    card = PreparedData.load(tmp_path / "out").card
    assert "histories shared by splits" in [f.check for f in card.leaks if f.verdict == "leak"]


@pytest.mark.skipif("DMPO_RELEASED" not in os.environ, reason="DMPO_RELEASED names no folder")
def test_the_released_files(tmp_path: Path) -> None:
    """15 of the 100 training histories are in the evaluation file; popularity gives 0.559 pair accuracy within 0.02."""
    folder = Path(os.environ["DMPO_RELEASED"])
    source = Source(kind="dmpo_released", path=folder)
    with pytest.raises(UserError, match=r"15 of 100 training histories also occur in evaluation"):
        prepare(DataConfig(source=source), 0, tmp_path / "out", echo=lambda line: None)
    data = prepare(DataConfig(source=source), 0, tmp_path / "out", echo=lambda line: None, allow_leaks=True)
    assert data.card.counts == {"train": 100, "validation": 0, "test": 1000}
    assert set(data.stored_negatives()) == {5}
    probe = next(f for f in data.card.leaks if f.check == "candidate look-up")
    assert probe.figures["popularity_hr@1"] == pytest.approx(0.559, abs=0.02)
    original = load_released(folder, 5, "original").splits["train"]
    assert len(original) == 500
    assert all(group.prompt and group.chosen != group.rejected[0] for group in original)
