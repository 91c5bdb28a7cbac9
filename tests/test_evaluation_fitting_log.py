"""What baselines are fitted on ends before the requests, and never holds what a requesting user did later."""

import numpy as np
import pandas as pd
import pytest

from dmpo_dist.config import DataConfig
from dmpo_dist.data.prepare import prepare
from dmpo_dist.data.store import PreparedData
from dmpo_dist.evaluation.fitting_log import fitting_log, known_likes, knows_the_future, of_same_users


def prepare_small_log(folder, split: str) -> PreparedData:
    rng = np.random.default_rng(4)
    rows = [
        (f"u{user}", f"i{item}", rng.choice([2.0, 5.0]), int(rng.integers(1000)) // 7)
        for user in range(30)
        for item in rng.permutation(40)[:20]
    ]
    log = pd.DataFrame(rows, columns=["user", "item", "rating", "timestamp"])
    log.assign(title=[f"Title {item}" for item in log["item"]]).to_parquet(folder / "log.parquet")
    source = {"kind": "parquet", "path": folder / "log.parquet"}
    sizes = {"negatives_per_group": 4, "evaluation_negatives": 4, "train_requests_per_user": 3}
    config = DataConfig.model_validate({"source": source, "split": split} | sizes)
    return prepare(config, 0, folder / split, echo=lambda _: None, allow_leaks=True)


@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_split_by_time_ends_at_the_cut(tmp_path, part):
    data = prepare_small_log(tmp_path, "time")
    log, cut = fitting_log(data, part), data.card.cuts[part].timestamp
    assert log["timestamp"].max() < cut <= min(getattr(data, part)["timestamp"][:])
    likes = data.interactions[data.interactions["rating"] >= 4]
    assert len(log) == (likes["timestamp"] < cut).sum() < (data.interactions["timestamp"] < cut).sum()
    assert not knows_the_future(data)


@pytest.mark.parametrize("part", ["validation", "test"])
def test_leave_one_out_leaves_out_what_a_user_did_from_the_request_on(tmp_path, part):
    data = prepare_small_log(tmp_path, "leave_one_out")
    asked = {row["user"]: row["timestamp"] for row in data.test}
    if part == "validation":
        asked |= {row["user"]: min(row["timestamp"], asked.get(row["user"], np.inf)) for row in data.validation}
    likes = data.interactions[data.interactions["rating"] >= 4]
    expected = [time < asked.get(user, np.inf) for user, time in likes[["user", "timestamp"]].to_numpy()]
    pd.testing.assert_frame_equal(fitting_log(data, part), likes[expected])
    taken = set(zip(*(fitting_log(data, part)[name] for name in ("user", "item")), strict=True))
    assert not taken & {(row["user"], row["positive_item"]) for row in getattr(data, part)}
    assert knows_the_future(data)
    assert fitting_log(data, part)["timestamp"].max() > min(asked.values())


@pytest.mark.parametrize("split", ["time", "leave_one_out"])
@pytest.mark.parametrize("shots", [3, 10, None])
def test_the_log_of_the_same_users_is_what_their_training_groups_show(tmp_path, split, shots):
    data = prepare_small_log(tmp_path, split)
    few = of_same_users(data, DataConfig(shots=shots))
    groups = list((data if shots is None else data.few(shots)).train)
    assert list(few.train) == groups
    shown = {(row["user"], item) for row in groups for item in (*row["history_items"], row["positive_item"])}
    for part in ("validation", "test"):
        log = fitting_log(few, part)
        assert set(zip(log["user"], log["item"], strict=True)) == shown
        assert set(log.index) <= set(fitting_log(data, part).index)
        assert len(log) == len(shown)
    assert len(known_likes(few)) < len(known_likes(data))
    assert list(few.test) == list(data.test)
