"""What a stage saves is what a reload gives, whatever names and files transformers writes it under."""

from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model, word_tokenizer
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from dmpo_dist.config import RunConfig
from dmpo_dist.training import checkpoint
from dmpo_dist.training.checkpoint import save_model
from dmpo_dist.training.job import Job

pytestmark = pytest.mark.usefixtures("one_rank")

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
RENAMED = {
    "qwen3_moe": EXPERTS | {"num_experts": 4, "head_dim": 8},
    "mixtral": EXPERTS | {"num_local_experts": 4},
    "olmoe": EXPERTS | {"num_experts": 4},
    "granitemoe": EXPERTS | {"num_local_experts": 4},
}
"""Their experts are stacked in memory and lie one by one, or under other names, in the file."""


def model_of(kind):
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 48, "vocab_size": 97, "max_position_embeddings": 64, "tie_word_embeddings": False,
             "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape | RENAMED[kind]))


def saved(model, tmp_path):
    start = tmp_path / "start"
    model.config.save_pretrained(start)
    (start / "pytorch_model.bin").touch()  # a start whose weights nobody reads here
    engine = SimpleNamespace(module=SimpleNamespace(causal_lm=model), zero_optimization_stage=lambda: 0)
    save_model(engine, word_tokenizer(), tmp_path / "model", Job("sft", RunConfig(), str(start), tmp_path), {"step": 1})
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", RENAMED)
@torch.no_grad()
def test_models_whose_save_renames_weights(kind, dtype, tmp_path):
    model = model_of(kind).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    folder = saved(model, tmp_path)
    names = load_file(folder / "model.safetensors").keys()
    assert names != model.state_dict().keys(), "or there is nothing to see"
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    ids = torch.arange(3, 20)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_several_files(tied, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_SIZE", "20KB")
    model = tiny_model("llama", tie_word_embeddings=tied)
    folder = saved(model, tmp_path)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(again.get_parameter(name), weight) for name, weight in model.named_parameters())


@pytest.mark.parametrize("size", ["50GB", "20KB"])
@pytest.mark.parametrize("damage", ["changed", "left out"])
def test_a_weight_that_is_lost_is_found_in_one_file_and_in_several(damage, size, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_SIZE", size)
    model = model_of("qwen3_moe")
    whole, name = model.save_pretrained, "model.layers.1.mlp.experts.gate_up_proj"

    def damaged(folder, state_dict, **options):
        if damage == "changed":
            state_dict = state_dict | {name: state_dict[name] * 1.001}
        else:
            state_dict = {n: t for n, t in state_dict.items() if n != name}
        whole(folder, state_dict=state_dict, **options)

    monkeypatch.setattr(model, "save_pretrained", damaged)
    with pytest.raises(RuntimeError, match=f"{name} did not survive"):
        saved(model, tmp_path)
    assert not (tmp_path / "model").exists()
