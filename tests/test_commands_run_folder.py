"""Going on with a run: what may change, what may not, and what damage does not stop it."""

import io
import json
import shutil
import sys
from dataclasses import replace
from unittest.mock import Mock

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from processes import as_rank
from rich.console import Console
from test_training_state_files import trained

from dmpo_dist.artifacts.digest import damage, digests_of
from dmpo_dist.artifacts.environment import Environment
from dmpo_dist.artifacts.locks import only_one
from dmpo_dist.artifacts.log import METRICS_FILE, StartRecord
from dmpo_dist.cli import main
from dmpo_dist.cli.options import read_run_settings
from dmpo_dist.commands.run_folder import last_checkpoint, open_run_folder
from dmpo_dist.commands.train import one_writer, preflight, run_stage
from dmpo_dist.config import RunConfig, config_of, dump_config
from dmpo_dist.data.folder import check
from dmpo_dist.data.store import PreparedData
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.backbone import find_model, write_stamp
from dmpo_dist.modeling.model_files import start_digests, written_digests
from dmpo_dist.training.engine import ZERO_NUMBERS, resolve_config

pytestmark = pytest.mark.usefixtures("one_rank")


def settings(world, tmp_path, **changes):
    base = {"data.path": world.folder / "data", "model.path": str(world.adapter), "output_dir": tmp_path / "run"}
    base |= {"train.negatives": 3, "train.steps": 10, "train.global_batch_size": 8, "model.max_length": 256}
    return config_of(base | {key.replace("__", "."): value for key, value in changes.items()})


FREE = {
    "cluster.workers": 3, "cluster.cpus_per_worker": 0.5, "cluster.max_failures": 7,
    "cluster.storage_path": "elsewhere",
    "train.log_every": 3, "train.keep_checkpoints": 5, "train.checkpoint_every": 4, "train.token_budget": 999,
    "evaluation.bootstrap_samples": 500, "evaluation.baselines": ["random"], "sft.steps": 3, "sft.learning_rate": 1.0,
    "deepspeed": "zero3", "train.steps": 20, "tracking.name": "another",
    "data.negatives_per_group": 9, "data.source.kind": "csv",  # the data is there, and it is checked itself
}  # fmt: skip
FIXED = {
    "seed": 1, "train.negatives": 2, "train.steps": 9, "train.learning_rate": 1.0, "objective.beta": 0.3,
    "train.global_batch_size": 4, "model.dtype": "bfloat16", "data.shots": 20, "train.select": "last",
    "template.preamble": "x", "model.max_length": 250,
}  # fmt: skip


@pytest.fixture
def begun(world, tmp_path):
    return preflight("preference", settings(world, tmp_path), resume=False)


@pytest.mark.parametrize("key", FREE)
def test_keys_that_change_no_number_may_change(world, tmp_path, begun, key):
    again = preflight("preference", settings(world, tmp_path, **{key: FREE[key]}), resume=True)
    assert (again.run_id, again.inputs) == (begun.run_id, begun.inputs)


@pytest.mark.parametrize("key", FIXED)
def test_other_keys_may_not(world, tmp_path, begun, key):
    with pytest.raises(UserError, match=rf"differs from .* in .*\b{key}\b"):
        preflight("preference", settings(world, tmp_path, **{key: FIXED[key]}), resume=True)


