"""One run, many ways to divide it: ranks, micro-batches, ZeRO stages, layouts give the same gradients and weights.

The oracle shares no code with the engine, the plan's dealing or the layouts: a plain torch AdamW on the whole batch,
with one full row per response.
"""

import copy
import json
from pathlib import Path

import pytest
import torch
from processes import run_ranks
from safetensors.torch import load_file
from torch.nn.functional import softplus
from worlds import prepared

from dmpo_dist.batching.plan import Schedule
from dmpo_dist.config import LoraConfig, ModelConfig, RunConfig, TemplateConfig
from dmpo_dist.data.store import PreparedData
from dmpo_dist.data.template import make_template
from dmpo_dist.data.tokenization import GroupTokenizer, tokenize_rows
from dmpo_dist.modeling.backbone import find_model, load_causal_lm, load_tokenizer
from dmpo_dist.training.groups import with_negatives
from dmpo_dist.training.schedule import learning_rate

pytestmark = pytest.mark.integration

STEPS, BATCH, K = 20, 12, 3
SGD = "sgd"  # one step of SGD with a large rate: the change of the weights is the gradient
FULL = [("zero0", {}), ("zero1", {}), ("zero2", {}), ("zero3", {}), ("zero2_offload", {}), ("zero3_offload", {})]
OTHER = [
    ("zero2", {"train": {"token_budget": 120}}),  # a group a micro-batch, with fillers
    ("zero2", {"train": {"token_budget": 4096}}),  # one micro-batch
    ("zero3", {"model": {"attention": "unshared"}, "train": {"token_budget": 1000}}),
    ("zero3", {"model": {"gradient_checkpointing": True}}),
    ("zero2", {"reference": {"cache": "memory"}}),
    ("zero3", {"reference": {"cache": "disk"}}),
]
QLORA = {"lora": LoraConfig(r=4, alpha=8).model_dump(), "quantization": "nf4"}
LEVELED_STEPS = 3
ON_POLICY = {"on_policy": {"every": 3, "beams": 12, "top": 8}, "steps": 6, "checkpoint_every": 4, "log_every": 1}
RANK_REWARD = {"objective": {"name": "rank_reward", "beta": 1.0, "target": "always"}}
LIKELIHOOD = {"objective": {"beta": 0.5, "sft_weight": 2.0, "sft_loss_on": "all_titles"}}


@pytest.fixture(scope="module")
def project(world, tmp_path_factory) -> Path:
    """The world's data, model and adapter, configurations with plain SGD, and room for the runs."""
    folder = tmp_path_factory.mktemp("invariance")
    for name in ("data", "model", "adapter"):
        (folder / name).symlink_to(world.folder / name)
    for stage in (0, 2, 3):
        (folder / f"{SGD}{stage}.json").write_text(json.dumps(sgd_config(stage)))
    leveled = prepared(folder / "leveled", levels="ratings", train_requests_per_user=3)
    assert leveled.items.equals(world.data.items), "the model knows these titles"
    assert max(max(levels, default=0) for levels in leveled.train["levels"][:]) == 2
    return folder


def sgd_config(stage: int) -> dict:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "optimizer": {"type": "SGD", "params": {"lr": "auto"}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}
        | ({"overlap_comm": False} if stage else {}),
        "steps_per_print": 10**9,
    }


def job(project: Path, name: str, deepspeed: str, start: str = "model", lora: bool = False, **sections) -> dict:
    config = {
        "data": {"path": str(project / "data")},
        "template": {"item": "{title}{end}", "preamble": "", "request": ""},
        "model": {"max_length": 128, "lora": LoraConfig(r=4, alpha=8).model_dump() if lora else None},
        "train": {
            "negatives": K, "steps": STEPS, "global_batch_size": BATCH, "token_budget": 400, "learning_rate": 2e-3,
            "weight_decay": 0.01, "validate_every": STEPS, "checkpoint_every": 1000, "select": "last", "log_every": 5,
        },
        "objective": {"beta": 0.5},
        "deepspeed": deepspeed,
    }  # fmt: skip
    if Path(deepspeed).name.startswith(SGD):
        config["train"] |= {
            "steps": 1,
            "learning_rate": 1e3,
            "max_grad_norm": 1e9,
            "warmup_ratio": 0.0,
            "weight_decay": 0.0,
        }
    for section, values in sections.items():
        config[section] = config.get(section, {}) | values
    RunConfig.model_validate(config)
    return {
        "kind": "preference",
        "start": str(project / start),
        "output": str(project / "runs" / name),
        "config": config,
    }


