"""What ``dmpo export`` writes, reloaded in plain transformers, and what it refuses."""

import json
import re
import resource
import shutil
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from worlds import CONTEXT, SETTINGS, save_adapter

from dmpo_dist.artifacts.stamp import ModelStamp
from dmpo_dist.cli import main
from dmpo_dist.commands.export import REQUESTS, _requests, _stamp, export
from dmpo_dist.commands.model_card import _use
from dmpo_dist.config import DataConfig, ModelConfig, RunConfig, TemplateConfig, dump_config
from dmpo_dist.data.prompt_texts import PromptTexts
from dmpo_dist.data.template import make_template
from dmpo_dist.data.tokenization import GroupTokenizer
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.metrics import METRICS
from dmpo_dist.evaluation.ranking import load_ranking_model
from dmpo_dist.modeling.backbone import ModelSource, find_model, load_tokenizer, write_stamp

CONFIG = RunConfig(model=ModelConfig(max_length=CONTEXT))


def copy_of(source, target):
    shutil.copytree(source, target)
    return target


@pytest.fixture(scope="module")
def models(world, tmp_path_factory):
    """A base model that ranks sharply, a run with an adapter on it that ranks otherwise, and broken copies of both."""
    folder = tmp_path_factory.mktemp("models")
    copy_of(world.model, folder / "base")
    weights = load_file(folder / "base/model.safetensors")
    sharper = {name: tensor * (4.0 if tensor.ndim == 2 else 1.0) for name, tensor in weights.items()}
    save_file(sharper, folder / "base/model.safetensors", {"format": "pt"})
    run = folder / "run"
    run.mkdir()
    save_adapter(folder / "base", run / "model", scale=0.3)
    write_stamp(run / "model", TemplateConfig(), stage="train", start=str(folder / "base"), step=3)
    data_of_run = DataConfig.model_validate(SETTINGS | {"path": world.data.path})
    (run / "config.yaml").write_text(dump_config(CONFIG.model_copy(update={"data": data_of_run})))
    environment = {"data_fingerprint": world.data.fingerprint, "git_commit": "abc"}
    (run / "environment.json").write_text(json.dumps(environment))
    value = {"value": 0.5, "low": 0.4, "high": 0.6}
    evaluation = {
        "models": {name: dict.fromkeys(METRICS, value) for name in ("random", "ours")},
        "folders": {"ours": str(run / "model")},
        "requests": 30,
        "negatives": {"fewest": 9, "most": 9},
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    break_models(folder)
    return folder


def break_models(folder):
    """One copy for each mistake."""
    good, base = folder / "run/model", folder / "base"
    whole = copy_of(base, folder / "whole")
    write_stamp(whole, TemplateConfig(), stage="sft")
    (copy_of(good, folder / "no_weights") / "adapter_model.safetensors").unlink()
    cut = copy_of(whole, folder / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    diverged = copy_of(whole, folder / "diverged") / "model.safetensors"
    save_file({n: torch.full_like(t, torch.nan) for n, t in load_file(diverged).items()}, diverged, {"format": "pt"})
    save_file({}, copy_of(good, folder / "empty") / "adapter_model.safetensors")
    assert 8 < (folder / "empty/adapter_model.safetensors").stat().st_size <= 40
    (copy_of(good, folder / "no_stamp") / "dmpo.json").unlink()
    vocab = json.loads((base / "config.json").read_text())["vocab_size"]
    for name, options in (("narrow", {"hidden_size": 16}), ("shallow", {"num_hidden_layers": 1})):
        same = {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 48}
        tiny_model("llama", vocab=vocab, **same | options).save_pretrained(folder / f"base_{name}")
        with_base(copy_of(good, folder / name), folder / f"base_{name}")
    tiny_model("llama", vocab=vocab - 7).save_pretrained(folder / "base_small")
    with_base(copy_of(good, folder / "other_tokenizer"), folder / "base_small")
    with_base(copy_of(good, folder / "base_gone"), folder / "nowhere")
    quantized = copy_of(base, folder / "base_4bit")
    config = json.loads((quantized / "config.json").read_text())
    four_bit = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (quantized / "config.json").write_text(json.dumps(config | four_bit))
    with_base(copy_of(good, folder / "on_4bit"), quantized)
    (folder / "file").write_text("a note")


def with_base(adapter, base):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))


