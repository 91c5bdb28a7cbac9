"""The planner against real models, and what must hold of any plan."""

import json
import re
import shutil
from dataclasses import replace
from math import ceil

import pytest
import torch
from conftest import tiny_model
from rich.console import Console
from typer.testing import CliRunner

from dmpo_dist.artifacts.stamp import ModelStamp
from dmpo_dist.cli import app
from dmpo_dist.commands.train import checked_job
from dmpo_dist.config import LoraConfig, ModelConfig, OnPolicyConfig, RunConfig, config_of
from dmpo_dist.data.prepare import prepare
from dmpo_dist.data.template import make_template
from dmpo_dist.data.tokenization import GroupTokenizer, tokenize_rows
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.backbone import find_model, load_policy, load_tokenizer
from dmpo_dist.modeling.logprobs import LogProbModel
from dmpo_dist.modeling.routing import choose_backend, use_backend
from dmpo_dist.planning.command import Request, run_plan, with_length_of_start
from dmpo_dist.planning.compute import compute_factor
from dmpo_dist.planning.flops import forward_flops, shared_work, step_flops
from dmpo_dist.planning.gpus import GPUS, find_gpu
from dmpo_dist.planning.lengths import data_lengths
from dmpo_dist.planning.memory import Zero
from dmpo_dist.planning.model import Row, blueprint
from dmpo_dist.planning.plan import Cluster, Lengths, changed, make_plan, make_rank
from dmpo_dist.planning.recommend import faster, smallest_change
from dmpo_dist.planning.report import BYTES, amount
from dmpo_dist.training.groups import make_schedule
from dmpo_dist.training.listed import listed_groups
from dmpo_dist.training.schedule import total_steps

MIDDLE = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 6, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}  # fmt: skip
LENGTHS = Lengths(prompt=500, response=12, groups=10_000)
ROW = Row(prompt=20, response=5, negatives=3, tokens=144, shared=True)


@pytest.fixture(scope="module")
def middle(tmp_path_factory):
    """A folder with the config.json of a model of 2.4 G parameters."""
    folder = tmp_path_factory.mktemp("middle")
    (folder / "config.json").write_text(json.dumps(MIDDLE))
    return folder


def run_config(folder, lora=True, **model) -> RunConfig:
    adapters = LoraConfig().model_dump() if lora else None
    model = {"path": str(folder), "dtype": "bfloat16", "lora": adapters, "max_length": 1024} | model
    return RunConfig.model_validate({"model": model, "train": {"global_batch_size": 256, "token_budget": 4096}})


def cluster(name="rtx4090-24g", nodes=1) -> Cluster:
    return Cluster(name, find_gpu(name, 8), nodes, 8)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("lora", [None, LoraConfig(r=4), LoraConfig(r=4, variant="dora")])
def test_parameters_are_those_of_the_loaded_model(kind, lora, tmp_path):
    tiny_model(kind).save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), lora=lora, max_length=64)
    model, mode = load_policy(find_model(str(tmp_path)), config)
    plan = blueprint(config)
    assert plan.sizes.total == sum(p.numel() for p in model.parameters())
    assert plan.sizes.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.reference == mode


def test_an_adapter_to_go_on_from_is_there_twice(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    config = ModelConfig(path=str(tmp_path / "base"), lora=LoraConfig(r=4), max_length=64)
    model, _ = load_policy(find_model(config.path), config)
    model.save_pretrained(tmp_path / "adapter")
    config = ModelConfig(path=str(tmp_path / "adapter"), max_length=64)
    model, mode = load_policy(find_model(config.path), config)
    plan = blueprint(config)
    assert plan.reference == mode == "adapter_copy"
    assert plan.sizes.total == sum(p.numel() for p in model.parameters())
    assert plan.sizes.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [None, LoraConfig(r=4)])
def test_what_the_trace_keeps_is_what_autograd_saves(lora, checkpointing, tmp_path):
    """The oracle runs the loaded model on the CPU and adds up the storages that autograd saves."""
    tiny_model("llama").save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), lora=lora, max_length=64, gradient_checkpointing=checkpointing)
    model, _ = load_policy(find_model(str(tmp_path)), config)
    use_backend(model.get_base_model() if lora else model, "two_part")
    module, layout = LogProbModel(model), ROW.layout(97)
    inputs = [*module.parameters(), *vars(layout).values(), *vars(layout.targets).values()]
    given = {x.untyped_storage().data_ptr() for x in inputs if isinstance(x, torch.Tensor)}
    saved: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        log_probs = module(layout)
    trace = blueprint(config).trace(ROW, "two_part", cuda=False, keep_gradients=False)
    angles = (
        2 * ROW.tokens * 8 * 4 if checkpointing else 0
    )  # cosines and sines, kept as an argument to run a layer again
    assert trace.saved == pytest.approx(sum(saved.values()) + angles, rel=0.03)
    assert log_probs.requires_grad