def sft_job(project: Path, name: str, deepspeed: str, **sft) -> dict:
    entry = job(project, name, deepspeed)
    config = entry["config"]
    config["sft"] = {key: value for key, value in config["train"].items() if key != "negatives"} | sft
    RunConfig.model_validate(config)
    return entry | {"kind": "sft"}


def leveled_job(project: Path, name: str, deepspeed: str, **sections) -> dict:
    """Mult-DPO on groups of up to five likes in two levels, above three negatives."""
    train = {"steps": LEVELED_STEPS, "validate_every": LEVELED_STEPS} | sections.pop("train", {})
    objective = {"name": "mult_dpo"}
    return job(
        project, name, deepspeed, data={"path": str(project / "leveled")}, train=train, objective=objective, **sections
    )


@pytest.fixture(scope="module")
def results(project):
    """Final weights of every way to run, by name."""
    one = [
        job(project, "one", "zero0", train={"token_budget": 120}),
        job(project, "one-gradient", str(project / f"{SGD}0.json")),
        job(project, "one-lora", "zero0", lora=True),
        job(project, "one-adapter", "zero0", start="adapter"),
        job(project, "one-nf4", "zero0", model=QLORA),
        job(project, "one-likelihood", "zero0", **LIKELIHOOD),
        leveled_job(project, "one-leveled", "zero0"),
        sft_job(project, "one-given", "zero0", loss_on="all_titles"),
        sft_job(project, "one-shuffled", "zero0", loss_on="all_titles", history_order="shuffled"),
        job(project, "one-searched", "zero0", train=ON_POLICY),
        job(project, "one-reward", "zero0", train=ON_POLICY, **RANK_REWARD),
        job(project, "one-resumed", "zero0", train=ON_POLICY) | {"stop": 4},
        job(project, "one-resumed", "zero0", train=ON_POLICY),
    ]
    two = [job(project, f"two-{i}-{name}", name, **more) for i, (name, more) in enumerate(FULL + OTHER)]
    two += [job(project, f"two-gradient-{stage}", str(project / f"{SGD}{stage}.json")) for stage in (0, 2, 3)]
    two += [job(project, f"two-lora-{name}", name, lora=True) for name in ("zero2", "zero3")]
    two += [job(project, f"two-nf4-{name}", name, model=QLORA) for name in ("zero2", "zero3")]
    two += [job(project, "two-lora-cached", "zero2", lora=True, reference={"cache": "memory"})]
    two += [job(project, f"two-adapter-{name}", name, start="adapter") for name in ("zero1", "zero3")]
    two += [job(project, "two-adapter-cached", "zero3", start="adapter", reference={"cache": "memory"})]
    two += [
        job(
            project,
            "two-likelihood",
            "zero2",
            model={"attention": "unshared"},
            train={"token_budget": 1000},
            **LIKELIHOOD,
        )
    ]
    two += [leveled_job(project, "two-leveled-zero2", "zero2", train={"token_budget": 250})]
    two += [leveled_job(project, "two-leveled-cached", "zero3", reference={"cache": "memory"})]
    two += [sft_job(project, "two-shuffled", "zero2", loss_on="all_titles", history_order="shuffled", token_budget=130)]
    two += [job(project, "two-searched", "zero3", train=ON_POLICY)]
    two += [job(project, "two-reward", "zero2", train=ON_POLICY, **RANK_REWARD)]
    run_ranks(project, one, 1)
    run_ranks(project, two, 2)
    return {Path(entry["output"]).name: weights(Path(entry["output"]) / "model") for entry in one + two}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / "adapter_model.safetensors"
    return load_file(file if file.exists() else folder / "model.safetensors")