def scores_by_the_card(folder, rows):
    """Candidates' log-probs by the code that the model card shows, which is plain transformers."""
    code = re.search(r"```python\n(.*?)\n```", (folder / "README.md").read_text(), re.S)[1]
    names: dict = {}
    exec(code.replace('folder = "."', f"folder = {str(folder)!r}"), names)
    stamp = json.loads((folder / "dmpo.json").read_text())
    template = make_template(TemplateConfig.model_validate(stamp["template"]), names["tokenizer"])
    scores = []
    for row in rows:
        prompt = template.render(tuple(row["history"])).text
        titles = [row["positive"], *row["negatives"]]
        scores.append(np.array([names["log_prob"](prompt, template.render_response(title)) for title in titles]))
    return scores


def assert_same_ranking(seen, expected, nats):
    """Log-probs within ``nats``, and no two candidates that lie further apart have changed places."""
    for new, old in zip(seen, expected, strict=True):
        np.testing.assert_allclose(new, old, atol=nats)
        gaps_old, gaps_new = old[:, None] - old, new[:, None] - new
        assert (gaps_new[gaps_old > 2 * nats] > 0).all()


@pytest.mark.parametrize(
    ("merge", "dtype", "nats"),
    [(True, "float32", 1e-4), (True, "bfloat16", 0.5), (False, None, 1e-4), (False, "bfloat16", 0.5)],
)
def test_plain_transformers_ranks_alike(world, models, tmp_path, capsys, merge, dtype, nats):
    out = tmp_path / "out"
    difference = export(str(models / "run/model"), out, merge, dtype, data=world.data.path, echo=print)
    rows = world.data.validation.select(range(4))
    expected = load_ranking_model(str(models / "run/model"), CONFIG).score_rows(rows)
    base = load_ranking_model(str(models / "base"), CONFIG).score_rows(rows)
    assert np.abs(np.concatenate(expected) - np.concatenate(base)).max() > 1, "or there is nothing to lose"
    assert_same_ranking(scores_by_the_card(out, rows), expected, nats)
    assert difference.max_nats < nats
    assert (difference.max_nats > 1e-4) == (dtype == "bfloat16")
    assert difference.candidates == 6 * min(REQUESTS, len(world.data.validation))
    assert str(difference) in capsys.readouterr().out
    assert str(difference) in (out / "README.md").read_text()
    assert find_model(str(out)).is_adapter != merge
    assert find_model(str(out)).stamp.digests
    assert_same_ranking(load_ranking_model(str(out), CONFIG).score_rows(rows), expected, nats)


def tied(models, folder, kind):
    """A base with tied embeddings, which the scratch model is too, and its tokenizer."""
    vocab = json.loads((models / "base" / "config.json").read_text())["vocab_size"]
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    tiny_model(kind, vocab=vocab, tie_word_embeddings=True, **({} if kind == "gpt2" else special)).save_pretrained(
        folder
    )
    for file in (models / "base").glob("token*"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("gpt2", {"target_modules": ["wte", "c_attn"]}),
        ("gemma3", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    ],
)
def test_a_merge_into_tied_embeddings_leaves_the_head_as_it_was_trained(models, tmp_path, kind, options):
    base, run = tied(models, tmp_path / "base", kind), tmp_path / "run"
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, task_type="CAUSAL_LM", **options),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(run)
    shutil.copy(base / "tokenizer.json", run)
    shutil.copy(base / "tokenizer_config.json", run)
    write_stamp(run, TemplateConfig(), stage="train", start=str(base))
    difference = export(str(run), tmp_path / "out", merge=True, dtype="float32", echo=lambda _: None)
    assert difference.max_nats < 1e-3
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    head, embedding = again.get_output_embeddings().weight, again.get_input_embeddings().weight
    assert torch.equal(head, AutoModelForCausalLM.from_pretrained(base).get_output_embeddings().weight)
    assert not torch.equal(head, embedding)


