"""Backbones in 4 or 8 bits by bitsandbytes, and whether ZeRO-3 really partitions them.

Tried with bitsandbytes 0.50, deepspeed 0.19, transformers 5: nf4 trains adapters under ZeRO 0 to 3, its packed weights
stored in the type of the arithmetic, so that ZeRO-3 can partition and gather them like any other parameter.
"""

from typing import Any

import torch
from torch import nn

from dmpo_dist.config import ModelConfig
from dmpo_dist.errors import UserError


def quantization_config(config: ModelConfig, checkpoint: Any, path: str) -> Any | None:
    """What ``from_pretrained`` takes as ``quantization_config``; None loads the weights as they are.

    Args:
        config: asks for a quantization.
        checkpoint: the transformers configuration of the weights.
        path: where they are, for messages.

    Raises:
        UserError: bitsandbytes is missing, or the weights are quantized already in another way.
    """
    stored = quantization_of(checkpoint)
    if stored is not None and stored != config.quantization:
        raise UserError(
            f"{path}: its weights are stored as {stored}, but model.quantization={config.quantization}; "
            f"set model.quantization={stored}, or give the full-precision model"
            if stored in ("nf4", "int8")
            else f"{path}: its weights are quantized as {stored}, which is not supported; give the full-precision model"
        )
    if config.quantization == "none":
        return None
    _require_bitsandbytes(config.quantization)
    if stored is not None:
        return None  # the checkpoint says how
    from transformers import BitsAndBytesConfig

    if config.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    dtype = getattr(torch, config.dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=config.double_quantization,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
    )


def quantization_of(checkpoint: Any) -> str | None:
    """How the weights of a transformers configuration are stored: ``nf4``, ``int8``, another method, or None."""
    stored = getattr(checkpoint, "quantization_config", None)
    if stored is None:
        return None
    options = stored if isinstance(stored, dict) else stored.to_dict()
    if options.get("load_in_8bit"):
        return "int8"
    if options.get("load_in_4bit"):
        return str(options.get("bnb_4bit_quant_type", "fp4"))
    return str(options.get("quant_method", "unknown"))


def require_trainable(config: ModelConfig, adapter: bool) -> None:
    """Whether a stage can train with this quantization.

    Raises:
        UserError: it would train rounded weights themselves, or int8, which DeepSpeed cannot load back.
    """
    if config.quantization == "none":
        return
    if not adapter:
        raise UserError(
            f"model.quantization={config.quantization} trains adapters only; set model.lora.r, as in model.lora.r=16, "
            "or start from an adapter"
        )
    if config.quantization == "int8":
        raise UserError(
            "model.quantization=int8 is for scoring: DeepSpeed cannot load an int8 model back from a checkpoint; "
            "train with model.quantization=nf4"
        )


def packed_weights(module: nn.Module) -> list[tuple[str, Any]]:
    """Names and parameters of the weights bitsandbytes packed into 4 bits."""
    return [(name, p) for name, p in module.named_parameters() if type(p).__name__ == "Params4bit"]


def keep_arithmetic(model: nn.Module) -> None:
    """Have 4-bit layers compute in the type asked for, in every mode.

    On CPUs with AVX512-BF16 bitsandbytes repacks weights at the first call in evaluation mode and multiplies in bf16
    from then on: log-probs of an fp32 model moved by 0.1 % there, and policy and reference would differ between modes.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # pyrefly: ignore


def require_partitioned(module: nn.Module, world_size: int) -> None:
    """Whether every packed weight of a ZeRO-3 engine's module is held in parts, by shapes and by bytes.

    Raises:
        UserError: one is whole, so that ZeRO-3 would save nothing.
    """
    for name, parameter in packed_weights(module):
        held = parameter.data.numel()
        part = getattr(parameter, "ds_tensor", None)
        share = -(-getattr(parameter, "ds_numel", 0) // world_size)
        if held > 1 or part is None or part.numel() > share:
            raise UserError(
                f"ZeRO-3 leaves the 4-bit weight {name} whole on every rank with these versions of deepspeed and "
                "bitsandbytes; use deepspeed=zero2, which holds the 4-bit base whole anyway"
            )


def _require_bitsandbytes(quantization: str) -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"model.quantization={quantization} needs bitsandbytes ({error}); in your clone: "
            'pip install -c constraints.txt -e ".[quant]"'
        ) from None
