"""What the command line says to bad input: one message that names what is wrong, status 2, and nothing lost.

Most mistakes are found before any worker starts and before the run folder exists, so these cases call ``main`` in this
process; the three that only a worker can find start a real rank, as torchrun does.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from processes import as_rank
from safetensors.torch import load_file, save_file
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from dmpo_dist.cli import main
from dmpo_dist.cluster import train as ray_train
from dmpo_dist.commands.scored_parts import PARTS
from dmpo_dist.config import TemplateConfig
from dmpo_dist.modeling.backbone import write_stamp

pytestmark = pytest.mark.integration

EVENTS = [(f"u{u}", f"i{(u + 3 * n) % 20}", "5", str(100 * n + u)) for u in range(20) for n in range(8)]
TITLE = {item: f"Title {item}" for _, item, _, _ in EVENTS}
HEADER = "user,item,rating,timestamp,title"


def log_text(events=EVENTS, titles=TITLE) -> str:
    return "\n".join([HEADER, *(",".join([*event, titles[event[1]]]) for event in events)]) + "\n"


def with_rating(row: int, rating: str) -> list[tuple[str, ...]]:
    """The events with another rating in row ``row`` of the file, whose header is row 1."""
    return [(*e[:2], rating, e[3]) if number == row else e for number, e in enumerate(EVENTS, start=2)]


@pytest.fixture(scope="module")
def mistakes(world, tmp_path_factory) -> Path:
    """The world's data and model, and one broken copy for each mistake."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name in ("data", "model"):
        shutil.copytree(world.folder / name, folder / name)
    write_tables(folder)
    write_broken_data(folder)
    write_broken_models(folder)
    (folder / "old").mkdir()
    (folder / "old/notes.txt").write_text("a note")
    (folder / "v2.yaml").write_text("version: 2\n")
    (folder / "typo.yaml").write_text("train:\n  learning_rat: 1\n")
    (folder / "broken.yaml").write_text("train: [1\n")
    managed = {
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": True,
        "zero_optimization": {"stage": 0},
    }
    (folder / "managed.json").write_text(json.dumps(managed))
    (folder / "no_stage.json").write_text(
        json.dumps(managed | {"managed_gradient_accumulation": False, "zero_optimization": {}})
    )
    return folder


def write_tables(folder: Path) -> None:
    texts = {
        "good": log_text(),
        "columns": log_text().replace("item", "movie", 1),
        "rating": log_text(with_rating(7, "good")),
        "no_title": log_text(titles=TITLE | {"i4": "", "i5": ""}),
        "same_title": log_text(titles=TITLE | {"i4": TITLE["i3"]}),
        "short": log_text(EVENTS[::8]),
        "single": log_text([*EVENTS, ("loner", "i1", "5", "150")]),
    }
    for name, text in texts.items():
        (folder / f"{name}.csv").write_text(text)
    rows = [
        {"prompt": "Next?", "chosen": "a", "rejected": ["b"]},
        {"prompt": "Next?", "chosen": "a", "rejected": ["c", "a"]},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_broken_data(folder: Path) -> None:
    shutil.copytree(folder / "data", folder / "data_cut")
    arrow = next((folder / "data_cut/train").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:200])
    shutil.copytree(folder / "data", folder / "data_v9")
    card = json.loads((folder / "data/dataset.json").read_text())
    (folder / "data_v9/dataset.json").write_text(json.dumps(card | {"format_version": 9}))