def test_an_export_that_ranks_otherwise_is_written_only_where_it_is_asked_for(models, tmp_path):
    """As from 4 bits, where a merge goes into another base than the adapter was trained on; its stamp alone says so."""
    trained = copy_of(models / "run", tmp_path / "run")
    (trained / "config.yaml").unlink()
    stamp = json.loads((trained / "model" / "dmpo.json").read_text())
    (trained / "model" / "dmpo.json").write_text(json.dumps(stamp | {"quantization": "nf4"}))
    pytest.importorskip("bitsandbytes")
    with pytest.raises(UserError, match=r"would rank otherwise: .*another order in .*--accept-difference"):
        export(str(trained / "model"), tmp_path / "out", merge=True, dtype="float32", echo=lambda _: None)
    assert not (tmp_path / "out").exists()
    difference = export(
        str(trained / "model"),
        tmp_path / "out",
        merge=True,
        dtype="float32",
        accept_difference=True,
        echo=lambda _: None,
    )
    assert difference.order_changed
    written = json.loads((tmp_path / "out" / "dmpo.json").read_text())
    assert written["export"]["max_nats"] == difference.max_nats
    assert (written["quantization"], written.get("base_digests")) == ("none", None), "merged weights are on no base"


def test_shards_are_complete(models, tmp_path):
    """As plain transformers sees them; a whole model is exported like a merged one."""
    out = tmp_path / "out"
    export(str(models / "whole"), out, dtype="float32", shard_size="40KB", echo=lambda _: None)
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    files = {file.name for file in out.glob("*.safetensors")}
    assert set(index.values()) == files
    assert len(files) > 2
    stored = {name: tensor for file in files for name, tensor in load_file(out / file).items()}
    assert stored.keys() == index.keys()
    original = load_file(models / "whole/model.safetensors")
    assert stored.keys() == original.keys()
    assert all(torch.equal(stored[name], original[name]) for name in original)
    _, loaded = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loaded.values())
    assert {"README.md", "dmpo.json", "generation_config.json", "tokenizer.json", "config.json"} <= {
        file.name for file in out.iterdir()
    }
    assert load_tokenizer(find_model(str(out))).eos_token == "</s>"


