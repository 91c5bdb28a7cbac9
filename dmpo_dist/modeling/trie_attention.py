"""Attention of the parts of a title trie: each token sees the prompt, whose keys are kept, and its ancestors.

A ``RequestRow`` holds several prompts and parts: each part is computed by itself, with the keys of its own prompt.

One softmax over both kinds of keys in plain arithmetic, so windows (by position) and soft-capping are a mask and a
tanh, and one function serves every device and type. For scoring only: the prompt's keys carry no gradient.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from dmpo_dist.batching.request_row import RequestRow
from dmpo_dist.batching.trie import BeamPart, PromptPart, TriePart
from dmpo_dist.modeling.attention import ordinary_attention, refuse_unknown, repeated
from dmpo_dist.modeling.routing import attention_of

TRIE = "dmpo_trie"

MAX_SCORES = 2**23
"""Most attention scores and gathered keys held at once, whatever the length of a part."""


def trie_obstacle(model: Any, max_length: int) -> str | None:
    """What keeps titles from sharing a prompt in ``model`` (a transformers causal LM), None where nothing does."""
    return attention_of(model, max_length).obstacle


def use_trie_attention(model: Any) -> None:
    """Make ``model`` (a transformers causal LM) compute ``PromptPart``, ``TriePart`` and ``RequestRow`` rows."""
    AttentionInterface.register(TRIE, trie_attention)
    AttentionMaskInterface.register(TRIE, sdpa_mask)
    model.set_attn_implementation(TRIE)


def trie_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: PromptPart | TriePart | RequestRow | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function in transformers' form: q (1, H, T, D), k and v (1, H_kv, T, D) -> (1, T, H, D)."""
    if layout is None:
        return ordinary_attention(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **kwargs,
        )  # fmt: skip
    refuse_unknown(dropout, attention_mask, kwargs)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if isinstance(layout, PromptPart):
        layout.memory[module] = key, value
        out = _causal(query, key, value, scale, sliding_window, softcap)
    elif isinstance(layout, RequestRow):
        out = _requests(module, query, key, value, layout, scale, sliding_window, softcap)
    else:
        out = _behind_prompt(query, key, value, layout, layout.memory[module], scale, sliding_window, softcap)
    return out, None


def _requests(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, row: RequestRow, scale: float,
    window: int | None, softcap: float | None,
) -> Tensor:  # fmt: skip
    """(1, H, T, D) -> (1, T, H, D): new prompts fill their memories, which the parts behind them read at once."""
    out = []
    for at, memory in row.prompts:
        q, k, v = query[:, :, at], key[:, :, at], value[:, :, at]
        memory[module] = k.clone(), v.clone()  # a view would keep the whole row's keys for as long as the prompt's
        out.append(_causal(q, k, v, scale, window, softcap))
    for at, part in row.tries:
        q, k, v = query[:, :, at], key[:, :, at], value[:, :, at]
        prompt = part.memory.get(module, (k[:, :, :0], v[:, :, :0]))  # a prompt of one token is all in the trie
        if isinstance(part, BeamPart):
            k, v = part.grown(module, k, v)
        out.append(_behind_prompt(q, k, v, part, prompt, scale, window, softcap))
    return torch.cat(out, dim=1)


def _causal(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """(1, H, P, D) -> (1, P, H, D), each token to those before it."""
    key, value = repeated(query, key, value)
    length = query.shape[2]
    if softcap is None and (window is None or window >= length):
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    else:
        position = torch.arange(length, device=query.device)
        seen = position <= position[:, None]  # (P, P)
        if window is not None:
            seen &= position > position[:, None] - window
        weights = _softmax(_capped(query @ key.transpose(2, 3) * scale, softcap).masked_fill(~seen, -torch.inf), value)
        out = weights @ value
    return out.transpose(1, 2).contiguous()


def _behind_prompt(
    query: Tensor, key: Tensor, value: Tensor, part: TriePart, prompt: tuple[Tensor, Tensor], scale: float,
    window: int | None, softcap: float | None,
) -> Tensor:  # fmt: skip
    """(1, H, T, D) -> (1, T, H, D): one softmax over a token's prompt (P keys) and ancestors (A keys, itself first).

    Some tokens at a time: gathering ancestors copies their keys and values once for each token.
    """
    kv_heads, per_kv = key.shape[1], query.shape[1] // key.shape[1]
    queries = query[0].unflatten(0, (kv_heads, per_kv)).transpose(1, 2)  # (H_kv, T, G, D), G query heads to a key head
    far_keys, far_values = prompt[0][0], prompt[1][0]  # (H_kv, P, D)
    length, deep = far_keys.shape[1], part.ancestors.shape[1]
    per_token = query.shape[1] * (length + deep) + deep * kv_heads * (key.shape[-1] + value.shape[-1])
    step = max(1, MAX_SCORES // per_token)
    out = []
    for start in range(0, query.shape[2], step):
        q, ancestors = queries[:, start : start + step], part.ancestors[start : start + step]
        own_keys, own_values = key[0][:, ancestors], value[0][:, ancestors]  # (H_kv, t, A, D)
        # The prompt's keys are the same for all tokens, so no copy of them is made: (H_kv, t G, D) @ (H_kv, D, P)
        far = (q.flatten(1, 2) @ far_keys.transpose(1, 2)).unflatten(1, q.shape[1:3])  # (H_kv, t, G, P)
        own = q @ own_keys.transpose(2, 3)  # (H_kv, t, G, A)
        unseen = ancestors < 0  # (t, A), where the way up to the prompt is shorter than the longest
        if window is not None:
            # column a of the ancestors is a positions back; key p of the prompt is position - p back
            unseen = unseen | (torch.arange(deep, device=q.device) >= window)
            position = part.position_ids[0, start : start + step, None]
            beyond = torch.arange(length, device=q.device) <= position - window
            unseen = torch.cat([beyond, unseen], dim=1)
        else:
            unseen = torch.nn.functional.pad(unseen, (length, 0))
        scores = _capped(torch.cat([far, own], dim=-1) * scale, softcap)  # (H_kv, t, G, P + A)
        weights = _softmax(scores.masked_fill_(unseen[:, None], -torch.inf), value)
        mixed = weights[..., length:] @ own_values
        mixed += (weights[..., :length].flatten(1, 2) @ far_values).unflatten(1, q.shape[1:3])
        out.append(mixed.transpose(0, 1).flatten(1, 2))  # (t, H, D)
    return torch.cat(out)[None]


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _softmax(scores: Tensor, like: Tensor) -> Tensor:
    """Over the last dimension, in fp32 for half types."""
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    return torch.softmax(scores, dim=-1, dtype=wide).to(like.dtype)
