"""The model of a run on the meta device: made from its config.json, without weights."""

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dmpo_dist.batching.layout import lay_out
from dmpo_dist.batching.synthetic import random_groups
from dmpo_dist.config import ModelConfig
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.backbone import (
    ADAPTER,
    ReferenceMode,
    find_model,
    read_model_config,
    scratch_config,
    with_new_adapter,
)
from dmpo_dist.modeling.gguf import local_model
from dmpo_dist.modeling.logprobs import MAX_CHUNK_LOGITS, LogProbModel, unwrap_peft
from dmpo_dist.modeling.routing import Route, choose_backend
from dmpo_dist.modeling.suitability import silence
from dmpo_dist.parsing import parsing
from dmpo_dist.planning import trace
from dmpo_dist.planning.flops import Shape, shape_of

SCRATCH = "scratch"


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters.

    Attributes:
        total: of all parameters, a frozen copy of an adapter included.
        trainable: of those with gradients.
        linear: of the frozen linear layers, which quantization packs.
        largest: of the largest parameter tensor.
        largest_linear, largest_trained: of the largest frozen linear layer, and of the largest trainable tensor.
    """

    total: int
    trainable: int
    linear: int
    largest: int
    largest_linear: int
    largest_trained: int


@dataclass(frozen=True)
class Row:
    """One micro-batch of ``groups`` preference groups, whose prompts are lengthened until it has ``tokens`` tokens.

    Attributes:
        prompt, response, negatives: tokens of a group's prompt and of a response, and K.
        tokens: tokens of the whole row.
        shared: whether the prompt runs once.
        scored: tokens of the prompt whose likelihood is trained too.
    """

    prompt: int
    response: int
    negatives: int
    tokens: int
    shared: bool
    scored: int = 0

    @property
    def group_tokens(self) -> int:
        """Tokens of one group."""
        body = self.response - 1
        if self.shared:
            return self.prompt + (self.negatives + 1) * body
        return (self.negatives + 1) * (self.prompt + body)

    @property
    def groups(self) -> int:
        return max(1, self.tokens // self.group_tokens)

    def layout(self, vocab: int) -> Any:
        """The row with random ids."""
        spare = max(0, self.tokens - self.groups * self.group_tokens) // (1 if self.shared else self.negatives + 1)
        each, rest = divmod(spare, self.groups)
        groups = [
            random_groups(1, self.prompt + each + (i < rest), self.response, self.negatives, vocab, seed=i)[0]
            for i in range(self.groups)
        ]
        scored = tuple(range(1, 1 + min(self.scored, self.prompt - 1)))
        return lay_out([replace(group, prefix_scored=scored) for group in groups], self.shared)


class Blueprint:
    """A model on the meta device, which takes no memory.

    Attributes:
        module: the module that is trained, on the meta device.
        sizes: its numbers of parameters.
        shape: its matrix products, for the FLOP model.
        reference: where reference log-probs come from.
        config: the transformers configuration.
    """

    def __init__(self, model: ModelConfig) -> None:
        self.config, adapter = _read(model)
        silence(self.config)  # as training does: dropout that a config.json asks for is in no run
        base = _base(self.config, model)
        sizes_of_base = [(m, m.weight.numel()) for m in base.modules() if type(m) is nn.Linear]
        head = base.get_output_embeddings()
        linear = [n for m, n in sizes_of_base if m is not head]
        self.reference: ReferenceMode = "adapter_copy" if adapter else "adapter_off" if model.lora else "model_copy"
        wrapped = _adapted(base, model, adapter).to(getattr(torch, model.dtype))
        base.set_attn_implementation(trace.NAME)
        self.module = LogProbModel(wrapped.train())
        parameters = list(self.module.parameters())
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        copied = trainable if adapter else 0
        self.sizes = Sizes(
            total=sum(p.numel() for p in parameters) + copied,
            trainable=trainable,
            linear=sum(linear),
            largest=max(p.numel() for p in parameters),
            largest_linear=max(linear, default=0),
            largest_trained=max(p.numel() for p in parameters if p.requires_grad),
        )
        rank = adapter.r if adapter else model.lora.r if model.lora else 0
        self.shape = _shape(self.config, model.path, rank)
        self._traced: dict[tuple[Row, str, bool, bool], trace.Trace] = {}

    def route(self, cuda: bool, max_length: int, requested: str) -> Route:
        """The attention backend of a run."""
        return choose_backend(unwrap_peft(self.module.causal_lm), "cuda" if cuda else "cpu", max_length, requested)

    def trace(self, row: Row, backend: str, cuda: bool, keep_gradients: bool) -> trace.Trace:
        """The memory that ``row`` allocates."""
        self.module.head.max_logits = MAX_CHUNK_LOGITS["cuda" if cuda else "cpu"]
        kernel: trace.Kernel = "masked" if backend in ("sdpa", "unshared") else "varlen" if cuda else "cpu"
        key = (row, kernel, cuda, keep_gradients)
        if key not in self._traced:
            layout = row.layout(self.config.get_text_config().vocab_size).to("meta")
            self._traced[key] = trace.trace_row(self.module, layout, kernel, keep_gradients)
        return self._traced[key]


def blueprint(model: ModelConfig) -> Blueprint:
    """The blueprint of a configuration; equal models share one object.

    Raises:
        UserError: no such model, a model that transformers does not know, or one that is not a dense decoder.
    """
    return _blueprint(model.model_dump_json(exclude={"quantization", "double_quantization", "attention", "compile"}))


@lru_cache(maxsize=8)
def _blueprint(content: str) -> Blueprint:
    trace.register()
    return Blueprint(ModelConfig.model_validate_json(content))


def _read(model: ModelConfig) -> tuple[Any, Any]:
    """The transformers configuration, and PEFT's where training starts from an adapter."""
    if model.path == SCRATCH:
        return scratch_config(model.scratch, model.scratch.vocab_size, model.max_length), None
    path = local_model(model.path)
    folder = Path(path)
    if (folder / ADAPTER).exists():
        from peft import PeftConfig

        with parsing(folder / ADAPTER, "was it written by PEFT?"):
            adapter = PeftConfig.from_pretrained(path)
        return read_model_config(find_model(path).base, model.max_length), adapter
    if folder.is_dir() and not (folder / "config.json").exists():
        raise UserError(f"{model.path}: holds neither config.json nor {ADAPTER}; a plan needs one of them")
    return read_model_config(path, model.max_length), None


def _base(config: Any, model: ModelConfig) -> Any:
    from transformers import AutoModelForCausalLM

    with parsing(model.path, "does its config.json describe a model that can be made?"), torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, model.dtype))
    if not getattr(base, "_supports_attention_backend", False):
        raise UserError(f"{model.path}: {config.model_type} cannot be planned; the planner knows dense decoders")
    if model.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    return base


def _adapted(base: Any, model: ModelConfig, adapter: Any) -> Any:
    if adapter is not None:
        from peft import get_peft_model

        adapter.inference_mode = False
        return get_peft_model(base, adapter)
    return with_new_adapter(base, model.lora) if model.lora is not None else base


def _shape(config: Any, path: str, lora_rank: int) -> Shape:
    try:
        return shape_of(config.get_text_config(), lora_rank)
    except ValueError as error:
        raise UserError(f"{path}: {error}; the planner knows dense decoders such as Llama and Qwen") from None
