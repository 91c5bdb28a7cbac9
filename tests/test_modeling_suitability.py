"""Models and tokenizers that will not do are refused by one message that names the cause."""

import logging

import pytest
import torch
from conftest import tiny_model, word_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    T5Config,
    WhisperConfig,
)

from dmpo_dist.config import LoraConfig, ModelConfig
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.backbone import find_model, load_causal_lm, load_policy, load_tokenizer, read_model_config
from dmpo_dist.modeling.heads import check_head
from dmpo_dist.modeling.lora_targets import reach_note
from dmpo_dist.modeling.suitability import noise_note
from dmpo_dist.modeling.token_scorer import TokenScorer

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 48, "vocab_size": 97, "max_position_embeddings": 128, "bos_token_id": 1,
         "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FULL = EXPERTS | {"layer_types": ["full_attention"] * 2, "head_dim": 8}
PLAIN = ModelConfig(max_length=64)


def saved(kind, folder, **options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE | options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return find_model(str(folder))


def save_tokenizer(folder):
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4), "t5 is an encoder-decoder"),
        (WhisperConfig(), "whisper is an encoder-decoder"),
        (BertConfig(), "bert is an encoder, whose tokens see those after them"),
        (AutoConfig.for_model("roberta"), "roberta is an encoder"),
        (AutoConfig.for_model("deberta-v2"), "deberta-v2 is not a causal language model"),
    ],
)
def test_what_is_not_causal_is_named(config, what, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}: {what}.*decoder-only") as refused:
        read_model_config(str(tmp_path), 0)
    assert "\n" not in str(refused.value)