def test_activations_grow_in_proportion_to_the_row(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    plan = blueprint(ModelConfig(path=str(tmp_path), max_length=64))
    one, two, four = (
        plan.trace(replace(ROW, tokens=n * ROW.group_tokens), "two_part", False, False).saved for n in (2, 4, 8)
    )
    assert four - two == pytest.approx(2 * (two - one), rel=1e-3)


@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
def test_shards_sum_to_the_whole(stage, middle):
    """Terms that are divided give, times the ranks, what one rank alone holds; the others stay as they are."""
    config = changed(run_config(middle, lora=False), deepspeed=stage)
    alone, *many = (
        {t.name: t.bytes for t in make_rank(config, ROW, n, cuda=True, backend=None).device_terms()} for n in (1, 2, 8)
    )
    divided = {"AdamW's two moments", "fp32 weights", "gradients, this rank's part"}
    divided |= {"weights", "frozen reference"} if stage == "zero3" else set()
    for n, terms in zip((2, 8), many, strict=True):
        for name in divided:
            assert n * terms[name] == pytest.approx(alone[name], abs=32 * n)
        assert (terms["weights"] == alone["weights"]) == (stage != "zero3")


def test_nf4_takes_what_the_format_says(middle):
    """Per weight 4 bits and a scale for 64: in fp32, or in 8 bits with an fp32 scale for 256 of them."""
    config = run_config(middle)
    sizes = blueprint(config.model).sizes
    for double, bits in ((False, 4 + 32 / 64), (True, 4 + 8 / 64 + 32 / 64 / 256)):
        config = changed(config, model__quantization="nf4", model__double_quantization=double)
        weights = make_rank(config, ROW, 8, True, None).device_terms()[0].bytes
        assert weights == pytest.approx(2 * (sizes.total - sizes.linear) + sizes.linear * bits / 8, rel=1e-6)
    assert sizes.linear == 6 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)


def test_more_gpus_and_smaller_groups_never_cost_more(middle):
    config = changed(run_config(middle), deepspeed="zero3")
    plans = [make_plan(config, cluster("h100-80g", nodes), LENGTHS) for nodes in (1, 2, 4)]
    peaks, speeds = [p.peak for p in plans], [p.groups_per_second for p in plans]
    assert peaks == sorted(peaks, reverse=True)
    assert speeds == sorted(speeds)
    for name, values in {"negatives": (1, 3, 7), "prompt": (100, 300, 900)}.items():
        seconds = []
        for value in values:
            lengths = replace(LENGTHS, prompt=value) if name == "prompt" else LENGTHS
            other = changed(config, train__negatives=value) if name == "negatives" else config
            seconds.append(make_plan(other, cluster("h100-80g"), lengths).seconds)
        assert seconds == sorted(seconds)


def test_time_is_the_flop_models(middle):
    """With LoRA and no recomputation but the head's, a group takes what ``planning.flops`` says and one more head."""
    plan = make_plan(run_config(middle), cluster("h100-80g"), LENGTHS)
    work = shared_work(500, 12, 7)
    expected = step_flops(plan.blueprint.shape, work) + forward_flops(plan.blueprint.shape, work).head
    assert sum(plan.step.flops().values()) == expected
    assert plan.steps == ceil(10_000 / 256)


