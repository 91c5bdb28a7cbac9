"""Scores in parts are those of one go, an interruption costs a part, and what differs is told."""

import io
import shutil
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from worlds import save_adapter

from dmpo_dist.artifacts.stamp import ModelStamp
from dmpo_dist.commands import scored_parts
from dmpo_dist.commands.evaluate import evaluate
from dmpo_dist.commands.rank import Asked, rank
from dmpo_dist.commands.scored_parts import PARTS, PartScorer, on_actors
from dmpo_dist.config import RunConfig, TemplateConfig
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.ranking import load_ranking_model

CONSOLE = Console(file=io.StringIO(), width=100)


def settings(world, **model) -> RunConfig:
    content = {
        "data": {"path": world.data.path}, "model": {"max_length": 128} | model, "ranking": {"users_per_part": 5},
        "evaluation": {"baselines": ["random"], "bootstrap_samples": 100, "order_requests": 0, "token_budget": 300},
    }  # fmt: skip
    return RunConfig.model_validate(content)


def scorer(world, folder, config, path=None, console=CONSOLE) -> PartScorer:
    path = str(path or world.model)
    model = load_ranking_model(path, config)
    return PartScorer("scoring m", f"--model m={path}", path, model, world.data, config, folder, console)


def scored(world, folder, config) -> list[np.ndarray]:
    return scorer(world, folder, config)()