def batches(data: PreparedData, project: Path, steps: int):
    """The token groups of every step, from the schedule alone."""
    tokenizer = load_tokenizer(find_model(str(project / "model")))
    template = make_template(TemplateConfig(item="{title}{end}", preamble="", request=""), tokenizer)
    groups = tokenize_rows(data.train, GroupTokenizer(tokenizer, template, 128))
    schedule = Schedule(len(groups), BATCH, 0)
    for step in range(steps):
        epoch = schedule.epoch_of(step)
        yield [with_negatives(groups[g], K, epoch * K) for g in schedule.groups(step)]


def dmpo(rewards: torch.Tensor, levels: tuple[int, ...]) -> torch.Tensor:
    """arXiv 2405.16127."""
    return softplus(rewards[1:].mean() - rewards[0])


def mult_dpo(rewards: torch.Tensor, levels: tuple[int, ...]) -> torch.Tensor:
    """arXiv 2606.10078, eq. 24: each response above the last level drawn from its level and those below."""
    levels = levels or (0, *[1] * (len(rewards) - 1))
    below = [torch.stack([r for r, level in zip(rewards, levels, strict=True) if level >= own]) for own in levels]
    drawn = [rest.logsumexp(0) - r for r, rest, own in zip(rewards, below, levels, strict=True) if own < max(levels)]
    return torch.stack(drawn).sum()


def plain_loss(model, reference, groups, form) -> torch.Tensor:
    """The mean of ``form`` over the whole batch, a row per response."""

    def log_prob(network, prefix, branch):
        ids = torch.tensor([prefix + branch])
        log_probs = network(input_ids=ids).logits[0].log_softmax(-1)
        return log_probs[torch.arange(len(prefix) - 1, ids.shape[1] - 1), torch.tensor(branch)].sum()

    total = torch.zeros(())
    for group in groups:
        rewards = []
        for branch in group.branches:
            with torch.no_grad():
                base = log_prob(reference, group.prefix, branch)
            rewards.append(0.5 * (log_prob(model, group.prefix, branch) - base))
        total = total + form(torch.stack(rewards), group.levels)
    return total / len(groups)


def train_plainly(project: Path, entry: dict, form):
    """Step-1 gradients and the weights after all steps of the job ``entry``, by plain torch."""
    model = load_causal_lm(str(project / "model"), ModelConfig(max_length=128)).train()
    reference = copy.deepcopy(model)
    decay = [p for p in model.parameters() if p.ndim > 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay}, {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}],
        lr=0.0, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8,
    )  # fmt: skip
    config = RunConfig.model_validate(entry["config"])
    steps, first = config.train.steps, None
    for step, groups in enumerate(batches(PreparedData.load(config.data.path), project, steps)):
        optimizer.zero_grad()
        plain_loss(model, reference, groups, form).backward()
        first = first or {n: p.grad.clone() for n, p in model.named_parameters()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, config.train)
        optimizer.step()
    return first, {n: p.detach() for n, p in model.named_parameters()}


@pytest.fixture(scope="module")
def oracle(project):
    return train_plainly(project, job(project, "none", "zero0"), dmpo)


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize("name", ["one-gradient", "two-gradient-0", "two-gradient-2", "two-gradient-3"])
def test_first_gradient(project, results, oracle, name):
    expected, _ = oracle
    before = weights(project / "model")
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    error = torch.stack([((before[n] - results[name][n]) / 1e3 - expected[n]).norm() for n in before]).norm()
    assert (error / norm).item() < 1e-6


def test_weights_after_all_steps_match_plain_torch(results, oracle):
    _, expected = oracle
    assert largest_difference(results["one"], {n: t for n, t in expected.items() if n in results["one"]}) < 1e-5


@pytest.mark.parametrize("name", [f"two-{i}-{name}" for i, (name, _) in enumerate(FULL + OTHER)])
def test_weights_do_not_depend_on_the_split(results, name):
    assert largest_difference(results["one"], results[name]) < 1e-5


@pytest.mark.parametrize("name", ["two-lora-zero2", "two-lora-zero3", "two-lora-cached"])
def test_new_adapter(results, name):
    assert largest_difference(results["one-lora"], results[name]) < 1e-5


