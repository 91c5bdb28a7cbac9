"""Whether a model can be trained and scored here at all, as far as its configuration and tokenizer say."""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.errors import UserError

CAUSAL_REGARDLESS = frozenset({"gpt_neox", "gpt_neox_japanese", "reformer", "trocr"})
"""Types whose attention is causal although their configuration has ``is_decoder: false``."""

EXPERTS_BY_CHANCE = {"phimoe": "its SparseMixer router draws experts at random while it trains"}
"""Types that compute something else in training mode, whatever noise is set to 0."""

ALSO_A_THRESHOLD = frozenset({("phimoe", "router_jitter_noise")})
"""Keys that are named like noise and change what the model computes without any."""


def require_causal(config: Any, path: str) -> None:
    """Refuse a transformers configuration of a model that is no causal language model.

    Raises:
        UserError: an encoder-decoder, a model that sees both ways, or one without a head over its vocabulary.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        what = "an encoder-decoder"
    elif kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        what = "not a causal language model"
    elif getattr(config, "is_decoder", None) is False and kind not in CAUSAL_REGARDLESS:
        what = "an encoder, whose tokens see those after them (is_decoder is false)"
    else:
        return
    raise UserError(
        f"{path}: {kind} is {what}; responses are scored from left to right here, so give a decoder-only model, such "
        "as Llama, Qwen or Gemma"
    )


def require_embedded(tokenizer: Any, config: Any, path: str) -> None:
    """Refuse a tokenizer with ids that the model has no row of its embedding for.

    A special token that begins or ends nothing may lie beyond the embedding, as <image_soft_token> does in the text
    models of Gemma 3: titles cannot hold it. ``require_known_ids`` looks at what is really read.

    Raises:
        UserError: such an id can come out of a text, or is the begin or end token.
    """
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if rows is None:
        return
    harmless = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    harmless -= {tokenizer.bos_token_id, tokenizer.eos_token_id}
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= rows and i not in harmless}
    if beyond:
        first = min(beyond)
        raise UserError(
            f"{path}: its tokenizer has ids up to {max(beyond)}, but its embedding has {rows} rows; the first token "
            f"without one is {beyond[first]!r} ({first}). Enlarge the model (model.resize_token_embeddings of "
            "transformers) and save it again, or put the tokenizer the model was trained with beside it"
        )


def require_known_ids(groups: Sequence[TokenGroup], config: Any) -> None:
    """Raise UserError where ``groups`` hold an id that the model's embedding has no row for."""
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if rows is None:
        return
    for group in groups:
        largest = max(chain(group.prefix, *group.branches))
        if largest >= rows:
            raise UserError(
                f"{config.model_type}: the template writes token {largest}, but the embedding has {rows} rows; "
                "correct the template or the chat template, or enlarge the model's embedding"
            )


def noise_of(config: Any) -> dict[str, float]:
    """Keys of a transformers configuration, and of those inside it, that add noise in training mode, by value.

    Dropout, layers that are skipped at random and routers that jitter; those that are 0 already are left out.
    """
    return {key: value for part, key, value in _noise(config)}


def silence(config: Any) -> None:
    """Set all ``noise_of`` the configuration to 0: policy and reference must see the same network."""
    for part, key, _ in list(_noise(config)):
        setattr(part, key, 0.0)


def noise_note(config: Any) -> str | None:
    """What the log says of noise that was set to 0, other than dropout; None where there is none."""
    named = [f"{key}={value:g}" for key, value in noise_of(config).items() if not _is_dropout(key)]
    if not named:
        return None
    return (
        f"{config.model_type}: {', '.join(named)} is set to 0, as dropout is: policy and reference must see the same "
        "network"
    )


def require_deterministic(config: Any, path: str) -> None:
    """Refuse to train a type whose network is random in training mode by design; raises UserError."""
    why = EXPERTS_BY_CHANCE.get(config.model_type)
    if why:
        raise UserError(
            f"{path}: {config.model_type} cannot be trained here: {why}, so policy and reference would not see the "
            "same network; it can be evaluated and ranked with"
        )


def _noise(config: Any) -> Iterator[tuple[Any, str, float]]:
    """(configuration, key, value) of all noise, nested configurations included."""
    for key, value in list(vars(config).items()):
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            yield from _noise(value)
        jitters = "jitter" in key and (config.model_type, key) not in ALSO_A_THRESHOLD
        if isinstance(value, float) and value and (_is_dropout(key) or jitters or "layerdrop" in key):
            yield config, key, value


def _is_dropout(key: str) -> bool:
    return "dropout" in key or key.endswith("pdrop")