def test_a_cached_reference_is_one_pass_before_the_first_step(middle):
    """Over the negatives of all epochs, as far as the data has them; with one epoch it is what the steps save."""
    lengths, where = replace(LENGTHS, groups=256 * 40), cluster("h100-80g", nodes=2)
    off = run_config(middle)
    cached = changed(off, reference__cache="disk")
    plain, once = (make_plan(config, where, lengths) for config in (off, cached))
    assert (plain.reference_seconds, "reference" in [part.name for part in once.durations]) == (0, False)
    saved = next(part.seconds for part in plain.durations if part.name == "reference")
    assert once.reference_seconds == pytest.approx(40 * saved)
    assert once.hours == pytest.approx((40 * once.seconds + once.reference_seconds) / 3600)
    two = changed(cached, train__epochs=2.0)
    more = make_plan(changed(cached, train__negatives=14), where, lengths)
    assert make_plan(two, where, lengths).reference_seconds == pytest.approx(more.reference_seconds)
    assert make_plan(two, where, replace(lengths, stored=7)).reference_seconds == pytest.approx(once.reference_seconds)
    assert make_plan(cached, where, lengths, "sft").reference_seconds == 0


def test_a_recommendation_fits_when_planned_again(middle):
    plan = make_plan(run_config(middle, lora=False), cluster(), LENGTHS)
    assert not plan.fits
    advice = smallest_change(plan, LENGTHS)
    assert advice is not None
    overrides = [f"model.path={middle}", "model.dtype=bfloat16", "model.max_length=1024", "train.global_batch_size=256"]
    options = ["--gpu", "rtx4090-24g", "--prompt", "500", "--groups", "10000", "--json"]
    again = CliRunner().invoke(app, ["plan", *options, *overrides, "train.token_budget=4096", *advice.change.keys])
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["peak_bytes"] == advice.plan.peak <= cluster().capacity


def test_what_is_printed_of_a_small_model(middle):
    """Every amount has a unit in which it is not 0.0; assumptions of the cluster and the attention are named."""
    base = ["plan", "-c", "pretrained_lora", f"model.path={middle}", "model.max_length=1024", "--groups", "1000"]
    text = CliRunner().invoke(app, base).stdout
    assert not re.search(r"\b0\.00? [GMK]iB", text), text
    assert "MiB" in text
    assert "assumed, not looked for on this machine: give --gpu and --gpus-per-node" in text
    assert re.search(r"^attention  \w+: .*without masks", text, re.M), text
    assert "assumed, not" not in CliRunner().invoke(app, [*base, "--gpu", "cpu", "--gpus-per-node", "2"]).stdout
    shown = [amount(size, BYTES) for size in (0, 700, 1536 * 2**20, 123 * 2**30)]
    assert shown == ["0 KiB", "0.68 KiB", "1.50 GiB", "123 GiB"]


def test_room_is_used(middle):
    plan = make_plan(run_config(middle, gradient_checkpointing=True), cluster("h200-141g"), LENGTHS)
    assert plan.fits
    advice = faster(plan, LENGTHS)
    assert advice is not None
    assert advice.plan.fits
    assert advice.plan.seconds < plan.seconds
    assert "model.gradient_checkpointing=false" in advice.change.keys


def test_buckets_of_a_configuration_count(middle):
    """ZeRO-2 as shipped overlaps: two buckets of 500 M elements."""
    plan = make_plan(run_config(middle), cluster("h100-80g"), LENGTHS)
    assert plan.zero == Zero(2, False, False, 500_000_000, 2, 1_050_000_000)
    bucket = next(t for t in plan.terms if t.name == "gradient bucket")
    assert bucket.bytes == 2 * 2 * 500_000_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "h200"], "the nearest is h200-141g"),
        (["--nodes", "64"], "raise it to at least 512"),
        (["train.token_budget=100"], "raise it, or lower --prompt"),
        (["--prompt", "1020"], "model.max_length=1024"),
        (["model.path=./nowhere"], "no such model folder"),
        (["--gpu", "rtx4090-24g", "--gpus-per-node", "1", "model.lora=null", "deepspeed=zero3_offload",
          "model.gradient_checkpointing=true",
          "model.scratch={hidden_size: 65536, layers: 2, heads: 64, intermediate_size: 262144}"], "at its smallest"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_says_what_to_do(options, message, middle):
    path = "scratch" if any("scratch" in o for o in options) else str(middle)
    fixed = ["-c", "pretrained_lora", f"model.path={path}", "train.global_batch_size=256"]
    result = CliRunner().invoke(app, ["plan", *fixed, *options])
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)


