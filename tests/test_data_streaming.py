"""A log prepared by shares of its users gives the rows of the whole log."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dmpo_dist.config import DataConfig, Simulator, Source
from dmpo_dist.data import log
from dmpo_dist.data.prepare import prepare
from dmpo_dist.data.sources.simulator import simulate
from dmpo_dist.data.splits import SPLITS
from dmpo_dist.errors import UserError


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shuffled log in three files, with repeated events, space around names, and two items of one title."""
    world = simulate(Simulator(users=150, items=80, events_per_user=16, taste_dim=4), seed=0)
    titles = world.items.set_index("item")["title"].to_dict()
    titles["i07"] = titles["i05"]
    events = world.events.assign(title=world.events["item"].map(titles))
    events = pd.concat([events, events.head(40).assign(timestamp=lambda e: e["timestamp"] + 9, rating=1.0)])
    events = events.iloc[np.random.default_rng(0).permutation(len(events))]
    folder = tmp_path_factory.mktemp("shards") / "log"
    folder.mkdir()
    for number, part in enumerate(np.array_split(np.arange(len(events)), 3)):
        events.iloc[part].to_parquet(folder / f"part-{number}.parquet", index=False)
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"max_validation_users": 5},
        {"split": "leave_one_out", "k_core": 6},
        {"negatives": "popularity", "levels": "ratings", "train_requests_per_user": 4},
        {"negatives": "dislikes", "negatives_per_group": 20},
    ],
)
def test_equal_to_the_log_at_once(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict) -> None:
    monkeypatch.setattr(log, "EVENTS_AT_ONCE", 300)
    source = Source(kind="parquet", path=shards, duplicate_titles="merge")
    settings = {"source": source, "negatives_per_group": 8, "train_requests_per_user": 2} | changes
    whole = prepare(DataConfig(**settings), 0, tmp_path / "whole", echo=lambda line: None)
    said: list[str] = []
    shared = prepare(DataConfig(**settings, stream=True), 0, tmp_path / "shared", echo=said.append)
    for split in SPLITS:
        assert getattr(shared, split).to_list() == getattr(whole, split).to_list()
    assert shared.fingerprint == whole.fingerprint
    cards = [data.card for data in (shared, whole)]
    for key in ("counts", "users", "cuts", "dropped"):
        assert getattr(cards[0], key) == getattr(cards[1], key)
    assert [f.verdict for f in shared.card.leaks] == [f.verdict for f in whole.card.leaks]
    pd.testing.assert_frame_equal(shared.items, whole.items)
    pd.testing.assert_frame_equal(shared.interactions, whole.interactions)
    assert "per second" in said[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shared", "whole"]
    assert not (tmp_path / "shared" / "work").exists()


def test_bad_shards(shards: Path, tmp_path: Path) -> None:
    def stream(path: Path, **source: object) -> None:
        config = DataConfig(source=Source(kind="parquet", path=path, duplicate_titles="merge", **source), stream=True)
        prepare(config, 0, tmp_path / "out", echo=lambda line: None)

    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"none: no \*\.parquet files"):
        stream(tmp_path / "none")
    with pytest.raises(UserError, match=r"no column 'sku'; the file has 'user'.*data\.source\.columns\.item"):
        stream(shards, columns={"item": "sku"})
    bad = tmp_path / "bad"
    bad.mkdir()
    frame = pd.read_parquet(shards / "part-0.parquet")
    frame.assign(rating=frame["rating"].where(frame.index != 4)).to_parquet(bad / "part-0.parquet")
    with pytest.raises(
        UserError, match=r"part-0\.parquet, row 5: rating '' is not a number; write a number or remove the row"
    ):
        stream(bad)
    frame.assign(timestamp=frame["timestamp"] * 1000).to_parquet(bad / "part-0.parquet")
    with pytest.raises(UserError, match=r"divide the column to seconds"):
        stream(bad)
    (bad / "part-0.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"bad: not readable Parquet files"):
        stream(bad)
    assert not (tmp_path / "out").exists()


@pytest.mark.integration
def test_the_command_shows_its_own_progress_alone(shards: Path, tmp_path: Path) -> None:
    source = ["data.source.kind=parquet", f"data.source.path={shards}", "data.source.duplicate_titles=merge"]
    settings = ["data.stream=true", "data.max_validation_users=5", f"data.path={tmp_path / 'data'}"]
    command = [sys.executable, "-m", "dmpo_dist", "data", "prepare", *source, *settings]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
