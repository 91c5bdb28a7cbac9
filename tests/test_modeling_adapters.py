"""Adapters on full and 4-bit backbones: one base for policy and reference, and clear refusals."""

import json
import sys

import pytest
import torch
from conftest import random_groups, tiny_model
from oracle import oracle
from peft import LoraConfig as PeftLora
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from dmpo_dist.batching.layout import prefix_layout
from dmpo_dist.config import LoraConfig, ModelConfig
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.backbone import find_model, load_causal_lm, load_for_scoring, load_policy
from dmpo_dist.modeling.logprobs import LogProbModel, unwrap_peft
from dmpo_dist.modeling.quantize import packed_weights, quantization_of, require_partitioned
from dmpo_dist.modeling.routing import use_backend

pytest.importorskip("bitsandbytes", reason='needs bitsandbytes: pip install "dmpo-dist[quant]"')

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
)
NF4 = ModelConfig(quantization="nf4", max_length=128, lora=LoraConfig(r=4, alpha=8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_one_quantized_base_for_policy_and_reference(folder, variant, device):
    dtype = "bfloat16" if device == "cuda" else "float32"
    config = NF4.model_copy(update={"lora": LoraConfig(r=4, alpha=8, variant=variant), "dtype": dtype})
    model, mode = load_policy(find_model(str(folder)), config)
    use_backend(unwrap_peft(model), "two_part")
    module = LogProbModel(model, mode).to(device)
    packed = packed_weights(module)
    assert len(packed) == 14  # seven linear layers in each of two; embeddings and head stay whole
    assert all(p.dtype == getattr(torch, dtype) and not p.requires_grad for _, p in packed)
    layout = prefix_layout(random_groups(4, seed=0)).to(device)
    policy = module(layout)
    assert torch.equal(policy, module(layout, "reference"))
    policy.sum().backward()
    trained = {name for name, p in module.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "lora_B" in name:
                p.add_(0.1)
    assert not torch.allclose(module(layout), policy)
    assert torch.equal(module(layout, "reference"), policy)


def test_rounding_is_that_of_the_packed_weights(folder):
    """The 4-bit model is the full one with its linear weights replaced by what the packed ones stand for."""
    import bitsandbytes.functional as bnb

    quantized = load_for_scoring(str(folder), NF4)
    rounded = load_causal_lm(str(folder), ModelConfig(max_length=128))
    for name, p in packed_weights(quantized):
        target = rounded.get_parameter(name)
        target.data = bnb.dequantize_4bit(p.data, p.quant_state).to(target.dtype)
    layout = prefix_layout(random_groups(4, seed=1))
    full = load_causal_lm(str(folder), ModelConfig(max_length=128))
    for model in (quantized, rounded, full):
        use_backend(model, "two_part")
    with torch.no_grad():
        seen, expected, full = (LogProbModel(model)(layout) for model in (quantized, rounded, full))
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-4)
    assert (seen - full).abs().max() > 1e-3


def test_weights_stored_in_4_bits_load_as_they_are(folder, tmp_path):
    quantized = load_for_scoring(str(folder), NF4)
    quantized.save_pretrained(tmp_path / "stored")
    stored = load_for_scoring(str(tmp_path / "stored"), NF4)
    assert quantization_of(stored.config) == "nf4"
    for (_, a), (_, b) in zip(packed_weights(quantized), packed_weights(stored), strict=True):
        assert torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8))
    with pytest.raises(UserError, match=r"stored as nf4.*set model\.quantization=nf4"):
        load_causal_lm(str(tmp_path / "stored"), ModelConfig(max_length=128))


def test_refusals(folder, monkeypatch):
    with pytest.raises(UserError, match=r"trains adapters only; set model\.lora\.r"):
        load_policy(find_model(str(folder)), NF4.model_copy(update={"lora": None}))
    with pytest.raises(UserError, match=r"int8 is for scoring.*nf4"):
        load_policy(find_model(str(folder)), NF4.model_copy(update={"quantization": "int8"}))
    model, _ = load_policy(find_model(str(folder)), NF4)
    with pytest.raises(UserError, match=r"leaves the 4-bit weight .* whole.*deepspeed=zero2"):
        require_partitioned(model, 2)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r'pip install -c constraints.txt -e "\.\[quant\]"'):
        load_policy(find_model(str(folder)), NF4)