def test_a_plan_has_the_steps_and_the_length_that_training_would_take(world, tmp_path, capsys):
    start = tmp_path / "start"
    shutil.copytree(world.model, start)
    ModelStamp(max_length=96).write(start)
    keys = {"model.path": str(start), "data.path": str(world.data.path), "data.shots": 10, "train.epochs": 1.2}
    for asked, length in (({}, 96), ({"model.max_length": 128}, 128)):
        config = config_of(keys | asked | {"train.global_batch_size": 8, "train.negatives": 2})
        job, data = checked_job("preference", config)
        assert with_length_of_start(config).model.max_length == job.config.model.max_length == length
        run_plan(config, Request("cpu", 1, 1, None, None, None), explain=False, as_json=True, console=Console())
        steps = total_steps(job.stage, make_schedule(job, len(data.train), 1))
        assert json.loads(capsys.readouterr().out)["steps"] == steps == 2


def test_a_step_of_a_plan_has_the_groups_that_training_deals(middle):
    """An epoch is cut into equal steps: 300 groups in two of 150, where the batch size allows 256."""
    config = run_config(middle)
    full, half, few = (make_plan(config, cluster("h100-80g"), replace(LENGTHS, groups=n)) for n in (256, 300, 100))
    assert (full.step_groups, half.step_groups, few.step_groups) == (256, 150, 100)
    assert (full.steps, half.steps, few.steps) == (1, 2, 1)
    assert half.step.flops() == full.step.flops()
    work = [sum(part.seconds for part in p.durations if "GFLOP" in part.numbers) for p in (full, half, few)]
    assert work == pytest.approx([work[0], work[0] * 150 / 256, work[0] * 100 / 256])
    assert half.groups_per_second == pytest.approx(150 / half.seconds)
    with pytest.raises(UserError, match="a step of 28 out of 57 groups, fewer groups than the 32 devices"):
        make_plan(changed(config, train__global_batch_size=32), cluster(nodes=4), replace(LENGTHS, groups=57))


def test_rows_are_those_that_training_runs(world, tmp_path):
    """Lists of several levels have more responses than 1 + K, and prompts that list candidates are longer by them."""
    keys = {"model.path": str(world.model), "model.max_length": 256, "train.negatives": 2, "sft.negatives": 1}
    prepare_preferences = [
        {"prompt": f"Next {n}:", "ranked": [[f" a{n}"], [f" b{n}", " c"], [f" d{n}{i}" for i in range(5)]]}
        for n in range(6)
    ]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, prepare_preferences)))
    prepare(config_of({"data.source.path": str(rows)}).data, 0, tmp_path / "levels", echo=lambda _: None)
    config = config_of(keys | {"data.path": str(tmp_path / "levels"), "objective.name": "plackett_luce"})
    one = Cluster("cpu", find_gpu("cpu", 1), 1, 1)
    assert make_plan(config, one, data_lengths(config, "preference")).step.row.negatives == 3 + 2 - 1

    request = {"template.request": "Choose:\n{candidates}Answer:\n", "template.candidate": "{title}\n"}
    config = config_of(keys | request | {"data.path": str(world.data.path)})
    tokenizer = load_tokenizer(find_model(str(world.model)))
    encode = GroupTokenizer(tokenizer, make_template(config.template, tokenizer), 256)
    for kind in ("preference", "sft"):
        job, data = checked_job(kind, config)
        listed = listed_groups(job, data, encode)
        prompts = [len(listed(index, 0).prefix) for index in range(len(listed))]
        assert data_lengths(config, kind).prompt == ceil(sum(prompts) / len(prompts))
    assert data_lengths(config, "preference").others is None


def test_dropout_of_a_config_json_is_in_no_run(tmp_path):
    tiny_model("llama", attention_dropout=0.1).save_pretrained(tmp_path)
    model = ModelConfig(path=str(tmp_path), max_length=64)
    loaded, _ = load_policy(find_model(str(tmp_path)), model)
    assert blueprint(model).route(False, 64, "auto") == choose_backend(loaded, "cpu", 64)
    assert blueprint(model).route(False, 64, "auto").backend == "two_part"


def test_a_deepspeed_file_is_planned_as_its_stage_trains_by_it(middle, tmp_path):
    optimizer = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}}
    exact = {"gradient_accumulation_steps": 1, "managed_gradient_accumulation": False, "optimizer": optimizer}
    clipped = {"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5}
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(exact | clipped))
    config = changed(run_config(middle), deepspeed=str(file), sft__max_grad_norm=0.5)
    assert make_plan(config, cluster("h100-80g"), LENGTHS, "sft").zero.stage == 2
    with pytest.raises(UserError, match=r"max_grad_norm"):
        make_plan(config, cluster("h100-80g"), LENGTHS)
    for zero in ({}, {"zero_optimization": {}}, {"zero_optimization": True}, {"zero_optimization": {"stage": 4}}):
        file.write_text(json.dumps(exact | zero))
        with pytest.raises(UserError, match=r'mine.json: must set "zero_optimization": \{"stage": 0, 1, 2 or 3\}'):
            make_plan(config, cluster("h100-80g"), LENGTHS)


