"""Which layers an adapter reaches, and what a user who named them should know."""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import nn

from dmpo_dist.errors import UserError

LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
LINEAR = ("Linear", "Conv1D")
"""What names of classes of linear layers hold, those of bitsandbytes too; GPT-2 calls them Conv1D."""
AROUND_THE_MODEL = frozenset({"XLORA", "POLY"})
"""PEFT's types that mix adapters as the forward pass of the PEFT model says."""

Targets = str | Sequence[str]


def require_in_layers(model: Any) -> None:
    """Refuse adapters that do their work in the forward pass of the PEFT model, which log-probs go past.

    Prompt and prefix tuning put tokens or keys before a text, X-LoRA and Poly mix adapters by the text or a task, and
    activated LoRA begins at certain tokens: what is computed here would be the base alone.

    Args:
        model: a PEFT model, or a transformers model without an adapter.
    """
    for config in getattr(model, "peft_config", {}).values():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if getattr(config, "alora_invocation_tokens", None):
            kind = "activated LoRA"
        elif not config.is_prompt_learning and kind not in AROUND_THE_MODEL:
            continue
        raise UserError(
            f"an adapter of type {kind} does not lie in the model's layers alone, so log-probs would be those of its "
            "base; give an adapter of another type, such as LoRA, or a whole model"
        )


def require_targets(peft: Any, targets: Targets) -> None:
    """Refuse a list with a name that no layer has; PEFT takes the names that match and leaves out the others.

    Names of experts as older files have them are PEFT's own to translate: it takes them off its list.

    Args:
        peft: a PEFT model with the new adapter "default".
        targets: ``model.lora.target_modules`` as it was asked for.

    Raises:
        UserError: a name matches nothing; the message lists what there is.
    """
    if isinstance(targets, str):
        return  # PEFT itself refuses an expression that matches nothing
    kept, reached = peft.peft_config["default"].target_modules, peft.base_model.targeted_module_names
    missing = [target for target in targets if target in kept and not any(_ends(name, target) for name in reached)]
    if missing:
        raise UserError(no_such_layer(peft.get_base_model(), missing))


def no_such_layer(model: Any, missing: Sequence[str]) -> str:
    """What to tell a user whose ``missing`` names are no layers of ``model`` (a transformers causal LM)."""
    there = sorted({name.rpartition(".")[2] for name in _linear_layers(model)})
    return (
        f"model.lora.target_modules={list(missing)}: not found in this {model.config.model_type}, whose "
        f'linear layers are {", ".join(there)}; name those, or "all-linear"'
    )


def reach_note(peft: Any, targets: Targets) -> str | None:
    """What the log says where an adapter leaves out layers one might think it reaches; None where it does not.

    Args:
        peft, targets: as in ``require_targets``.
    """
    model, reached = peft.get_base_model(), set(peft.base_model.targeted_module_names)
    parts = [] if targets == "all-linear" else _partly(reached, model.config.get_text_config().num_hidden_layers)
    asked = [name for name in _linear_layers(model) if _is_asked(name, targets)]
    left_out = _patterns(name for name in asked if name not in reached)
    if left_out:
        parts.append(f"not {', '.join(left_out)}, which PEFT leaves out beside experts")
    parameters = set(peft.base_model.targeted_parameter_names)
    stacked = _patterns(
        name
        for name, parameter in ((name.replace(".base_layer", ""), p) for name, p in model.named_parameters())
        if "experts." in name
        and ".lora_" not in name
        and name not in parameters
        and len(getattr(parameter, "ds_shape", parameter.shape)) == 3
    )
    if stacked:
        parts.append(f"none of the experts ({', '.join(stacked)}), which stay frozen")
    return f"the adapter reaches {'; '.join(parts)}" if parts else None


def _partly(reached: set[str], everywhere: int) -> list[str]:
    """Last parts of the names of adapted layers that only some of the decoder's layers have."""
    by_name: dict[str, set[str]] = defaultdict(set)
    for name in reached:
        layer = LAYER.search(name)
        if layer:
            by_name[name.rpartition(".")[2]].add(layer[1])
    return [
        f"{name} in {len(layers)} of {everywhere} layers, as the others have none of that name"
        for name, layers in sorted(by_name.items())
        if len(layers) < everywhere
    ]


def _linear_layers(model: Any) -> list[str]:
    """Names of the linear layers below the head, adapters' own left out."""
    head = model.get_output_embeddings()
    return [
        name.removesuffix(".base_layer")
        for name, module in model.named_modules()
        if module is not head and ".lora_" not in name and _is_linear(module)
    ]


def _is_linear(module: nn.Module) -> bool:
    is_wrapper = hasattr(module, "base_layer")
    return not is_wrapper and any(kind in type(module).__name__ for kind in LINEAR)


def _is_asked(name: str, targets: Targets) -> bool:
    if targets == "all-linear":
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(_ends(name, target) for target in targets)


def _patterns(names: Any) -> list[str]:
    """The names, layers' numbers replaced by a star, each once."""
    return sorted({re.sub(r"\.\d+(?=\.)", ".*", name) for name in names})


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)
