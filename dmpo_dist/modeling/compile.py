"""torch.compile for the parts of a decoder layer around attention."""

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from dmpo_dist.errors import UserError
from dmpo_dist.modeling.attention import DENSE, TWO_PART, dense_attention, two_part_attention
from dmpo_dist.modeling.heads import backbone_of

RECOMPILE_LIMIT = 64
"""Graphs of a part of a layer: the first layer or another, policy, reference or validation, one row length or any, each
model of a benchmark. At torch's own limit of 8 a training run went on uncompiled after a few steps, and only warned."""


def compile_layers(model: Any, backend: str = "inductor") -> None:
    """Compile each decoder layer of ``model`` (a transformers causal LM, before or after PEFT) in place.

    Shapes are dynamic, because every packed row has another length; attention stays as it is, so a layer becomes two
    graphs, norm to rotary embedding and output projection to MLP, which all layers share.

    Args:
        model: with attention already routed (``use_backend``).
        backend: of torch.compile; ``aot_eager`` traces without generating code.

    Raises:
        UserError: a model without a list of decoder layers.
    """
    layers = next((child for child in backbone_of(model).children() if isinstance(child, nn.ModuleList)), None)
    if layers is None:
        raise UserError(f"model.compile=true: {model.config.model_type} has no list of decoder layers; set it to false")
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    torch._dynamo.config.specialize_float = True  # scales are constants, not tensors read by the host in every call
    for name, function in ((TWO_PART, two_part_attention), (DENSE, dense_attention)):
        AttentionInterface.register(name, torch.compiler.disable(function))
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)