def write_broken_models(folder: Path) -> None:
    model = folder / "model"
    for name in (
        "no_weights",
        "cut",
        "bad_config",
        "no_type",
        "no_tokenizer",
        "bad_tokenizer",
        "no_end",
        "stamped",
        "nan",
    ):
        shutil.copytree(model, folder / name)
    (folder / "no_weights/model.safetensors").unlink()
    (folder / "cut/model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-100])
    (folder / "bad_config/config.json").write_text('{"model_type": ')
    (folder / "no_type/config.json").write_text('{"hidden_size": 16}')
    for file in (folder / "no_tokenizer").glob("token*"):
        file.unlink()
    (folder / "bad_tokenizer/tokenizer.json").write_text("{")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (folder / "no_end/tokenizer_config.json").write_text(
        json.dumps({key: value for key, value in settings.items() if key != "eos_token"})
    )
    write_stamp(folder / "stamped", TemplateConfig(request="Next:\n"), stage="sft")
    weights = load_file(model / "model.safetensors")
    save_file(
        {n: torch.full_like(t, torch.nan) for n, t in weights.items()},
        folder / "nan/model.safetensors",
        {"format": "pt"},
    )
    shutil.copytree(model, folder / "bad_stamp")
    (folder / "bad_stamp/dmpo.json").write_text('{"template": {"preambel": ""}}')
    (folder / "half_adapter").mkdir()
    (folder / "half_adapter/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model)}))
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    tiny_model("mistral", vocab=vocab, window=16).save_pretrained(folder / "window")
    for file in model.glob("token*"):
        shutil.copy(file, folder / "window")


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def dmpo(mistakes, tmp_path, monkeypatch, capfd):
    """Runs a command line in this process: (status, output, errors). No file of ``mistakes`` may change."""

    def no_cluster(*_):
        raise AssertionError("the mistake should have been found before a worker starts")

    monkeypatch.setattr(ray_train, "ray_session", no_cluster)
    monkeypatch.delenv("RANK", raising=False)

    def call(arguments: str) -> tuple[int, str, str]:
        filled = arguments.format(bad=mistakes, out=tmp_path)
        monkeypatch.setattr(sys, "argv", ["dmpo", *filled.split()])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code, *capfd.readouterr()

    before = contents(mistakes)
    yield call
    assert contents(mistakes) == before


def check_refused(status: int, errors: str, words: tuple[str, ...], folders: dict[str, Path]) -> None:
    """One message that names what the user has to know; ``folders`` fill placeholders in ``words``."""
    assert status == 2, errors[-3000:]
    assert "Traceback" not in errors
    message = errors[errors.index("error: ") :]
    assert message.count("error: ") == 1
    for word in words:
        assert word.format(**folders) in message, message


CSV = "data prepare data.path={out}/run data.source.kind=csv data.negatives_per_group=4 data.evaluation_negatives=4"
PREFERENCES = "data prepare data.path={out}/run data.source.kind=preferences"
TRAIN = "train data.path={bad}/data model.max_length=128 train.negatives=3 output_dir={out}/run"
MODEL = TRAIN + " model.path={bad}/model"
SFT = MODEL.replace("train", "sft", 1)
EVALUATE = "evaluate data.path={bad}/data model.max_length=128 output_dir={out}/run"

REFUSED = {
    # interactions and preference rows
    "no_file": (CSV + " data.source.path={bad}/none.csv", ("{bad}/none.csv", "no such file", "data.source.path")),
    "unreadable_file": (CSV + " data.source.path={bad}/old", ("{bad}/old", "cannot be read", "correct the path")),
    "no_source": (CSV, ("data.source.path", "set it")),
    "columns": (CSV + " data.source.path={bad}/columns.csv",
                ("no column 'item'", "'movie'", "data.source.columns.item")),
    "rating": (CSV + " data.source.path={bad}/rating.csv", ("rating.csv, row 7", "'good'", "write a number")),
    "no_title": (CSV + " data.source.path={bad}/no_title.csv",
                 ("no_title.csv", "2 items without one", "data.source.untitled=0.05", "add their titles")),
    "same_title": (CSV + " data.source.path={bad}/same_title.csv",
                   ("'i3'", "'i4'", "'Title i3'", "duplicate_titles=merge")),
    "empty_history": (CSV + " data.source.path={bad}/short.csv",
                      ("no train and no test requests", "data.min_history=3")),
    "nothing_left": (
        CSV + " data.source.path={bad}/good.csv data.rating_threshold=6",
        ("0 likes (rating >= data.rating_threshold=6)", "loosen data.rating_threshold"),
    ),
    "more_negatives_than_items": (
        CSV.replace("group=4", "group=99") + " data.source.path={bad}/good.csv",
        ("99 negatives are asked for", "lower data.negatives_per_group"),
    ),
    "positive_is_negative": (PREFERENCES + " data.source.path={bad}/rows.jsonl",
                             ("rows.jsonl, row 2", "'a'", "remove it")),
    "prepare_over_folder": (
        CSV.replace("{out}/run", "{bad}/old") + " data.source.path={bad}/good.csv",
        ("{bad}/old", "exists already", "choose another data.path"),
    ),
    "prepare_below_file": (
        CSV.replace("{out}/run", "{bad}/v2.yaml/run") + " data.source.path={bad}/good.csv",
        ("v2.yaml/run", "cannot be written", "choose another"),
    ),
    # configuration
    "other_version": (TRAIN + " -c {bad}/v2.yaml", ("v2.yaml", "version 2", "reads version 1", "update the file")),
    "unknown_key": (TRAIN + " -c {bad}/typo.yaml",
                    ("typo.yaml", "train.learning_rat", "nearest known key is train.learning_rate")),
    "unknown_override": (TRAIN + " train.lr=1", ("train.lr", "nearest known key")),
    "bad_value": (TRAIN + " train.negatives=0", ("train.negatives", "greater than or equal to 1", "0")),
    "no_value": (TRAIN + " train.negatives", ("'train.negatives'", "key=value")),
    "broken_yaml": (TRAIN + " -c {bad}/broken.yaml", ("broken.yaml", "not valid YAML")),
    "unknown_recipe": (TRAIN + " -c movielense", ("movielense", "movielens, ", "quickstart")),
    "unknown_option": (TRAIN + " --resum", ("--resum", "dmpo train --help")),
    "unknown_command": ("trian", ("trian", "dmpo --help")),
    # prepared data
    "no_data": ("train output_dir={out}/run", ("data.path is not set", "dmpo data prepare")),
    "not_prepared": (TRAIN + " data.path={bad}/old", ("{bad}/old", "dataset.json", "dmpo data prepare")),
    "nowhere": (TRAIN + " data.path={bad}/none", ("{bad}/none", "dmpo data prepare")),
    "damaged_data": (TRAIN + " data.path={bad}/data_cut", ("data_cut: damaged", "train/", "dmpo data prepare")),
    "other_format": (TRAIN + " data.path={bad}/data_v9",
                     ("data_v9/dataset.json", "version 9", "prepare the data again")),
    "more_negatives_than_stored": (MODEL + " train.negatives=7", ("train.negatives=7", "6", "lower train.negatives")),
    # models
    "unknown_model": (TRAIN + " model.path={bad}/none", ("{bad}/none", "model.path", "hub id")),
    "model_is_a_file": (TRAIN + " model.path={bad}/v2.yaml", ("v2.yaml", "config.json", "model folder")),
    "no_weights": (TRAIN + " model.path={bad}/no_weights", ("no_weights", "no weights", "safetensors")),
    "damaged_weights": (TRAIN + " model.path={bad}/cut", ("cut/model.safetensors", "damaged", "copy")),
    "damaged_config": (TRAIN + " model.path={bad}/bad_config", ("bad_config/config.json", "JSON")),
    "config_without_type": (TRAIN + " model.path={bad}/no_type", ("no_type", "model_type")),
    "no_tokenizer": (TRAIN + " model.path={bad}/no_tokenizer", ("no_tokenizer", "tokenizer", "tokenizer.json")),
    "damaged_tokenizer": (TRAIN + " model.path={bad}/bad_tokenizer", ("bad_tokenizer", "tokenizer")),
    "no_end_token": (TRAIN + " model.path={bad}/no_end", ("no end token", "template.terminator")),
    "damaged_stamp": (TRAIN + " model.path={bad}/bad_stamp", ("bad_stamp/dmpo.json", "preambel")),
    "adapter_without_weights": (TRAIN + " model.path={bad}/half_adapter",
                                ("half_adapter", "no weights", "safetensors")),
    "template_mismatch": (
        TRAIN + " model.path={bad}/stamped template.preamble=Liked:",
        ("{bad}/stamped", "template.preamble", "leave the template out"),
    ),
    "over_context": (MODEL + " model.max_length=257", ("model.max_length=257", "context of 256", "lower it")),
    # running
    "fewer_groups_than_ranks": (
        MODEL + " train.global_batch_size=2 cluster.workers=2",  # an odd number of groups leaves one alone
        ("train.global_batch_size=2", "a step of 1", "2 workers", "cluster.workers"),
    ),
    "unknown_deepspeed": (MODEL + " deepspeed=nope", ("deepspeed=nope", "zero2", ".json")),
    "managed_accumulation": (
        MODEL + " deepspeed={bad}/managed.json",
        ("managed.json", '"managed_gradient_accumulation": false'),
    ),
    "deepspeed_without_stage": (MODEL + " deepspeed={bad}/no_stage.json",
                                ("no_stage.json", "zero_optimization", "stage")),
    "existing_output": (MODEL + " output_dir={bad}/old", ("output_dir {bad}/old", "choose another", "--resume")),
    "output_is_a_file": (MODEL + " output_dir={bad}/v2.yaml", ("output_dir {bad}/v2.yaml", "choose another")),
    "output_below_file": (MODEL + " output_dir={bad}/v2.yaml/run",
                          ("v2.yaml/run", "cannot be written", "choose another")),
    "resume_of_nothing": (MODEL + " --resume", ("--resume", "{out}/run", "start it without --resume")),
    # evaluation
    "evaluate_no_data": ("evaluate output_dir={out}/run", ("data.path is not set", "dmpo data prepare")),
    "evaluate_no_model": (EVALUATE + " -m a={bad}/none", ("{bad}/none", "--model", "hub id")),
    "evaluate_without_name": (EVALUATE + " -m {bad}/model", ("--model", "NAME=FOLDER")),
    "evaluate_name_twice": (EVALUATE + " -m a={bad}/model -m a={bad}/stamped", ("--model a=", "twice")),
    "evaluate_seed_and_none": (EVALUATE + " -m a={bad}/model -m a@1={bad}/model", ("--model a=", "a@1", "a seed")),
    "evaluate_against_nobody": (EVALUATE + " --against b -m a={bad}/model", ("--against b", "item_knn", "a")),
    "evaluate_no_rectools": (
        EVALUATE + " evaluation.baselines=[ease] evaluation.baseline_environment={bad}",
        ("evaluation.baseline_environment={bad}", "no environment with RecTools"),
    ),
    "evaluate_taken_name": (EVALUATE + " -m oracle={bad}/model", ("--model oracle=", "baseline")),
    "evaluate_damaged_weights": (EVALUATE + " -m a={bad}/cut", ("cut/model.safetensors", "damaged")),
    "evaluate_template_mismatch": (
        EVALUATE + " -m a={bad}/stamped template.request=Then:",
        ("{bad}/stamped", "template.request", "leave the template out"),
    ),
    "evaluate_over_context": (EVALUATE + " -m a={bad}/model model.max_length=512", ("model.max_length=512", "256")),
    "evaluate_existing_output": (EVALUATE + " output_dir={bad}/old", ("output_dir {bad}/old", "choose another")),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_before_anything_is_written(dmpo, mistakes, tmp_path, arguments, words):
    status, _, errors = dmpo(arguments)
    check_refused(status, errors, words, {"bad": mistakes, "out": tmp_path})
    assert not list(tmp_path.iterdir()), "so that the mended command runs as it is"


SCORING = {
    "two_part": (
        "a={bad}/window model.attention=two_part",
        ("model.attention=two_part", "sliding window of 16", "auto"),
    ),
    "not_finite": ("a={bad}/nan", ("--model a=", "{bad}/nan", "nan")),
    "prompt_over_max_length": (
        "a={bad}/model model.max_length=16",
        ("model.max_length=16", "raise model.max_length"),
    ),
}


@pytest.mark.parametrize(("arguments", "words"), SCORING.values(), ids=SCORING.keys())
def test_refused_while_scoring(dmpo, mistakes, tmp_path, arguments, words):
    status, _, errors = dmpo(f"{EVALUATE} -m {arguments}")
    check_refused(status, errors, words, {"bad": mistakes, "out": tmp_path})
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        ".lock", "config.yaml", "environment.json", "evaluate.json", PARTS,
    }  # fmt: skip
    assert [path.name.partition("-")[0] for path in (tmp_path / "run" / PARTS).iterdir()] == ["baselines"]


def test_a_user_with_one_interaction_is_counted(dmpo):
    status, output, errors = dmpo(CSV + " data.source.path={bad}/single.csv")
    assert (status, errors) == (0, "")
    assert "1 users with one interaction give no request" in output


def test_another_configuration_is_not_resumed(dmpo, mistakes, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("seed: 1\n")
    status, _, errors = dmpo(MODEL + " --resume")
    check_refused(status, errors, ("--resume", "{out}/run/config.yaml", "same settings"), {"out": tmp_path})
    assert (tmp_path / "run/config.yaml").read_text() == "seed: 1\n"


SHORT = " sft.steps=3 sft.global_batch_size=8 sft.log_every=1 deepspeed=zero0"
IN_A_WORKER = {
    "nan_loss": (SFT + SHORT + " sft.learning_rate=1e30",
                 ("the loss became nan", "sft.learning_rate (now 1e+30)", "{out}/run")),
    "no_such_layers": (SFT + SHORT + " model.lora.target_modules=[nope]",
                       ("model.lora.target_modules=['nope']", "not found")),
    "prompt_over_max_length": (SFT + SHORT + " model.max_length=16",
                               ("user 'u", "model.max_length=16", "raise model.max_length")),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "words"), IN_A_WORKER.values(), ids=IN_A_WORKER.keys())
def test_refused_by_a_worker(mistakes, tmp_path, arguments, words):
    rank = as_rank() | {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}
    done = subprocess.run(
        [sys.executable, "-m", "dmpo_dist", *arguments.format(bad=mistakes, out=tmp_path).split()],
        env=rank, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.stderr.startswith("error: "), done.stderr
    check_refused(done.returncode, done.stderr, words, {"out": tmp_path})
    assert not (tmp_path / "run/model").exists()
    failure = ProcessFailure(0, 1, done.returncode, rank["TORCHELASTIC_ERROR_FILE"])
    assert f"traceback : {done.stderr.splitlines()[0]}" in str(ChildFailedError("dmpo_dist", {0: failure}))