@pytest.mark.parametrize("name", ["two-adapter-zero1", "two-adapter-zero3", "two-adapter-cached"])
def test_going_on_from_an_adapter(project, results, name):
    assert largest_difference(results["one-adapter"], results[name]) < 1e-5
    assert largest_difference(results["one-adapter"], weights(project / "adapter")) > 1e-3


@pytest.mark.parametrize("name", ["two-nf4-zero2", "two-nf4-zero3"])
def test_an_adapter_on_4_bits(results, name):
    """The base is whole under ZeRO-2 and in parts under ZeRO-3, which the worker itself checks."""
    assert largest_difference(results["one-nf4"], results[name]) < 1e-5
    assert largest_difference(results["one-nf4"], results["one-lora"]) > 1e-4


def test_the_likelihood_of_all_titles(results):
    """From the shared prompt at one rank as from separate rows at two; and it is not without effect."""
    assert largest_difference(results["one-likelihood"], results["two-likelihood"]) < 1e-5
    assert largest_difference(results["one-likelihood"], results["one"]) > 1e-3


def test_histories_in_a_new_order(results):
    """Every rank draws the same orders; and they are not those of the log."""
    assert largest_difference(results["one-shuffled"], results["two-shuffled"]) < 1e-5
    assert largest_difference(results["one-shuffled"], results["one-given"]) > 1e-3


def test_levels(project, results):
    """Several positives in two levels: one rank as plain torch, two under ZeRO-2 and ZeRO-3 as one."""
    _, expected = train_plainly(project, leveled_job(project, "none", "zero0"), mult_dpo)
    one = results["one-leveled"]
    assert largest_difference(one, {name: t for name, t in expected.items() if name in one}) < 1e-5
    assert largest_difference(one, weights(project / "model")) > 1e-3
    for name in ("two-leveled-zero2", "two-leveled-cached"):
        assert largest_difference(one, results[name]) < 1e-5


def drawn(project: Path, name: str) -> list:
    """What the checkpoint of step 4, inside of the stretch of steps 4 to 6, holds for steps 5 and 6."""
    index = project / "runs" / name / "checkpoints" / "step-00000004" / "checkpoint.json"
    return json.loads(index.read_text())["drawn"]


@pytest.mark.parametrize("name", ["searched", "reward"])
def test_titles_that_the_model_finds(project, results, name):
    """Ranks share the search, under ZeRO-3 in step, and draw and learn what one does."""
    assert drawn(project, f"one-{name}") == drawn(project, f"two-{name}")
    assert len(drawn(project, f"one-{name}")) >= 2 * (BATCH - 1)
    assert largest_difference(results[f"one-{name}"], results[f"two-{name}"]) < 1e-5
    assert largest_difference(results["one-searched"], results["one-reward"]) > 1e-4


def test_a_search_is_resumed_to_the_last_bit(project, results):
    assert largest_difference(results["one-searched"], results["one-resumed"]) == 0


def test_log_lines_tell_of_the_search(project, results):
    records = json.loads((project / "runs/one-searched/records.json").read_text())
    lines = [record for record in records if record["kind"] == "step"]
    assert [line["refresh_seconds"] > 0 for line in lines] == [True, False, False, True, False, False]
    assert all(line["refresh_share"] <= 1 for line in lines)
    assert all(K <= line["drawn_titles"] <= 40 and 10 <= line["top10_titles"] <= 40 for line in lines)
    assert all(0 < line["target_found"] <= 1 <= line["target_rank"] <= 12 for line in lines)
    assert lines[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_records(project, results):
    """The log of a split run says what the run was: the first loss, the same losses, work shared evenly."""
    one = json.loads((project / "runs/one/records.json").read_text())
    two = json.loads((project / "runs/two-3-zero3/records.json").read_text())
    losses = [[r["loss"] for r in records if r["kind"] == "step"] for records in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][0] == pytest.approx(0.693147, abs=1e-5)
    assert losses[0][-1] < losses[0][0]
    assert any("shared prompt against separate rows" in r.get("text", "") for r in two)
    assert max(r["imbalance"] for r in two if r["kind"] == "step") < 0.25