def test_another_optimizer_is_another_run(world, tmp_path, begun):
    content = {
        "gradient_accumulation_steps": 1, "managed_gradient_accumulation": False, "zero_optimization": {"stage": 1},
        "optimizer": {"type": "SGD", "params": {"lr": "auto"}},
    }  # fmt: skip
    (tmp_path / "sgd.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"differs from .* in deepspeed \(optimizer\.type, .*params\.betas"):
        preflight("preference", settings(world, tmp_path, deepspeed=str(tmp_path / "sgd.json")), resume=True)


def test_an_edited_deepspeed_file_is_another_run_by_what_decides_numbers(world, tmp_path, begun):
    """Its path is the same; the log says by what the run was trained."""
    file, given = tmp_path / "own.json", {"deepspeed": str(tmp_path / "own.json")}

    def write(stage=1, **optimizer):
        content = {
            "gradient_accumulation_steps": 1, "managed_gradient_accumulation": False,
            "zero_optimization": {"stage": stage}, "amp": {"enabled": False},
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}} | optimizer,
        }  # fmt: skip
        file.write_text(json.dumps(content))

    def again(**changes):
        write(**changes)
        return preflight("preference", settings(world, tmp_path, **given), resume=True)

    write()
    trained_by = resolve_config(str(file), begun.stage, "float32", 1, 0)
    del trained_by["amp"]
    start = {"kind": "start", "stage": "preference", "steps": 10, "deepspeed": trained_by}
    (begun.output / "metrics.jsonl").write_text(json.dumps(start) + "\n")
    assert again(stage=3).config.deepspeed == str(file), "switched off is as good as left out"
    with pytest.raises(UserError, match=r"in deepspeed \(optimizer\.type\); resume with the same"):
        again(type="SGD")
    with pytest.raises(UserError, match=r"in deepspeed \(optimizer\.params\.weight_decay\)"):
        again(params={"lr": "auto"})
    assert again(stage=0).run_id == begun.run_id


def test_a_deepspeed_file_trains_by_the_values_of_the_configuration(tmp_path):
    def resolved(**changes):
        content = {
            "gradient_accumulation_steps": 1, "managed_gradient_accumulation": False, "zero_optimization": {"stage": 1},
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.5}},
        }  # fmt: skip
        (tmp_path / "mine.json").write_text(json.dumps(content | changes))
        stage = config_of({"train.weight_decay": 0.5, "train.max_grad_norm": 0.7}).train
        return resolve_config(str(tmp_path / "mine.json"), stage, "bfloat16", 2, 1000)

    whole = resolved()
    assert (whole["gradient_clipping"], whole["bf16"], whole["fp16"]) == (0.7, {"enabled": True}, {"enabled": False})
    fields = DeepSpeedZeroConfig.model_fields.items()
    numbers = {field.alias or name for name, field in fields if field.annotation is int}
    assert {name for name in (field.alias or name for name, field in fields) if ZERO_NUMBERS.search(name)} == numbers
    unused = {"stage": 2, "ignore_unused_parameters": False, "offload_optimizer": {"device": "cpu"}}
    assert resolved(zero_optimization=unused)["zero_optimization"] == unused
    for changes, words in (
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 0.5}}},
            "optimizer.params.lr is 0.5, but the stage's learning",
        ),
        ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0, but the stage's max_grad_norm says 0.7; write .auto."),
        ({"bf16": {"enabled": False}}, "bf16.enabled is False, but model.dtype says True"),
        ({"optimizer": None}, r"must set an optimizer, as in .optimizer.: {.type.: .AdamW.,"),
        ({"zero_optimization": {}}, r'must set "zero_optimization": {"stage": 0, 1, 2 or 3}'),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}},
            r"reduce_bucket_size is .big., which is",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": "cpu"}},
            r"offload_param is .cpu.; write a map",
        ),
    ):
        with pytest.raises(UserError, match=words):
            resolved(**changes)


def test_other_data_at_the_same_path_is_found(world, tmp_path, begun):
    file = begun.output / "environment.json"
    file.write_text(file.read_text().replace(world.data.fingerprint, "0" * 64))
    with pytest.raises(UserError, match="does not hold the data that .* began with"):
        preflight("preference", settings(world, tmp_path), resume=True)


def test_another_starting_model_is_found(world, tmp_path, begun):
    file = begun.output / "environment.json"
    content = json.loads(file.read_text())
    assert set(content["start_digests"]) > {"adapter/adapter_model.safetensors", "base/model.safetensors"}
    content["start_digests"]["base/model.safetensors"] = "0" * 32
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="base/model.safetensors of the starting model"):
        preflight("preference", settings(world, tmp_path), resume=True)
    assert start_digests(find_model(str(world.model))).keys() >= {"base/config.json", "base/tokenizer.json"}