def test_every_gpu_has_a_data_sheet_peak():
    for gpu in GPUS.values():
        assert gpu.peak("bfloat16") > gpu.peak("float32") > 1e13
        assert gpu.memory > 20 * 2**30
        assert gpu.intra > gpu.inter


def test_a_search_as_wide_as_a_group_is_one_more_forward_pass(middle):
    """So is counted what comes before the step, and nothing for SFT, which searches nothing."""
    config = run_config(middle)
    wide = config.train.negatives + 1
    searching = changed(config, train__on_policy=OnPolicyConfig(beams=wide, top=wide - 1))
    plain, searched = (make_plan(one, cluster(), LENGTHS).step for one in (config, searching))
    assert plain.flops()["search"] == 0
    assert searched.flops() == plain.flops() | {"search": plain.flops()["forward"]}
    wider = changed(config, train__on_policy=OnPolicyConfig(beams=4 * wide, top=wide - 1))
    assert make_plan(wider, cluster(), LENGTHS).seconds > make_plan(searching, cluster(), LENGTHS).seconds
    assert make_plan(searching, cluster(), LENGTHS, "sft").step.flops()["search"] == 0


def test_sft_is_planned_by_the_lengths_of_the_data_and_costs_what_equal_compute_says(world):
    """Mean lengths as the tokenizer gives them; the FLOPs of both stages in the ratio that `compute_factor` counts."""
    settings = {
        "model": {"path": str(world.model), "max_length": 128}, "data": {"path": str(world.folder / "data")},
        "train": {"negatives": 3, "global_batch_size": 16}, "sft": {"global_batch_size": 16, "loss_on": "all_titles"},
        "template": {"item": "{title}{end}"},
    }  # fmt: skip
    config = RunConfig.model_validate(settings)
    preference, sft = (data_lengths(config, kind) for kind in ("preference", "sft"))
    tokenizer = load_tokenizer(find_model(str(world.model)))
    encode = GroupTokenizer(tokenizer, make_template(config.template, tokenizer), 128, score_history=True)
    groups, alone = (tokenize_rows(world.data.train, encode, negatives) for negatives in (None, 0))
    assert preference.prompt == ceil(sum(len(group.prefix) for group in groups) / len(groups))
    assert sft.prompt == ceil(sum(len(group.prefix) for group in alone) / len(groups))
    assert sft.longest == max(len(group.prefix) + len(group.branches[0]) for group in alone) <= preference.longest
    assert sft.history == ceil(sum(len(group.prefix_scored) for group in alone) / len(groups)) > 0
    plans = {
        kind: make_plan(config, cluster(), found, kind) for kind, found in (("preference", preference), ("sft", sft))
    }
    assert (plans["sft"].step.row.negatives, plans["sft"].step.row.scored) == (0, sft.history)
    assert [term.name for term in plans["preference"].terms if "reference" in term.name] == ["frozen reference"]
    assert not [term.name for term in plans["sft"].terms if "reference" in term.name]
    flops = {kind: sum(plan.step.flops().values()) for kind, plan in plans.items()}
    for plan in plans.values():  # the planner's backward computes the logits again, which is none of the result
        head = forward_flops(
            plan.step.shape, shared_work(plan.step.row.prompt, plan.step.row.response, plan.step.row.negatives)
        )
        rows = plan.step.row.scored * 2 * plan.step.shape.hidden * plan.step.shape.vocab
        flops[plan.kind] -= head.head + rows
    factor = compute_factor(
        plans["sft"].step.shape, groups, 3, reference=True, history_in_preference=False, history_in_sft=True
    )
    assert flops["preference"] / flops["sft"] == pytest.approx(factor, rel=0.05)
    with pytest.raises(UserError, match=r"sft\.token_budget=40: the longest group of the data takes"):
        make_plan(changed(config, sft__token_budget=40), cluster(), sft, "sft")