def test_training_on_from_an_adapter_with_whole_weights_is_refused(folder, tmp_path):
    """Policy and reference would share those weights, so the reference would move."""
    model, _ = load_policy(find_model(str(folder)), NF4.model_copy(update={"quantization": "none"}))
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    plain = json.loads(file.read_text()) | {"base_model_name_or_path": str(folder)}
    for key, value in (("modules_to_save", ["lm_head"]), ("bias", "all"), ("trainable_token_indices", [3])):
        file.write_text(json.dumps(plain | {key: value}))
        with pytest.raises(UserError, match=rf"adapter_config\.json: {key} is .*--merge"):
            load_policy(find_model(str(tmp_path / "adapter")), ModelConfig(max_length=128))
    file.write_text(json.dumps(plain))
    assert load_policy(find_model(str(tmp_path / "adapter")), ModelConfig(max_length=128))[1] == "adapter_copy"


def made_elsewhere(base, folder, **options):
    """An adapter of PEFT's own making in ``folder``, all of whose weights matter; returns it in evaluation mode."""
    peft = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), PeftLora(r=4, target_modules="all-linear", **options)
    )
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    peft.save_pretrained(folder)
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()


@torch.no_grad()
def test_dropout_of_an_adapter_from_elsewhere_is_off(folder, tmp_path):
    """Policy and reference must be one network, and the one that is evaluated."""
    groups = random_groups(4, seed=1)
    expected = oracle(made_elsewhere(folder, tmp_path, lora_dropout=0.3), groups)
    model, mode = load_policy(find_model(str(tmp_path)), ModelConfig(max_length=128))
    use_backend(unwrap_peft(model), "two_part")
    module = LogProbModel(model, mode)
    assert module.training
    for which in ("policy", "reference"):
        torch.testing.assert_close(module(prefix_layout(groups), which), expected)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_changes_its_base_is_not_copied_for_a_reference(folder, tmp_path, start):
    """The copy would take its share out of the base a second time: policy and reference agreed, and both were wrong."""
    groups = random_groups(4, seed=1)
    expected = oracle(made_elsewhere(folder, tmp_path, init_lora_weights=start), groups)
    source, config = find_model(str(tmp_path)), ModelConfig(max_length=128)
    with pytest.raises(UserError, match=rf"adapter_config\.json: init_lora_weights is '{start}'.*--merge"):
        load_policy(source, config)
    sft, _ = load_policy(source, config, needs_reference=False)
    for model in (sft, load_for_scoring(str(tmp_path), config)):
        use_backend(unwrap_peft(model), "two_part")
        torch.testing.assert_close(LogProbModel(model)(prefix_layout(groups)), expected)


def test_a_stage_without_a_reference_loads_none(folder, tmp_path):
    config = ModelConfig(max_length=128, lora=LoraConfig(r=4))
    fresh, mode = load_policy(find_model(str(folder)), config, needs_reference=False)
    assert mode is None
    fresh.save_pretrained(tmp_path / "adapter")
    source = find_model(str(tmp_path / "adapter"))
    sft, mode = load_policy(source, config, needs_reference=False)
    dmpo, _ = load_policy(source, config)
    assert mode is None
    assert (list(sft.peft_config), list(dmpo.peft_config)) == (["default"], ["default", "reference"])
    trained = [name for name, p in sft.named_parameters() if p.requires_grad]
    assert trained == [name for name, p in dmpo.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in trained)
    assert sft.training
    layout = prefix_layout(random_groups(4, seed=0))
    for model in (sft, dmpo):
        use_backend(unwrap_peft(model), "two_part")
    assert torch.equal(LogProbModel(sft)(layout), LogProbModel(dmpo)(layout))