def test_parts_hold_the_scores_of_one_go_to_the_last_bit_and_an_interruption_costs_one(world, tmp_path, monkeypatch):
    config = settings(world)
    whole = load_ranking_model(str(world.model), config).score_rows(world.data.test)
    asked = []
    one_share = scored_parts._share_rows

    def dies_at_the_third(model, groups, share, shares):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(share)
        return one_share(model, groups, share, shares)

    monkeypatch.setattr(scored_parts, "_share_rows", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        scored(world, tmp_path, config)
    kept = sorted((tmp_path / PARTS).rglob("part-*"))
    assert len(kept) == 2
    kept[1].write_bytes(kept[1].read_bytes()[:-20])  # torn, so that it is scored again
    asked.clear()
    monkeypatch.setattr(
        scored_parts,
        "_share_rows",
        lambda model, groups, *share: asked.append(share[0]) or one_share(model, groups, *share),
    )
    again = scored(world, tmp_path, config)
    assert asked == list(range(1, -(-len(world.data.test) // 5)))
    assert all(a.tolist() == b.tolist() for a, b in zip(again, whole, strict=True))


def test_weights_that_several_models_ask_for_run_once(world, tmp_path, monkeypatch):
    """A base is evaluated itself, and is the reference of two adapters."""
    other = tmp_path / "other"
    save_adapter(world.model, other, scale=0.2)
    models, base = (world.model, world.adapter, other), str(world.model)
    ran: list[str] = []
    one_share = scored_parts._share_rows
    monkeypatch.setattr(
        scored_parts,
        "_share_rows",
        lambda model, groups, *share: ran.append(model.scored_source.path) or one_share(model, groups, *share),
    )
    out, config = tmp_path / "out", settings(world)
    alone, *adapted = [scorer(world, out, config, path)() for path in models]
    references = [scorer(world, out, config, path)("test", base) for path in models[1:]]
    assert Counter(ran) == dict.fromkeys(map(str, models), -(-len(world.data.test) // 5))
    assert all(a.tolist() == b.tolist() == c.tolist() for a, b, c in zip(alone, *references, strict=True))
    assert all(abs(a - b).max() > 0.01 for own in adapted for a, b in zip(own, alone, strict=True))
    # the other way about: an adapter that is switched off gives what its base does
    switched_off = scorer(world, tmp_path / "again", config, world.adapter)("test", base)
    np.testing.assert_allclose(np.concatenate(switched_off), np.concatenate(alone), rtol=1e-6)


@pytest.mark.parametrize(
    "changed", [{"model": {"attention": "unshared"}}, {"template": {"preamble": "Seen: "}}, {"split": "validation"}]
)
def test_parts_of_other_settings_prompts_or_splits_are_not_taken(world, tmp_path, changed):
    scored(world, tmp_path, settings(world))
    kept = sum(1 for _ in (tmp_path / PARTS).iterdir())
    config = settings(world, **changed.get("model", {}))
    config.template = TemplateConfig.model_validate(changed.get("template", {}))
    bare = tmp_path / "bare"  # a model without a template of its own, so that it takes any
    shutil.copytree(world.model, bare, ignore=shutil.ignore_patterns(ModelStamp.FILE))
    scorer(world, tmp_path, config, bare)(changed.get("split", "test"))
    assert sum(1 for _ in (tmp_path / PARTS).iterdir()) == kept + 1


def test_a_part_that_holds_a_request_twice_is_told(world, tmp_path):
    config = settings(world)
    scored(world, tmp_path, config)
    first, second, *_ = sorted((tmp_path / PARTS).rglob("part-*"))
    pq.write_table(pq.read_table(first), second)
    with pytest.raises(UserError, match="do not hold each request once"):
        scored(world, tmp_path, config)


def test_there_may_be_more_parts_than_packed_rows(world, tmp_path):
    config = settings(world)
    config.ranking.users_per_part, config.evaluation.token_budget = 1, 8192
    whole = load_ranking_model(str(world.model), config).score_rows(world.data.test)
    assert all(a.tolist() == b.tolist() for a, b in zip(scored(world, tmp_path, config), whole, strict=True))


def test_an_evaluation_that_is_written_leaves_no_parts(world, tmp_path):
    evaluate({"m": str(world.model)}, settings(world), tmp_path / "out", CONSOLE)
    assert (tmp_path / "out/evaluation.json").exists()
    assert not (tmp_path / "out" / PARTS).exists()


def test_actors_give_the_scores_of_one_process_in_whichever_order_they_finish(world, tmp_path, monkeypatch):
    """The part of the work that is ours; the actors themselves are in ``integration``."""
    alone = scored(world, tmp_path / "alone", settings(world))
    monkeypatch.setattr("dmpo_dist.cluster.train.ray_session", lambda _: nullcontext())
    monkeypatch.setattr(
        "dmpo_dist.cluster.actors.map_over_actors",
        lambda _, make_worker, arguments, tasks: map(make_worker(*arguments), tasks[::-1]),
    )
    two = settings(world)
    two.cluster.workers = 2
    assert on_actors(two)
    found = scored(world, tmp_path / "two", two)
    assert all(a.tolist() == b.tolist() for a, b in zip(found, alone, strict=True))


def test_workers_find_relative_paths_wherever_they_were_started(world, tmp_path, monkeypatch):
    """Those of a cluster begin in the folder in which Ray was started there."""
    monkeypatch.chdir(world.folder)
    config = settings(world)
    config.data.path, config.template, config.cluster.workers = Path("data"), TemplateConfig(item="{title} {item}, "), 2
    base = load_ranking_model("model", config)
    expected = base.reference("adapter").score_rows(world.data.test)

    def in_another_folder(_, make_worker, arguments, tasks):
        with monkeypatch.context() as there:
            there.chdir(tmp_path)
            yield from map(make_worker(*arguments), tasks)

    monkeypatch.setattr("dmpo_dist.cluster.train.ray_session", lambda _: nullcontext())
    monkeypatch.setattr("dmpo_dist.cluster.actors.map_over_actors", in_another_folder)
    found = scorer(world, tmp_path, config, path="model")("test", "adapter")
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), atol=1e-5)
    config.ranking.reference = "adapter"
    rank("model", Asked(None, "u00", None), 1, tmp_path / "ranked.csv", config, CONSOLE)
    assert (tmp_path / "ranked.csv").read_text().startswith("user,rank,item,title,score\nu00,1,")
