"""The Python face: a log in a data frame becomes a trained and evaluated model in this process."""

import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist

import dmpo_dist as dmpo
from dmpo_dist import api
from dmpo_dist.artifacts.stamp import ModelStamp
from dmpo_dist.config import TemplateConfig
from dmpo_dist.data.store import PreparedData
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.model_files import weights_digests

SMALL = {"model.scratch": {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 16}, "model.max_length": 96}
COLUMNS = {"user": "customer", "item": "sku", "timestamp": "time", "title": "name"}


def shop(customers: int = 80) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for customer in range(customers):
        times = np.sort(rng.integers(0, 100_000, 8))
        rows += [
            (f"c{customer}", item, t, f"Item {item}") for item, t in zip(rng.permutation(30)[:8], times, strict=True)
        ]
    return pd.DataFrame(rows, columns=["customer", "sku", "time", "name"])


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"data.evaluation_negatives": 5, "data.negatives_per_group": 4}
    return dmpo.prepare(shop(), columns=COLUMNS, settings=settings)


def test_a_data_frame_that_no_file_can_hold_is_one_message(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    twice = shop(3).assign(label="Ann").set_axis(["customer", "sku", "time", "name", "name"], axis=1)
    with pytest.raises(UserError, match=r"the data frame: column 'name' occurs 2 times; rename or remove all but one"):
        dmpo.prepare(twice, columns=COLUMNS)
    mixed = shop(3).astype({"sku": object})
    mixed.loc[0, "sku"] = "a7"
    with pytest.raises(UserError, match=r"the data frame: cannot be read .*column sku.*; a column holds"):
        dmpo.prepare(mixed, columns=COLUMNS)
    with pytest.raises(UserError, match=r'^the data frame log: no column .*; set columns\["user"\] to .*one$'):
        dmpo.prepare(shop(3), columns=COLUMNS | {"user": "client"})
    names = shop(3)[["sku", "name"]].set_axis(["item", "label"], axis=1)
    with pytest.raises(UserError, match=r'^the data frame titles: no column .*; set titles_columns\["title"\] to'):
        dmpo.prepare(shop(3), columns={k: v for k, v in COLUMNS.items() if k != "title"}, titles=names)
    assert not list(tmp_path.iterdir())


def test_a_data_frame_becomes_a_model_that_ranks_as_it_is_evaluated(data):
    before = dict(os.environ)
    sft = dmpo.train(data, stage="sft", settings=SMALL | {"sft.steps": 2})
    model = dmpo.train(data, sft, objective="sdpo", negatives=3, shots=10, settings={"train.steps": 2})
    assert not dist.is_initialized()
    engines = [o for o in gc.get_objects() if type(o).__name__.startswith(("DeepSpeedEngine", "DeepSpeedZero"))]
    assert not engines, "a stage leaves nothing for the next one to live beside"
    assert {k: v for k, v in os.environ.items() if k in ("RANK", "WORLD_SIZE")} == {
        k: v for k, v in before.items() if k in ("RANK", "WORLD_SIZE")
    }
    assert [path.name for path in sorted((data.path.parent).iterdir())] == ["data", "sdpo", "sft"]

    row = data.test[0]
    candidates = [row["positive"], *row["negatives"]]
    scores = model.score(row["history"], candidates)
    ranked = model.rank(row["history"], candidates)
    assert [title for title, _ in ranked] == [candidates[i] for i in np.argsort(-scores, kind="stable")]
    assert model.score_rows(data.test)[0] == pytest.approx(scores, abs=1e-5)

    result = dmpo.evaluate(data, {"sft": sft, "sdpo": model}, baselines=["random"], against=["sft"])
    best = np.mean([int((s[1:] < s[0]).all()) for s in model.score_rows(data.test)])
    assert result.models["sdpo"]["hr@1"].value == pytest.approx(best)
    compared = next(c for c in result.comparisons if {c.a, c.b} == {"sft", "sdpo"} and c.metric == "hr@1")
    difference = result.models[compared.a]["hr@1"].value - result.models[compared.b]["hr@1"].value
    assert compared.difference == pytest.approx(difference)
    own_option = {"train.steps": 1, "objective.gamma": 0.2}  # which the default objective has not
    assert dmpo.train(data, sft, objective="simpo", negatives=3, shots=10, settings=own_option).source.stamp
    lora = dmpo.train(data, sft, negatives=3, shots=10, settings={"train.steps": 2, "model.lora": {"r": 2}})
    both = dmpo.evaluate(data, {"dmpo": lora, "base": lora.reference(lora.source.base), "sft": sft}, baselines=[])
    assert lora.source.stamp.base_digests == weights_digests(sft.source.path)
    assert both.folders["base"] == both.folders["sft"] != both.folders["dmpo"]

    loaded = dmpo.load(model.source.path)
    assert loaded.score(row["history"], candidates) == pytest.approx(scores, abs=1e-6)
    assert loaded.encode.max_length == sft.encode.max_length == 96, "that of the training"
    with pytest.warns(UserWarning, match="model.max_length=96, and is used with 64 here"):
        shorter = dmpo.load(model.source.path, settings={"model.max_length": 64})
    assert shorter.encode.max_length == 64


def test_a_template_that_a_model_was_loaded_with_is_given_again_or_refused(world, tmp_path):
    """Only the path of the model goes on, so it was evaluated and trained on other prompts than it ranks by."""
    given = {"template.preamble": "Liked:\n", "model.max_length": 256}
    model = dmpo.load(world.model, settings=given)
    for use in (lambda: dmpo.evaluate(world.data, {"it": model}, folder=tmp_path / "run"),
                lambda: dmpo.train(world.data, model, folder=tmp_path / "run")):  # fmt: skip
        with pytest.raises(UserError, match="was loaded with another template .* in settings here"):
            use()
    assert not (tmp_path / "run").exists()
    found = dmpo.evaluate(world.data, {"it": model}, baselines=[], folder=tmp_path / "run", settings=given)
    best = np.mean([(scores[1:] < scores[0]).all() for scores in model.score_rows(world.data.test)])
    assert found.models["it"]["hr@1"].value == pytest.approx(best)


def test_a_model_that_is_used_otherwise_than_it_was_trained_says_so(world, tmp_path):
    model = shutil.copytree(world.model, tmp_path / "model")
    ModelStamp(template=TemplateConfig(), quantization="nf4", max_length=96).write(model)
    words = "trained with model.quantization=nf4, and is used with none here; give model.quantization=nf4 to keep to it"
    with pytest.warns(UserWarning, match=words) as seen:
        dmpo.load(model)
    assert [Path(one.filename).name for one in seen] == ["test_api.py"], "at the caller's line"


def test_few_of_the_groups_are_those_that_are_trained_on(world, tmp_path):
    few = world.data.few(5)
    assert api._run_config(few, tmp_path / "x", "sft", {"data.shots": None}).data.shots == 5
    assert api._run_config(few, tmp_path / "x", "sft", {"data.shots": 3}).data.shots == 3
    assert api._run_config(world.data, tmp_path / "x", "sft", {}).data.shots is None


def test_mistakes_name_what_to_change(data, tmp_path):
    with pytest.raises(UserError, match="learning_rate"):
        dmpo.train(data, settings={"train.lr": 1e-4})
    with pytest.raises(UserError, match="no such file or folder"):
        dmpo.prepare(tmp_path / "nowhere.csv")
    (tmp_path / "log.xyz").write_text("a")
    with pytest.raises(UserError, match=r"data\.source\.kind"):
        dmpo.prepare(tmp_path / "log.xyz")
    with pytest.raises(UserError, match="sku"):
        dmpo.prepare(shop().drop(columns="sku"), columns=COLUMNS)
    for call in (dmpo.train, lambda path: dmpo.evaluate(path, {})):
        with pytest.raises(UserError, match=r"its data is 'runs/data'; give what dmpo_dist\.prepare returned, or open"):
            call("runs/data")
    with pytest.raises(UserError, match="stage='dmpo': there is no such stage; give 'sft' or 'preference'"):
        dmpo.train(PreparedData.load("runs/data"), stage="dmpo")
    with pytest.raises(UserError, match=r"train\.negatives: settings say 3, the call says 4 \(negatives\); leave one"):
        dmpo.train(data, negatives=4, settings={"train.negatives": 3})
    settings = {"train": {"negatives": 3}, "objective.name": "ipo", "model.path": "b", "data": {"path": "other"}}
    for arguments, key, name in (
        ({"negatives": 4}, "train.negatives", "negatives"), ({"objective": "sdpo"}, "objective.name", "objective"),
        ({"model": "a"}, "model.path", "model"), ({}, "data.path", "data"), ({"folder": "a"}, "output_dir", "folder"),
    ):  # fmt: skip
        said = settings if key != "output_dir" else {key: "b"}
        with pytest.raises(UserError, match=rf"{key}: settings say .*, the call says .* \({name}\); leave one out"):
            dmpo.train(data, **arguments, settings={k: v for k, v in said.items() if key.startswith(k)})
    with pytest.raises(UserError, match=r"evaluation.baselines: settings say \[\], the call says \['oracle'\]"):
        dmpo.evaluate(data, {}, baselines=["oracle"], settings={"evaluation": {"baselines": []}})
    with pytest.raises(UserError, match="seed: settings say 2, the call says 1"):
        dmpo.prepare(shop(), columns=COLUMNS, seed=1, settings={"seed": 2})
    with pytest.raises(UserError, match=r"settings say 'x.csv', the call says .*the data frame log.* \(log\); leave"):
        dmpo.prepare(shop(), columns=COLUMNS, settings={"data.source.path": "x.csv"})
    with pytest.raises(UserError, match="after filtering:\n  640 interactions of 80 users"):
        dmpo.prepare(shop(), columns=COLUMNS, settings={"data.source": {"untitled": 0.1}, "data": {"min_history": 99}})
    with pytest.raises(UserError, match="objective='sdpo', negatives=7: have no effect on stage='sft'"):
        dmpo.train(data, stage="sft", objective="sdpo")
    with pytest.raises(UserError, match="models: give each model a name"):
        dmpo.evaluate(data, "runs/sft/model")


def test_the_face_is_light_and_whole():
    command = "import sys, dmpo_dist; "
    command += "print('torch' in sys.modules, [n for n in dmpo_dist.__all__ if not getattr(dmpo_dist, n)])"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False []"


@pytest.mark.parametrize("make", [dmpo.Dmpo, dmpo.Sdpo, dmpo.DpoPairs])
def test_the_loss_on_plain_tensors_is_the_formula(make):
    policy = [
        torch.tensor([-5.0, -6.0, -9.0], dtype=torch.float64, requires_grad=True),
        torch.tensor([-2.0, -1.0]).double(),
    ]
    reference = [torch.tensor([-5.5, -5.0, -8.0]).double(), torch.tensor([-2.5, -2.0]).double()]
    rewards = [0.5 * (p - r) for p, r in zip(policy, reference, strict=True)]
    formulas = {
        dmpo.Dmpo: lambda r: torch.nn.functional.softplus(r[1:].mean() - r[0]),
        dmpo.Sdpo: lambda r: torch.nn.functional.softplus(r[1:].logsumexp(0) - r[0]),
        dmpo.DpoPairs: lambda r: torch.nn.functional.softplus(r[1:] - r[0]).mean(),
    }
    expected = sum(formulas[make](r) for r in rewards) / 2
    torch.testing.assert_close(dmpo.preference_loss(policy, reference, make(beta=0.5)), expected)
    with pytest.raises(ValueError, match="needs reference"):
        dmpo.preference_loss(policy, None, make(beta=0.5))
    with pytest.raises(ValueError, match="reference has groups"):
        dmpo.preference_loss(policy, reference[:1], make())
    with pytest.raises(ValueError, match="give lengths"):
        dmpo.preference_loss(policy, reference, make(length_normalize=True))
