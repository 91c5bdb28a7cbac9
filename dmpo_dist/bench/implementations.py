"""Our training step with the prompt shared and with separate rows, to compare with TRL's in ``trl_pairs.py``.

All implementations have the same random weights and adapters, read the same token ids, and take the same step:
reference forward with adapters off, policy forward, objective, backward, AdamW on the adapters. The time of a step
includes laying out (ours) or collating (TRL).
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from dmpo_dist.batching.layout import RowsLayout, lay_out
from dmpo_dist.batching.synthetic import END_TOKEN, PAD_TOKEN
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.compile import compile_layers
from dmpo_dist.modeling.logprobs import LogProbModel
from dmpo_dist.modeling.routing import take_route
from dmpo_dist.objectives.dmpo import Dmpo
from dmpo_dist.training.groups import groups_of

LORA_RANK = 16
MAX_TOKENS = {"cpu": 8_192, "cuda": 20_000}
"""Device -> batches or rows of several groups are tried up to this many tokens. Larger ones may not fit into memory and
cannot be faster, as these fill the device."""
ROWS = {"cpu": (1, 2, 4), "cuda": (1, 8, 16, 24, 32)}
"""Device -> numbers of groups in a row to try."""
ACCUMULATED = {"cpu": (1, 4), "cuda": (1,)}
"""Device -> numbers of groups in an optimizer step to try. A CPU is fastest with short rows, but AdamW need not run
after each of them."""
BENCH_MODEL: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 64, "intermediate_size": 1024, "max_position_embeddings": 8192,
    "initializer_range": 0.05, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": END_TOKEN,
    "pad_token_id": PAD_TOKEN,
}  # fmt: skip


@dataclass(frozen=True)
class ModelSpec:
    """The model that all implementations train.

    Attributes:
        config: the content of a config.json, with ``model_type`` and ``vocab_size``; weights are random.
        device: ``cpu`` or ``cuda``.
        dtype: name of a torch dtype, for weights and adapters.
        compiled: whether our decoder layers are compiled by torch.compile, as with ``model.compile``.
        seed: of weights and adapters.
    """

    config: dict[str, Any]
    device: str
    dtype: str
    compiled: bool = False
    seed: int = 0

    @property
    def transformers_config(self) -> Any:
        """The transformers configuration, without dropout.

        Raises:
            UserError: not a model transformers knows.
        """
        from transformers import AutoConfig

        values = {k: v for k, v in self.config.items() if k not in ("model_type", "dtype", "torch_dtype")}
        values |= {k: 0.0 for k in values if k.endswith("dropout")}
        try:
            return AutoConfig.for_model(self.config["model_type"], **values)
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"--model-config: not a configuration transformers can use ({error})") from None


@dataclass(frozen=True)
class Tokens:
    """Tokens of some groups: in separate full rows, as run by the model, and the padding among those run."""

    logical: int
    physical: int
    padding: int


class Implementation(Protocol):
    """One way to train on preference groups."""

    name: str
    groups_per_step: int

    def step(self, groups: Sequence[TokenGroup]) -> None:
        """One optimizer step on ``groups``."""

    def log_probs(self, group: TokenGroup) -> Tensor:
        """(K+1,) the policy's log-probs of the responses, positive first, on the CPU."""

    def tokens(self, group: TokenGroup) -> Tokens:
        """How many tokens ``group`` takes."""

    def batchings(self, group: TokenGroup, device: str) -> Mapping[str, "Implementation"]:
        """name -> the same model with batches worth trying for groups like ``group``, the smallest first."""


def make_base(spec: ModelSpec) -> Any:
    """The random causal LM of ``spec``, without adapters."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(spec.seed)
    with torch.device(spec.device):
        return AutoModelForCausalLM.from_config(spec.transformers_config, dtype=getattr(torch, spec.dtype))


def make_lora() -> Any:
    """The adapters all implementations train."""
    from peft import LoraConfig

    return LoraConfig(
        r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
    )


def fill_adapters(model: Any, spec: ModelSpec) -> None:
    """Fill the adapters with the same non-zero values in every implementation, so that policy and reference differ."""
    generator = torch.Generator().manual_seed(spec.seed + 1)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            values = torch.empty(parameter.shape).normal_(std=0.02, generator=generator)  # the same on any device
            parameter.data = values.to(parameter.device, getattr(torch, spec.dtype))


def make_optimizer(model: Any) -> torch.optim.AdamW:
    """AdamW on the adapters, fused on a GPU."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-5, fused=trained[0].is_cuda)


class LayoutImplementation:
    """Our step with DMPO as the objective; a micro-batch is a row of ``groups_per_row`` groups.

    Attributes:
        attention: the backend in use.
    """

    def __init__(self, spec: ModelSpec, shared: bool, longest: int) -> None:
        from peft import get_peft_model

        self.name = "ours" if shared else "unshared"
        self.groups_per_step = self.groups_per_row = 1
        base = make_base(spec)
        route = take_route(base, spec.device, longest, "auto" if shared else "unshared")
        if shared and route.backend == "unshared":
            raise UserError(f"--model-config: prompts of this model cannot be shared: {route.reason}")
        if spec.compiled:
            compile_layers(base)
        peft = get_peft_model(base, make_lora()).train()
        fill_adapters(peft, spec)
        self.attention, self._shared, self._device = route.backend, shared, spec.device
        self._model = LogProbModel(peft, "adapter_off")
        self._optimizer = make_optimizer(self._model)
        self._objective = Dmpo()

    def with_rows(self, groups_per_row: int, groups_per_step: int) -> Self:
        """The same model with other rows and steps."""
        other = copy(self)
        other.groups_per_row, other.groups_per_step = groups_per_row, groups_per_step
        return other

    def batchings(self, group: TokenGroup, device: str) -> dict[str, Self]:
        tokens, found = self.tokens(group).physical, {}
        for row, least in product(ROWS[device], ACCUMULATED[device]):
            step = max(row, least)
            if step == 1 or step * tokens <= MAX_TOKENS[device]:
                found[f"{row}" if row == step else f"{row} ({step} a step)"] = self.with_rows(row, step)
        return found

    def step(self, groups: Sequence[TokenGroup]) -> None:
        for start in range(0, len(groups), self.groups_per_row):
            row = groups[start : start + self.groups_per_row]
            (self._loss(row) / len(groups)).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _loss(self, groups: Sequence[TokenGroup]) -> Tensor:
        layout = lay_out(groups, self._shared).to(self._device)
        with torch.no_grad():
            reference = self._model(layout, "reference")
        loss, _ = self._objective(self._model(layout), reference, groups_of(layout.targets))
        return loss

    @torch.no_grad()
    def log_probs(self, group: TokenGroup) -> Tensor:
        return self._model(lay_out([group], self._shared).to(self._device)).cpu()

    def tokens(self, group: TokenGroup) -> Tokens:
        layout = lay_out([group], self._shared)
        padding = int((layout.attention_mask == 0).sum()) if isinstance(layout, RowsLayout) else 0
        return Tokens(layout.logical_tokens, layout.physical_tokens, padding)