def test_causal_models_are_not_refused(tmp_path):
    """GPT-NeoX says is_decoder: false."""
    for kind in ("gpt_neox", "bert"):
        AutoConfig.for_model(kind, is_decoder=kind == "bert").save_pretrained(tmp_path / kind)
        read_model_config(str(tmp_path / kind), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_whose_tokens_see_those_after_them_is_found_out(dtype):
    """Whatever its configuration says, as of a Llama made bidirectional for embeddings."""
    model = tiny_model("llama").to(dtype)
    check_head(model)
    model.config.is_causal = False
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(UserError, match=r"llama: its tokens see those after them"):
        check_head(model)


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        ("mixtral", EXPERTS | {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        ("minimax", FULL | {"router_jitter_noise": 0.2}, "router_jitter_noise=0.2"),
        ("opt", {"layerdrop": 0.5, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.1}, "layerdrop=0.5"),
    ],
)  # fmt: skip
def test_noise_is_set_to_0_and_named(kind, options, named, tmp_path):
    source = saved(kind, tmp_path, **options)
    model, _ = load_policy(source, PLAIN)
    ids = torch.arange(3, 40)[None]
    assert model.training
    assert torch.equal(model(ids).logits, model(ids).logits)
    check_head(model)
    note = noise_note(read_model_config(str(tmp_path), 0))
    assert note.startswith(f"{kind}: {named} is set to 0")
    assert "dropout=0.1" not in note


def test_a_model_that_is_random_in_another_way_is_found_out():
    model = tiny_model("llama")
    model.model.embed_tokens.register_forward_hook(lambda module, _, out: out * (1 + 0.1 * torch.rand_like(out)))
    with pytest.raises(UserError, match=r"llama: gives other hidden states each time"):
        check_head(model)


def test_phimoe_is_refused_in_training_alone_and_scored_as_it_is(tmp_path):
    source = saved("phimoe", tmp_path, **EXPERTS)
    for lora in (None, LoraConfig()):
        with pytest.raises(UserError, match=r"phimoe cannot be trained here: its SparseMixer router draws experts"):
            load_policy(source, PLAIN.model_copy(update={"lora": lora}))
    ids = torch.arange(3, 40)[None]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(load_causal_lm(str(tmp_path), PLAIN).eval()(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("added", [["Film"], ["Film", "Series"]])
def test_a_tokenizer_larger_than_the_embedding(added, tmp_path):
    saved("llama", tmp_path)
    tokenizer = save_tokenizer(tmp_path)
    assert load_tokenizer(find_model(str(tmp_path))).vocab_size == 97
    tokenizer.add_tokens(added)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"ids up to {96 + len(added)}, but its embedding has 97 rows.*'Film' \(97\)"):
        load_tokenizer(find_model(str(tmp_path)))


def test_a_begin_token_beyond_the_embedding_and_a_special_one_that_no_title_holds(tmp_path):
    """Gemma 3's text models have a token for images that their embedding does not."""
    source = saved("llama", tmp_path)
    tokenizer = save_tokenizer(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(tmp_path)
    image = load_tokenizer(source).convert_tokens_to_ids("<image>")
    assert image == 97
    scorer = TokenScorer(load_causal_lm(str(tmp_path), PLAIN).eval(), 512, 64)
    with pytest.raises(UserError, match="llama: the template writes token 97, but the embedding has 97 rows"):
        scorer.score([TokenGroup([3, image], ([4], [5]), (0, 0))])
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"embedding has 97 rows.*'<begin>' \(98\)"):
        load_tokenizer(source)


def adapted(source, targets):
    return load_policy(source, PLAIN.model_copy(update={"lora": LoraConfig(r=2, target_modules=targets)}))[0]


@pytest.mark.parametrize("targets", [["q_proj", "o_proj"], ["o_proj", "gate_proj", "up_proj"], "model.layers.*q_proj"])
def test_a_target_that_a_model_does_not_have_is_refused_with_those_it_has(targets, tmp_path):
    """Phi-3 fuses queries, keys and values, gate and up; PEFT takes the rest without a word."""
    source = saved("phi3", tmp_path / "phi3")
    with pytest.raises(UserError, match=r"not found in this phi3.*down_proj, gate_up_proj, o_proj, qkv_proj"):
        adapted(source, targets)
    assert reach_note(adapted(source, ["qkv_proj", "o_proj"]), ["qkv_proj", "o_proj"]) is None
    gpt2 = tiny_model("gpt2")
    gpt2.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match=r"q_proj.*not found in this gpt2.*c_attn, c_fc, c_proj"):
        adapted(find_model(str(tmp_path / "gpt2")), ["q_proj"])


def test_a_target_that_only_some_layers_have_is_said(tmp_path):
    heads = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "head_dim": 8}
    widths = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 0}
    mixed = heads | widths | {"layer_types": ["linear_attention", "full_attention"]}
    source = saved("qwen3_next", tmp_path, **mixed)
    for targets in (["q_proj"], ["q_proj", "o_proj"], ".*q_proj"):
        note = reach_note(adapted(source, targets), targets)
        assert "q_proj in 1 of 2 layers, as the others have none of that name" in note


def test_experts_and_what_lies_beside_them(tmp_path):
    """PEFT translates the names of experts, and then leaves out the dense layers of the same names."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    source = saved("qwen3_moe", tmp_path / "qwen", **experts, mlp_only_layers=[1])
    note = reach_note(adapted(source, ["q_proj"]), ["q_proj"])
    assert "none of the experts (model.layers.*.mlp.experts.down_proj, model.layers.*.mlp.experts.gate_up_proj)" in note
    for targets in ("all-linear", ["q_proj", "gate_proj", "up_proj", "down_proj"]):
        peft = adapted(source, targets)
        assert len(peft.base_model.targeted_parameter_names) >= 2
        note = reach_note(peft, targets)
        assert "not model.layers.*.mlp.down_proj, model.layers.*.mlp.gate_proj, model.layers.*.mlp.up_proj" in note
        assert "experts (" not in note
    mixtral = saved("mixtral", tmp_path / "mixtral", **EXPERTS)
    assert reach_note(adapted(mixtral, ["w1", "w2", "w3"]), ["w1", "w2", "w3"]) is None, "names of its files"
    with pytest.raises(UserError, match=r"gate_up.*not found in this mixtral"):
        adapted(mixtral, ["q_proj", "gate_up"])


def test_a_message_is_all_there_is(tmp_path, caplog):
    T5Config(num_layers=1).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING), pytest.raises(UserError):
        load_causal_lm(str(tmp_path), PLAIN)
    assert not caplog.records
