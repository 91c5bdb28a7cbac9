"""Tiny configurations of every causal language model that the installed transformers knows, where sizes alone do."""

from collections.abc import Iterator
from typing import Any

import torch

MOST_PARAMETERS = 3_000_000
"""A configuration that is larger with all ``SIZES`` set keeps its size under names of its own: it is not built."""

SIZES: dict[str, int] = {
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 128, "d_model": 32, "d_ff": 48,
    "num_layers": 2, "n_layers": 2, "n_heads": 4, "ffn_dim": 48, "embedding_size": 32, "word_embed_proj_dim": 32,
    "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "kv_lora_rank": 8,
    "rotary_dim": 8, "num_kv_heads": 4, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
"""What families call their sizes, beside the names that most share; only those a configuration has are set."""


VARIANTS: tuple[dict[str, int], ...] = ({}, {"num_key_value_heads": 4}, {"num_key_value_heads": 4, "head_dim": 16})
"""What is set beside, one after the other until a family runs: some need as many key heads, or heads of two parts."""


def model_types() -> list[str]:
    """transformers' names of the types that have a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def own_sizes(model_type: str, shared: dict[str, Any]) -> dict[str, int]:
    """The ``SIZES`` that a type's configuration has under names that are not in ``shared``."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type)
    names = vars(config).keys() | config.attribute_map.keys()
    return {name: size for name, size in SIZES.items() if name in names and name not in shared}


def parameters(model_type: str, options: dict[str, Any]) -> int:
    """Parameters of that configuration, built without memory for them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options))
    return sum(parameter.numel() for parameter in model.parameters())


def tiny_options(shared: dict[str, Any]) -> Iterator[tuple[str, dict[str, int] | str]]:
    """(type, its own sizes) of every family that is tiny with them, or (type, why it is not built)."""
    for model_type in model_types():
        try:
            options = own_sizes(model_type, shared)
            size = parameters(model_type, shared | options)
        except Exception as error:  # each type checks its configuration in its own way
            yield model_type, str(error).strip().splitlines()[-1].strip()[:120] if str(error) else repr(error)
            continue
        yield model_type, options if size <= MOST_PARAMETERS else f"has {size:,} parameters at the smallest sizes known"
