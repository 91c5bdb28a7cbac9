"""Which attention backend a model can use on a device, and why."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dmpo_dist.errors import UserError
from dmpo_dist.modeling.attention import DENSE, FLEX, TWO_PART, register
from dmpo_dist.modeling.flash import varlen_obstacle
from dmpo_dist.modeling.rotary import rotary_limit

Backend = Literal["two_part", "flex", "sdpa", "unshared"]

BACKENDS: tuple[Backend, ...] = ("two_part", "flex", "sdpa", "unshared")
"""Fastest first."""

PROVEN: dict[str, frozenset[Backend]] = {
    "cpu": frozenset({"two_part", "sdpa", "unshared"}),
    "cuda": frozenset({"two_part", "flex", "sdpa", "unshared"}),
}
"""For each device the backends whose log-probs and gradients were compared there with the oracle."""

PLAIN: frozenset[Backend] = frozenset({"sdpa", "unshared"})
"""Backends of torch's own masked attention and nothing of ours, which ``auto`` may take without proof."""

_DESCRIPTION: dict[Backend, str] = {
    "two_part": "full attention without masks",
    "flex": "a mask by blocks",
    "sdpa": "a dense mask",
    "unshared": "each response runs as its own row",
}
_NO_CPU_FLEX = "flex attention has no backward pass on the CPU"


@dataclass(frozen=True)
class Route:
    """A backend and the reason it was chosen, one sentence for the log."""

    backend: Backend
    reason: str


@dataclass(frozen=True)
class Attention:
    """What a model's attention asks of a backend.

    Attributes:
        obstacle: what keeps responses from sharing their prompt at all, None where nothing does.
        window: the shortest sliding window among the layers, infinite where there is none.
        softcap: whether the attention logits are soft-capped.
        head_dim: the widest head.
        narrow_values: whether values have another width than queries and keys.
        dtype: of the weights.
    """

    obstacle: str | None = None
    window: float = float("inf")
    softcap: bool = False
    head_dim: int = 64
    narrow_values: bool = False
    dtype: torch.dtype = torch.bfloat16


def choose_backend(model: Any, device_type: str, max_length: int, requested: str = "auto") -> Route:
    """Route ``model`` (a transformers causal LM) to the best backend that computes it exactly.

    Args:
        model: not wrapped by PEFT or DeepSpeed.
        device_type: ``cpu`` or ``cuda``.
        max_length: longest prompt plus response in tokens.
        requested: ``model.attention`` of the configuration; anything but ``auto`` is honoured or refused.

    Raises:
        UserError: the requested backend, or any, would be wrong for the model.
    """
    _require_whole_rows(model.config.get_text_config(), max_length)
    attention = attention_of(model, max_length)
    best = route(attention, device_type, max_length)
    if requested in ("auto", best.backend):
        return best
    wanted: Backend = next(backend for backend in BACKENDS if backend == requested)
    obstacle = _obstacle(wanted, attention, device_type, max_length)
    if obstacle:
        raise UserError(
            f"model.attention={wanted} would be wrong for this model: {obstacle}; "
            f"use model.attention={best.backend} or auto"
        )
    proven = wanted in PROVEN[device_type] or wanted in PLAIN
    doubt = "" if proven else f"; not yet proven on {device_type}: heed the check against separate rows at the start"
    return Route(wanted, f"asked for by model.attention{doubt}")


def route(attention: Attention, device_type: str, max_length: int) -> Route:
    """What ``auto`` takes: the fastest backend without an obstacle that is proven on the device, or plain."""
    passed_over, unproven = [], []
    for backend in BACKENDS:
        obstacle = _obstacle(backend, attention, device_type, max_length)
        if obstacle is None and (backend in PROVEN[device_type] or backend in PLAIN):
            if unproven:
                passed_over.append(f"{' and '.join(unproven)} not yet proven on {device_type}")
            return Route(backend, "; ".join([*passed_over, _DESCRIPTION[backend]]))
        if obstacle is None:
            unproven.append(backend)
        elif obstacle not in passed_over and obstacle != _NO_CPU_FLEX:
            passed_over.append(obstacle)
    raise AssertionError("unshared has no obstacles")


def typical_routes(device_type: str, dtype: torch.dtype) -> Iterator[tuple[str, Route]]:
    """What ``auto`` takes on a device for kinds of model that differ in it."""
    kinds = {
        "full attention (Llama, Qwen, Phi)": Attention(dtype=dtype),
        "short windows (Gemma 3, Mistral 0.1)": Attention(window=512, dtype=dtype),
        "soft-capped (Gemma 2)": Attention(softcap=True, dtype=dtype),
        "sinks or state (gpt-oss, Mamba)": Attention("they have sinks or a state that would leak", dtype=dtype),
    }
    for kind, attention in kinds.items():
        yield kind, route(attention, device_type, 4096)


