"""What `dmpo reproduce` pins and prints; the stages themselves are those of the other commands."""

import pytest
from rich.console import Console

from dmpo_dist.artifacts.evaluation import Evaluation
from dmpo_dist.commands.quickstart import quickstart
from dmpo_dist.commands.reproduce import PAPERS, changed_keys, comparison, recipe_of, reproduce
from dmpo_dist.config import config_of, load_config
from dmpo_dist.config.load import find_recipe
from dmpo_dist.errors import UserError


def settings(name, *overrides):
    return load_config([find_recipe(str(recipe_of(name)), "--config")], list(overrides))


@pytest.mark.parametrize("name", PAPERS)
def test_every_protocol_is_a_recipe_whose_changes_are_listed(name):
    recipe = settings(name)
    assert recipe.objective.name in ("sdpo", "dmpo", "dmpo_released", "rank_reward")
    assert changed_keys(recipe, recipe) == []
    changed = settings(
        name,
        "model.path=small",
        "train.epochs=1",
        "output_dir=x",
        "cluster.workers=9",
        "data.source.path=d",
        "data.source.items_path=i",
    )
    assert changed_keys(changed, recipe) == [
        f"model.path=small (protocol: {recipe.model.path})",
        f"train.epochs=1.0 (protocol: {recipe.train.epochs})",
    ]  # fmt: skip


def test_the_papers_figure_stands_beside_ours_with_all_that_differs():
    figure = {"hr@1": {"value": 0.25, "low": 0.125, "high": 0.375}}
    written = {"hr@1": 0.2, "valid": 0.9, "hr@1 by log-prob": 0.25}
    found = Evaluation.model_validate(
        {
            "requests": 40, "negatives": {"fewest": 19, "most": 19}, "models": {"sft": figure, "dynamicpo": figure},
            "generation": {"requests": 40, "models": {"dynamicpo": written}},
        }
    )  # fmt: skip
    lines = comparison("dynamicpo", found, "d", ["model.path=small (protocol: large)"])
    assert lines[:4] == [
        "DynamicPO on DMPO (arXiv 2605.00327): HR@1",
        "paper: 0.666 (README of the authors' repository, Llama-2-7B; DMPO alone has 0.5848 there)",
        "here: 0.250 [0.125, 0.375] by log-prob on 40 requests of d",
        "here, by what the model writes: 0.200; valid ratio 0.900, on 40 requests",
    ]
    assert lines[4:] == [
        "differs: model.path=small (protocol: large)", *(f"differs: {text}" for text in PAPERS["dynamicpo"].differs),
    ]  # fmt: skip


def test_a_figure_among_all_titles_says_so():
    asked = {"ndcg@10": {"value": 0.5, "low": 0.4, "high": 0.6}}
    among_all = {"ndcg@10": {"value": 0.0625, "low": 0.03125, "high": 0.125}}
    found = Evaluation.model_validate(
        {
            "requests": 40, "negatives": {"fewest": 19, "most": 19}, "models": {"sft": asked, "minionerec": asked},
            "catalogue": {"items": 3317, "models": {"minionerec": among_all}},
        }
    )  # fmt: skip
    lines = comparison("minionerec", found, "d", [])
    assert lines[2] == "here: 0.062 [0.031, 0.125] by log-prob among all 3317 titles on 40 requests of d"


def test_a_paper_without_a_figure_says_so():
    figure = {"pooled_auc": {"value": 0.5, "low": 0.4, "high": 0.6}}
    found = Evaluation.model_validate(
        {"requests": 40, "negatives": {"fewest": 1, "most": 1}, "models": {"sft": figure, "dmpo": figure}}
    )
    lines = comparison("dmpo", found, "d", [])
    assert lines[0] == "DMPO (arXiv 2405.16127): pooled AUC"
    assert lines[1] == f"paper: no figure found ({PAPERS['dmpo'].source})"
    assert lines[2] == "here: 0.500 [0.400, 0.600] by log-prob on 40 requests of d"


def test_keys_without_effect_are_refused_before_any_work(tmp_path):
    """Commands that prepare their own data, and the quickstart, whose model is one from scratch."""
    console, own = Console(quiet=True), {"data.path": "there", "output_dir": str(tmp_path / "run")}
    reproduced = config_of(own | {"data.source.path": "files"})
    with pytest.raises(
        UserError, match=r"data\.path=there has no effect: dmpo reproduce prepares .*run/data; leave it"
    ):
        reproduce("dmpo", reproduced, reproduced, console)
    with pytest.raises(UserError, match=r"data\.path=there has no effect: dmpo quickstart prepares"):
        quickstart(config_of(own), console)
    with pytest.raises(UserError, match=r"model\.path=gpt2: dmpo quickstart trains .* from scratch"):
        quickstart(config_of({"model.path": "gpt2", "output_dir": str(tmp_path / "run")}), console)
    assert not (tmp_path / "run").exists()


def test_a_mistyped_path_does_not_block_the_folder(tmp_path):
    for path in ("nosuch", "nosuch-either"):  # the second was told that the folder exists
        given = settings("dmpo", f"data.source.path={tmp_path / path}", f"output_dir={tmp_path / 'run'}")
        with pytest.raises(UserError, match=f"{path}: does not exist; set data.source.path"):
            reproduce("dmpo", given, given, Console(quiet=True))


def test_a_mistake_that_shows_after_the_data_does_not_block_the_folder_either(tmp_path):
    run = tmp_path / "run"
    world = {"data.source.simulator": {"users": 60, "items": 40, "events_per_user": 12}, "data.evaluation_negatives": 5}
    given = config_of(world | {"data.negatives_per_group": 4, "train.negatives": 9, "output_dir": run})
    for _ in range(2):
        with pytest.raises(UserError, match=r"train\.negatives=9, but the prepared data holds 4"):
            quickstart(given, Console(quiet=True))
    (run / "sft" / "model").mkdir()  # a stage that is done is no longer thrown away
    with pytest.raises(UserError, match=r"run exists already; choose another .* by --resume, or remove it$"):
        quickstart(given, Console(quiet=True))


def test_an_unknown_paper_is_refused():
    with pytest.raises(
        UserError, match="foo: no paper of that name; `dmpo reproduce` knows sdpo, dynamicpo, dmpo, minionerec"
    ):
        recipe_of("foo")