def test_the_card_says_what_is_known_and_what_is_not(models, tmp_path):
    known, bare = tmp_path / "known", tmp_path / "bare"
    with_card = copy_of(models / "run", tmp_path / "run") / "model"
    base = copy_of(models / "base", tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    with_base(with_card, base)
    found = json.loads((models / "evaluation.json").read_text()) | {"folders": {"ours": str(with_card)}}
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    export(str(with_card), known, evaluation=tmp_path / "evaluation.json", echo=lambda _: None)
    text = (known / "README.md").read_text()
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["license"] == "cc-by-4.0"
    assert header["library_name"] == "peft"
    assert {"dmpo", "ranking", "lora"} <= set(header["tags"])
    shown = ["ndcg@10", "hr@1", "hr@5", "mrr", "auc"]  # hr@10 is 1 in any order
    assert header["metrics"] == shown
    (results,) = header["model-index"]
    figures = [(metric["type"], metric["value"]) for metric in results["results"][0]["metrics"]]
    assert figures == [(metric, 0.5) for metric in shown]
    for words in (
        "beta 1.0",
        "| model | NDCG@10 | HR@1 | HR@5 | MRR | AUC |",
        "| this model | **0.500** (0.400\u20130.600) |",
        "Made-up users",
        "simulator (80 users",
        "cc-by-4.0",
    ):
        assert words in text
    seeds = {"ours": {"0": dict.fromkeys(METRICS, 0.45), "1": dict.fromkeys(METRICS, 0.55)}}
    of_seeds = found | {"folders": {"ours@0": "elsewhere", "ours@1": str(with_card)}, "seeds": seeds}
    (tmp_path / "evaluation.json").write_text(json.dumps(of_seeds))
    export(str(with_card), tmp_path / "seed", evaluation=tmp_path, echo=lambda _: None)
    card = (tmp_path / "seed" / "README.md").read_text()
    for words in (
        "| this model | **0.550** |",
        "| ours (2 seeds) | 0.500±.071 (0.400\u20130.600)",
        "one seed of several (ours@1)",
    ):
        assert words in card
    assert "recall@10" not in card.split("---\n")[2], "1 in any order of 10 candidates"
    assert "license" not in yaml.safe_load(card_of(models / "whole", bare).split("---\n")[1])
    gaps = card_of(models / "whole", tmp_path / "again").split("## Not known")[1]
    for words in ("base model", "licence", "config.yaml", "environment.json", "dataset.json", "Test metrics"):
        assert words in gaps
    assert str(tmp_path) not in text, "no paths of this machine"
    tuned = copy_of(models / "whole", tmp_path / "tuned")
    write_stamp(tuned, TemplateConfig(), stage="sft", start="Qwen/Qwen3-0.6B")
    assert yaml.safe_load(card_of(tuned, tmp_path / "hub").split("---\n")[1])["base_model"] == "Qwen/Qwen3-0.6B"
    (base / "README.md").write_text("---\nlicense: gemma\nbase_model: google/gemma-3-270m\n---\n")
    write_stamp(tuned, TemplateConfig(), stage="sft", start=str(base))  # a whole model, from a fetched one
    header = yaml.safe_load(card_of(tuned, tmp_path / "fetched").split("---\n")[1])
    assert (header["license"], header["base_model"]) == ("gemma", "google/gemma-3-270m")
    cached = "/cache/hub/models--Qwen--Qwen3-0.6B/snapshots/0123"
    write_stamp(tuned, TemplateConfig(), stage="sft", start=cached)
    assert yaml.safe_load(card_of(tuned, tmp_path / "cached").split("---\n")[1])["base_model"] == "Qwen/Qwen3-0.6B"
    settings = re.compile("^Settings: .*$", re.M)
    assert "negatives 7" in settings.search(text)[0]
    write_stamp(with_card, TemplateConfig(), stage="sft")
    assert "negatives" not in settings.search(card_of(with_card, tmp_path / "likelihood"))[0], "it learned from none"


def card_of(model, out):
    export(str(model), out, echo=lambda _: None)
    return (out / "README.md").read_text()


REFUSED = {
    "no_such_folder": ("{bad}/none {out}/x", ("{bad}/none", "no such model folder")),
    "no_stamp": ("{bad}/no_stamp {out}/x", ("{bad}/no_stamp", "dmpo.json", "runs/dmpo/model")),
    "no_weights": ("{bad}/no_weights {out}/x", ("{bad}/no_weights", "no weights")),
    "truncated": ("{bad}/cut {out}/x", ("{bad}/cut/model.safetensors", "damaged", "Copy it again")),
    "empty_adapter": ("{bad}/empty {out}/x --merge", ("empty/adapter_model.safetensors", "holds no weights", "again")),
    "other_width": (
        "{bad}/narrow {out}/x --merge",
        ("{bad}/narrow", "does not fit {bad}/base_narrow", "size mismatch")),
    "other_depth": ("{bad}/shallow {out}/x", ("{bad}/shallow", "does not fit {bad}/base_shallow", "layers.1")),
    "base_gone": (
        "{bad}/base_gone {out}/x",
        ("base_gone/adapter_config.json", "{bad}/nowhere", "base_model_name_or_path")),
    "not_finite": ("{bad}/diverged {out}/x", ("{bad}/diverged", "not finite", "train it again")),
    "quantized_base": ("{bad}/on_4bit {out}/x --merge", ("{bad}/base_4bit", "quantized", "full-precision")),
    "quantized_base_of_an_adapter": (
        "{bad}/on_4bit {out}/x",
        ("{bad}/base_4bit", "quantized", "base_model_name_or_path")),
    "other_tokenizer": ("{bad}/other_tokenizer {out}/x", ("{bad}/other_tokenizer", "tokenizer", "embedding", "rows")),
    "whole_model_merged": ("{bad}/whole {out}/x --merge", ("--merge", "{bad}/whole", "whole model already")),
    "output_exists": ("{bad}/whole {bad}/file", ("{bad}/file", "exists already", "choose another")),
    "output_below_file": ("{bad}/whole {bad}/file/x", ("{bad}/file/x", "cannot be written", "choose another")),
    "shards_of_an_adapter": ("{bad}/run/model {out}/x --shard-size 5GB", ("--shard-size", "--merge")),
    "shard_size": ("{bad}/whole {out}/x --shard-size 5", ("--shard-size 5", "5GB")),
    "dtype": ("{bad}/whole {out}/x --dtype int8", ("--dtype", "int8", "bfloat16")),
    "no_data": ("{bad}/whole {out}/x --data {bad}/base", ("{bad}/base", "dmpo data prepare")),
    "no_evaluation": (
        "{bad}/whole {out}/x --evaluation {bad}/none",
        ("{bad}/none", "cannot be read", "correct the path")),
    "other_file": ("{bad}/whole {out}/x --evaluation {bad}/file", ("{bad}/file", "dmpo evaluate")),
    "other_model": (
        "{bad}/whole {out}/x --evaluation {bad}/evaluation.json",
        ("ranks no model of {bad}/whole", "ours=")),
}  # fmt: skip


def refused(arguments, folders, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["dmpo", "export", *arguments.format(**folders).split()])
    with pytest.raises(SystemExit) as stop:
        main()
    errors = capfd.readouterr().err
    assert stop.value.code == 2, errors
    assert "Traceback" not in errors
    messages = re.findall(r"^error: .*", errors, re.M | re.S)
    assert len(messages) == 1
    return messages[0]


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_one_message_and_leaves_nothing(models, tmp_path, monkeypatch, capfd, arguments, words):
    folders = {"bad": models, "out": tmp_path}
    message = refused(arguments, folders, monkeypatch, capfd)
    for word in words:
        assert word.format(**folders) in message, message
    assert not list(tmp_path.iterdir())
    assert (models / "file").read_text() == "a note"


def test_a_disk_that_is_full_leaves_nothing(models, tmp_path, monkeypatch, capfd):
    """By a limit on the size of files, which fails in the midst of the weights as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        message = refused("{bad}/whole {out}/x --dtype float32", {"bad": models, "out": tmp_path}, monkeypatch, capfd)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{tmp_path}/x: cannot be written" in message
    assert not list(tmp_path.iterdir())


def test_made_up_requests_have_made_up_fields_and_leave_the_models_own(world):
    config = TemplateConfig(preamble="{age}: ", item="- {title} ({genres})\n", chat="never")
    tokenizer = load_tokenizer(find_model(str(world.model)))
    own = PromptTexts(item_fields=config.item_fields, user_fields=config.user_fields)
    encode = GroupTokenizer(tokenizer, make_template(config, tokenizer), CONTEXT, texts=own)
    assert len(_requests(None, encode).groups) == 8
    assert encode.texts is own
    code, note = _use(encode.template)
    assert "AGE: - First title (GENRES)\\n- Second title (GENRES)\\n" in code
    assert note.endswith("own text for AGE, GENRES.")
    assert len(_use(make_template(TemplateConfig(chat="never"), tokenizer))) == 1


def test_a_start_of_another_machine_is_a_name_and_no_path(tmp_path):
    for start, kept, name in (("/runs/x/sft/model", None, "model"), ("org/base", "org/base", None)):
        source = ModelSource(str(tmp_path), str(tmp_path), False, ModelStamp(start=start))
        stamp = _stamp(source, tmp_path, {"merged": False})
        assert (stamp.start, stamp.start_name) == (kept, name)
