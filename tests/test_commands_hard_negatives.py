"""Hard negatives and evaluation on another domain, with a tiny model of the first one's titles."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from worlds import World, prepared

from dmpo_dist.commands.evaluate import evaluate
from dmpo_dist.commands.hard_negatives import mine_hard_negatives
from dmpo_dist.commands.memorized import probe
from dmpo_dist.config import DataConfig, EvaluationConfig, ModelConfig, RunConfig
from dmpo_dist.data.store import PreparedData
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.memorization import memorization_probes
from dmpo_dist.evaluation.ranking import load_ranking_model
from dmpo_dist.records.log import make_console


def settings(world: World, data: Path | None = None) -> RunConfig:
    return RunConfig(
        data=DataConfig(path=data or world.data.path),
        model=ModelConfig(path=str(world.model), max_length=128),
        evaluation=EvaluationConfig(bootstrap_samples=100),
    )


def test_the_hardest_come_first(world: World, tmp_path: Path) -> None:
    crowded = {"simulator": {"users": 60, "items": 40, "events_per_user": 14}}  # some negatives are liked later
    old = prepared(tmp_path / "old", source=crowded)
    config, model = settings(world, old.path), str(world.model)
    said: list[str] = []
    new = mine_hard_negatives(model, config, tmp_path / "hard", keep=3, skip_top=1, draw_from=None, echo=said.append)
    scores = load_ranking_model(model, config).score_rows(old.train)
    for before, after, (_, *negatives) in zip(old.train, new.train, scores, strict=True):
        order = np.argsort(-np.array(negatives))[1:4]
        assert after["negatives"] == [before["negatives"][index] for index in order]
        assert after["negative_items"] == [before["negative_items"][index] for index in order]
        assert after["oracle"] == [before["oracle"][0], *(before["oracle"][1 + index] for index in order)]
    assert new.test.to_list() == old.test.to_list()
    assert new.fingerprint != old.fingerprint
    assert "scores highest" in new.card.notes[-1]
    liked = old.interactions.query("rating >= 4").set_index(["user", "item"])["timestamp"].to_dict()
    pairs = [(row["user"], item, row["timestamp"]) for row in new.train for item in row["negative_items"]]
    later = sum(liked.get((user, item), t) > t for user, item, t in pairs)
    share = f"{later / len(pairs):.1%} of them ({later} of {len(pairs)}) were liked by their user later."
    assert later > 0
    assert new.card.notes[-1].endswith(share)
    assert any("WARNING: likely false negatives" in line and share in line for line in said)


def test_hard_negatives_of_a_few_shots(world: World, tmp_path: Path) -> None:
    config = settings(world)
    config.data.shots = 5
    new = mine_hard_negatives(str(world.model), config, tmp_path / "few", 2, 0, None, lambda line: None)
    asked = world.data.few(5).train
    assert new.train["user"] == asked["user"]
    assert new.card.counts["train"] == 5
    assert new.card.counts["test"] == world.data.card.counts["test"]


def test_hard_negatives_drawn_among_the_hardest(world: World, tmp_path: Path) -> None:
    config, model = settings(world), str(world.model)
    old = world.data
    drawn = [
        mine_hard_negatives(model, config, tmp_path / name, keep=2, skip_top=1, draw_from=4, echo=lambda line: None)
        for name in ("one", "two")
    ]
    assert drawn[0].fingerprint == drawn[1].fingerprint
    ranks = set()
    for before, after, (_, *negatives) in zip(
        old.train, drawn[0].train, load_ranking_model(model, config).score_rows(old.train), strict=True
    ):
        order = [before["negatives"][index] for index in np.argsort(-np.array(negatives))]
        chosen = [order.index(title) for title in after["negatives"]]
        assert 1 <= chosen[0] < chosen[1] < 5
        ranks |= set(chosen)
    assert ranks == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("keep", "skip_top", "draw_from", "message"),
    [
        (7, 2, None, r"--keep 7 and --skip-top 2 need 9 negatives, but a training group of .* holds 6"),
        (2, 2, 5, r"--draw-from 5 and --skip-top 2 need 7 negatives, but a training group of .* holds 6"),
        (4, 0, 3, r"--draw-from 3 holds fewer negatives than --keep 4"),
    ],
)
def test_numbers_that_do_not_fit(
    world: World, tmp_path: Path, keep: int, skip_top: int, draw_from: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        mine_hard_negatives(
            str(world.model), settings(world), tmp_path / "x", keep, skip_top, draw_from, lambda line: None
        )
    assert not (tmp_path / "x").exists()


@pytest.fixture
def broken(world: World, tmp_path: Path) -> Path:
    """A model whose scores are not finite."""
    model = shutil.copytree(world.model, tmp_path / "broken")
    weights = load_file(model / "model.safetensors")
    next(weight for name, weight in weights.items() if "mlp" in name)[:] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return model


def test_scores_that_are_no_numbers_choose_nothing(world: World, tmp_path: Path, broken: Path) -> None:
    """Sorted, they leave the negatives in the order in which they were drawn, which looks like any other."""
    with pytest.raises(
        UserError, match="scores are not finite, the first is nan; its training diverged or its"
    ) as told:
        mine_hard_negatives(str(broken), settings(world), tmp_path / "x", 3, 0, None, lambda line: None)
    assert "too narrow" not in str(told.value), "nothing is wider than the float32 it ran in"
    assert not (tmp_path / "x").exists()
    data = PreparedData.load(world.data.path)
    with pytest.raises(UserError, match="scores are not finite"):  # else it knows nothing, and that is a finding
        memorization_probes(load_ranking_model(str(broken), settings(world)), data, 3, 3, 100, 0)


def test_where_nothing_can_be_written_nothing_is_scored(world: World, tmp_path: Path, broken: Path) -> None:
    """The model would raise another error when it scores."""
    there = tmp_path / "there"
    there.write_text("")
    with pytest.raises(UserError, match="exists already"):
        mine_hard_negatives(str(broken), settings(world), there, 3, 0, None, lambda line: None)
    with pytest.raises(FileExistsError):
        probe(str(broken), world.data, settings(world), 3, 3, there, make_console())


def test_a_model_of_one_domain_ranks_another(world: World, tmp_path: Path) -> None:
    """Train on A, evaluate on B: data.path alone says which; template and tokenizer come with the model."""
    values = {}
    domains = {"a": world.data, "b": prepared(tmp_path / "data", seed=1)}
    for domain, data in domains.items():
        (tmp_path / domain).mkdir()
        result = evaluate({"of_a": str(world.model)}, settings(world, data.path), tmp_path / domain, make_console())
        assert result.data["fingerprint"] == data.fingerprint
        values[domain] = result.models["of_a"]["ndcg@10"].value
    titles = [set(data.items["title"]) for data in domains.values()]
    assert not titles[0] & titles[1], "no title of B was known to A's tokenizer"
    assert all(0 < value < 1 for value in values.values())