def use_backend(model: Any, backend: Backend) -> None:
    """Make ``model`` (a transformers causal LM) compute its attention by ``backend``."""
    register()
    names = {"two_part": TWO_PART, "flex": FLEX, "sdpa": DENSE}
    model.set_attn_implementation(names.get(backend) or native_attention(model))


def take_route(model: Any, device_type: str, max_length: int, requested: str = "auto") -> Route:
    """``choose_backend`` for ``model`` (not wrapped), and ``use_backend`` with what it says."""
    taken = choose_backend(model, device_type, max_length, requested)
    use_backend(model, taken.backend)
    return taken


def attention_of(model: Any, max_length: int) -> Attention:
    """What ``model`` (a transformers causal LM) asks of a backend for rows of up to ``max_length`` tokens."""
    config = model.config.get_text_config()
    heads = [getattr(config, name, None) for name in ("head_dim", "global_head_dim", "qk_head_dim")]
    known = [width for width in heads if isinstance(width, int)]
    return Attention(
        obstacle=_never_shared(model, max_length),
        window=_shortest_window(config),
        softcap=bool(getattr(config, "attn_logit_softcapping", None)),
        head_dim=max(known) if known else config.hidden_size // max(1, getattr(config, "num_attention_heads", 0) or 1),
        narrow_values=bool(getattr(config, "kv_lora_rank", None)),
        dtype=model.dtype,
    )


def native_attention(model: Any) -> str:
    """The implementation for separate rows: eager where SDPA would leave out soft-capping or sinks."""
    eager = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) or _has_sinks(model)
    return "eager" if eager or not getattr(model, "_supports_sdpa", True) else "sdpa"


def _obstacle(backend: Backend, attention: Attention, device_type: str, max_length: int) -> str | None:
    """Why ``backend`` would be wrong or impossible, None where it is neither."""
    if backend == "unshared":
        return None
    if attention.obstacle:
        return f"{attention.obstacle}; prompts cannot be shared"
    if backend != "flex" and attention.softcap:
        return "its attention logits are soft-capped"
    if backend == "two_part":
        if attention.window < max_length:
            return f"a sliding window of {attention.window} is shorter than {max_length} positions"
        if attention.narrow_values:
            return "its values have another width than its keys"
        return varlen_obstacle(attention.dtype, attention.head_dim) if device_type == "cuda" else None
    if backend == "flex":
        if device_type == "cpu":
            return _NO_CPU_FLEX
        return (
            f"flex attention takes heads of 16 or more, not {attention.head_dim}" if attention.head_dim < 16 else None
        )
    return None


def _never_shared(model: Any, max_length: int) -> str | None:
    """What keeps responses of this model from sharing their prompt, by any backend."""
    config = model.config.get_text_config()
    name = config.model_type
    if not getattr(model, "_supports_attention_backend", False):
        return f"{name} does not support registered attention functions"
    odd = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if odd:
        return f"{name} has layers of type {', '.join(sorted(odd))}, whose state would leak between responses"
    if _has_sinks(model):
        return f"{name} has attention sinks"
    if getattr(config, "attention_dropout", 0) or getattr(config, "attn_pdrop", 0):
        return f"{name} has attention dropout"
    limit = rotary_limit(config)
    if limit is not None and max_length > limit[1]:
        return (
            f"{name} chooses its rotary frequencies ({limit[0]}) by the length of a row beyond {limit[1]} positions, "
            f"and model.max_length allows {max_length}"
        )
    return None


def _require_whole_rows(config: Any, max_length: int) -> None:
    """Refuse rows in which a layer would look at some tokens only (Doge): which ones depends on the whole row and its
    padding, so that even separate rows are not what the model gives alone."""
    kept = getattr(config, "keep_window_size", None)
    if kept and max_length > kept:
        raise UserError(
            f"{config.model_type} attends to {kept} tokens of a longer row, chosen among all of it, so log-probs would "
            f"depend on what is padded; set model.max_length={kept} or less (now {max_length})"
        )


def _has_sinks(model: Any) -> bool:
    return any(part.endswith("sinks") for part, _ in model.named_parameters())


def _shortest_window(config: Any) -> float:
    """The shortest sliding window among the layers, infinite where there is none."""
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    in_use = "sliding_attention" in layer_types if layer_types else getattr(config, "use_sliding_window", True)
    return window if window and in_use else float("inf")
