"""Rotary frequencies that depend on how long the row is: ``longrope`` and ``dynamic`` of transformers.

Transformers chooses them once for a whole batch, by its longest position. So what is packed or padded together with a
response would change its log-probs, by nats. Such a model shares no prompts once rows can exceed the limit, and
``own_frequencies`` gives each of its separate rows the frequencies it would have alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dmpo_dist.batching.layout import RowsLayout

BY_LENGTH = ("longrope", "dynamic")


def rotary_limit(config: Any) -> tuple[str, int] | None:
    """(kind, the most positions whose frequencies are the same in every row); None where length does not matter.

    Args:
        config: a transformers configuration.
    """
    config = config.get_text_config()
    given = getattr(config, "rope_parameters", None) or {}
    limits = []
    for options in [given, *(value for value in given.values() if isinstance(value, dict))]:
        kind = options.get("rope_type")
        if kind == "longrope":
            original = options.get("original_max_position_embeddings")
            limits.append((original or config.max_position_embeddings, kind))
        elif kind == "dynamic":
            limits.append((config.max_position_embeddings, kind))
    if not limits:
        return None
    limit, kind = min(limits)
    return kind, limit


def rotary_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of ``model`` whose frequencies depend on the row's length."""
    found = []
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        kinds = kind.values() if isinstance(kind, dict) else [kind]
        if any(k in BY_LENGTH for k in kinds):
            found.append(module)
    return found


@contextmanager
def own_frequencies(modules: Sequence[nn.Module], limit: int, layout: RowsLayout) -> Iterator[None]:
    """Within, ``modules`` give every row of ``layout`` the frequencies that its whole text has alone.

    The whole text: a row leaves out the last token of its response, but the model's own log-probs are those of a row
    that has it.
    """
    if layout.input_ids.shape[1] + 1 <= limit:
        yield
        return
    lengths = [length + 1 for length in layout.attention_mask.sum(1).tolist()]

    def by_row(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        named = dict(zip(("x", "position_ids", "layer_type"), args, strict=False)) | kwargs
        layer_type = {key: value for key, value in named.items() if key == "layer_type" and value is not None}
        tables = {length: _alone(module, length, named["x"], layer_type) for length in set(lengths)}
        width = batch[0].shape[1]
        cos, sin = ([_resized(tables[length][part], width) for length in lengths] for part in (0, 1))
        return torch.cat(cos), torch.cat(sin)

    handles = [module.register_forward_hook(by_row, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _alone(module: Any, length: int, x: Tensor, layer_type: dict[str, str]) -> tuple[Tensor, Tensor]:
    """Cosines and sines (1, length, D) of a row of ``length`` tokens, of the type and device of ``x``."""
    for name in list(vars(module)):
        if name.endswith("max_seq_len_cached"):
            setattr(module, name, 0)  # ``dynamic`` remembers the longest row so far, and would keep its frequencies
    return module.forward(x[:1], torch.arange(length, device=x.device)[None], **layer_type)


def _resized(table: Tensor, width: int) -> Tensor:
    """(1, length, D) cut or padded to (1, width, D); padding is masked."""
    return torch.nn.functional.pad(table[:, :width], (0, 0, 0, max(0, width - table.shape[1])))
