"""Which attention backend a model can use on a device, and why."""

from dataclasses import dataclass
from typing import Any, Literal

from dmpo_dist.errors import UserError
from dmpo_dist.modeling.attention import DENSE, TWO_PART, register

Backend = Literal["two_part", "sdpa", "unshared"]


@dataclass(frozen=True)
class Route:
    """A backend and the reason it was chosen, one sentence for the log."""

    backend: Backend
    reason: str


def choose_backend(model: Any, device_type: str, max_length: int, requested: str = "auto") -> Route:
    """Route ``model`` (a transformers causal LM) to the best backend that computes it exactly.

    Args:
        model: not wrapped by PEFT or DeepSpeed.
        device_type: ``cpu`` or ``cuda``.
        max_length: longest prompt plus response in tokens.
        requested: ``model.attention`` of the configuration; anything but ``auto`` is honoured or refused.

    Raises:
        UserError: the requested backend would be wrong for the model.
    """
    obstacle = _obstacle(model)
    if obstacle:
        best = Route("unshared", f"{obstacle}; prompts cannot be shared, each response runs as its own row")
    elif _shortest_window(model) < max_length:
        best = Route("sdpa", f"a sliding window of {_shortest_window(model)} is shorter than {max_length} positions")
    elif device_type != "cpu":
        best = Route("sdpa", "two_part has only been proven on the CPU")
    else:
        best = Route("two_part", "full attention without masks")
    if requested in ("auto", best.backend):
        return best
    if requested == "unshared":
        return Route("unshared", "asked for by model.attention")
    if requested == "sdpa" and not obstacle:
        return Route("sdpa", "asked for by model.attention")
    raise UserError(
        f"model.attention={requested} would be wrong for this model: {best.reason}; "
        f"use model.attention={best.backend} or auto"
    )


def use_backend(model: Any, backend: Backend) -> None:
    """Make ``model`` (a transformers causal LM) compute its attention by ``backend``."""
    register()
    names = {"two_part": TWO_PART, "sdpa": DENSE}
    model.set_attn_implementation(names.get(backend) or native_attention(model))


def _obstacle(model: Any) -> str | None:
    """What keeps responses of this model from sharing their prompt."""
    config = model.config
    name = config.model_type
    if not getattr(model, "_supports_attention_backend", False):
        return f"{name} does not support registered attention functions"
    odd = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if odd:
        return f"{name} has layers of type {', '.join(sorted(odd))}, whose state would leak between responses"
    if any(part.endswith("sinks") for part, _ in model.named_parameters()):
        return f"{name} has attention sinks"
    if getattr(config, "attn_logit_softcapping", None):
        return f"{name} soft-caps its attention logits"
    if getattr(config, "attention_dropout", 0) or getattr(config, "attn_pdrop", 0):
        return f"{name} has attention dropout"
    return None


def _shortest_window(model: Any) -> float:
    """The shortest sliding window among the layers, infinite where there is none."""
    config = model.config
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    in_use = "sliding_attention" in layer_types if layer_types else getattr(config, "use_sliding_window", True)
    return window if window and in_use else float("inf")


def native_attention(model: Any) -> str:
    """The implementation for separate rows: eager where SDPA would leave out soft-capping or sinks."""
    eager = getattr(model.config, "attn_logit_softcapping", None) or any(
        part.endswith("sinks") for part, _ in model.named_parameters()
    )
    return "eager" if eager or not getattr(model, "_supports_sdpa", True) else "sdpa"