def test_a_torn_environment_is_made_again_from_the_checkpoints(world, tmp_path, begun):
    file = begun.output / "environment.json"
    whole = Environment.read(begun.output)
    trained(begun.output / "checkpoints", job=begun)
    for folder in [*(begun.output / "checkpoints").iterdir()]:  # as Ray names them, in a folder that was moved since
        folder.rename(folder.with_name(f"before-{begun.run_id}-{folder.name}-abcdef"))
    (begun.output / "metrics.jsonl").write_text('{"kind": "checkpoint", "step": 3}\n')
    for torn in ("", file.read_text()[:60]):
        file.write_text(torn)
        again = preflight("preference", settings(world, tmp_path), resume=True)
        assert (again.run_id, again.inputs, again.checkpointed) == (begun.run_id, begun.inputs, 3)
        assert Environment.read(begun.output).start_digests == whole.start_digests
    trained(begun.output / "checkpoints", steps=(9,), job=replace(begun, run_id="another"))
    file.write_text("")
    with pytest.raises(UserError, match="environment.json: damaged"):
        preflight("preference", settings(world, tmp_path), resume=True)
    assert last_checkpoint(begun.output) == 3


def test_a_finished_run_is_not_trained_again(world, tmp_path, monkeypatch):
    """As of a Slurm job that comes back from the queue; a damaged model is made again, and more steps are trained."""
    monkeypatch.setattr("dmpo_dist.commands.train.RunLog", Mock(side_effect=AssertionError("trained again")))
    for name, value in as_rank().items():
        monkeypatch.setenv(name, value)
    begun = preflight("preference", settings(world, tmp_path), resume=False)
    log = [
        {"kind": "start", "stage": "preference", "steps": 10},
        {"kind": "end", "selected_step": 10, "model": "model"},
    ]
    (begun.output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    with pytest.raises(AssertionError, match="trained again"):
        run_stage("preference", begun.config, Console(quiet=True), resume=True)  # there is no model
    model = shutil.copytree(world.adapter, begun.output / "model")
    write_stamp(model, begun.config.template, stage="train", start=begun.start, digests=written_digests(model))
    said = io.StringIO()
    run_stage("preference", begun.config, Console(file=said), resume=True)
    assert "nothing is left to train" in said.getvalue()
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(AssertionError, match="trained again"):
        run_stage("preference", begun.config, Console(quiet=True), resume=True)
    shutil.copytree(world.adapter, model, dirs_exist_ok=True)
    with pytest.raises(AssertionError, match="trained again"):
        run_stage("preference", settings(world, tmp_path, train__steps=12), Console(quiet=True), resume=True)


def test_one_writer_a_run_and_left_overs_go(begun):
    left = [begun.output / ".best.123.part", begun.output / ".config.yaml.7.part"]
    left[0].mkdir()
    left[1].touch()
    with one_writer(begun):
        assert not any(path.exists() for path in left)
        assert (begun.output / "config.yaml").exists()
        with pytest.raises(UserError, match=r"run: process \d+ on .* is at work there"), only_one(begun.output):
            pass
    with one_writer(begun):
        pass


@pytest.mark.parametrize("file", ["train/data-00000-of-00001.arrow", "items.parquet", "interactions.parquet"])
def test_prepared_data_that_changed_is_refused(world, tmp_path, file):
    data = shutil.copytree(world.folder / "data", tmp_path / "data")
    content = bytearray((data / file).read_bytes())
    content[len(content) // 2] ^= 1
    (data / file).write_bytes(content)
    with pytest.raises(UserError, match=f"{file} is not what was written"):
        PreparedData.load(data)


def test_a_check_computes_the_fingerprint_again(world, tmp_path):
    """Also of data whose card, of an earlier version, has no digests."""
    data = shutil.copytree(world.folder / "data", tmp_path / "data")
    card = json.loads((data / "dataset.json").read_text())
    del card["digests"]
    (data / "dataset.json").write_text(json.dumps(card))
    check(data, echo=lambda line: None)
    shutil.rmtree(data / "train")
    rows = world.data.train.to_list()
    rows[3]["negatives"] = rows[3]["negatives"][::-1]
    type(world.data.train).from_list(rows, features=world.data.train.features).save_to_disk(str(data / "train"))
    with pytest.raises(UserError, match="its content has the fingerprint"):
        check(data, echo=lambda line: None)


def test_digests_name_the_file_that_changed(tmp_path):
    (tmp_path / "below").mkdir()
    for name in ("a", "below/b"):
        (tmp_path / name).write_text(name)
    written = digests_of(tmp_path)
    assert list(written) == ["a", "below/b"]
    assert damage(tmp_path, written) == ""
    (tmp_path / "below/b").write_text("c")
    assert damage(tmp_path, written).startswith("below/b is not what was written")
    (tmp_path / "a").unlink()
    assert damage(tmp_path, written) == "a cannot be read: No such file or directory"


def test_the_folder_alone_says_how_a_run_goes_on(world, tmp_path, begun):
    """Wherever it lies by now, and with whatever output_dir it began; keys beside it count, by the rules above."""
    moved = shutil.copytree(begun.output, tmp_path / "moved: here")
    for given in ([str(moved)], [f"output_dir={json.dumps(str(moved))}"]):
        found = read_run_settings(None, given, resume=True, dry_run=False)
        assert found == begun.config.model_copy(update={"output_dir": moved})
    longer = read_run_settings(None, ["train.steps=20", str(begun.output)], resume=True, dry_run=False)
    assert longer.train == begun.config.train.model_copy(update={"steps": 20})
    assert preflight("preference", longer, resume=True).run_id == begun.run_id
    shorter = read_run_settings(None, [str(begun.output), "train.steps=3"], resume=True, dry_run=False)
    with pytest.raises(UserError, match=r"differs from .* in train\.steps"):
        preflight("preference", shorter, resume=True)
    with pytest.raises(UserError, match=r"names one run; give no second folder and no output_dir"):
        read_run_settings(None, [str(moved), "output_dir=x"], resume=True, dry_run=False)
    with pytest.raises(UserError, match=r"--resume: .*nowhere holds no run to go on with"):
        read_run_settings(None, [str(tmp_path / "nowhere")], resume=True, dry_run=False)
    (begun.output / "metrics.jsonl").write_text('{"kind": "start", "stage": "train", "steps": 10}\n')
    with pytest.raises(UserError, match="is a run of dmpo train; go on by dmpo train --resume"):
        preflight("sft", begun.config, resume=True)


OF_OTHERS = {
    ("train", "evaluate"): ("evaluate.json", '{"models": {}, "against": [], "catalogue": false}'),
    ("sft", "tune"): ("tune.json", "{}"),
    ("evaluate", "sft"): (METRICS_FILE, StartRecord(stage="sft").model_dump_json() + "\n"),
    ("evaluate", "tune"): ("tune.json", "{}"),
    ("tune", "train"): (METRICS_FILE, StartRecord(stage="preference").model_dump_json() + "\n"),
}


@pytest.mark.parametrize(("command", "other"), OF_OTHERS)
def test_a_run_of_another_command_is_not_gone_on_with(world, tmp_path, monkeypatch, capsys, command, other):
    """`dmpo train` began anew in an evaluation's folder, and `dmpo evaluate` measured no model in a training run's."""
    folder, (file, content) = tmp_path / "run", OF_OTHERS[command, other]
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(settings(world, tmp_path)))
    (folder / file).write_text(content)
    monkeypatch.setattr(sys, "argv", ["dmpo", command, "--resume", str(folder)])
    with pytest.raises(SystemExit) as stopped:
        main()
    told = f"error: --resume: {folder} is a run of dmpo {other}; go on by dmpo {other} --resume\n"
    assert (stopped.value.code, capsys.readouterr().err) == (2, told)
    assert {entry.name for entry in folder.iterdir()} == {"config.yaml", file}


@pytest.mark.parametrize(
    ("command", "other"), [("bench scaling", "train"), ("quickstart", "bench scaling"), ("sft", "train")]
)
def test_a_run_says_by_itself_which_command_began_it(tmp_path, command, other):
    """Before it has left any file of its own."""
    config = RunConfig(output_dir=tmp_path / "run")
    open_run_folder(config, other, resume=False)
    with pytest.raises(UserError, match=rf"is a run of dmpo {other}; go on by dmpo {other} --resume"):
        open_run_folder(config, command, resume=True)
    open_run_folder(config, other, resume=True)
