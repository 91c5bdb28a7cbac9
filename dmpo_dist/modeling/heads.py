"""What a language model does between its last hidden state and its logits, and whether we do the same."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from dmpo_dist.errors import UserError

MULTIPLIERS = ("logit_scale", "lm_head_multiplier")  # Cohere; Falcon-H1
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite, MiniCPM3; Inkling
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma; RecurrentGemma; xLSTM
INVERTED = {"hyperclovax"}  # multiplies by what others divide by


class LogitTransform(NamedTuple):
    """logits = cap(scale * (hidden @ weight.T + bias)), where cap(x) = softcap * tanh(x / softcap) or x."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> "LogitTransform":
        """What a transformers configuration says of it."""
        config, scale = config.get_text_config(), 1.0
        for names, power in ((MULTIPLIERS, 1), (DIVISORS, -1)):
            for name in names:
                scale *= (getattr(config, name, None) or 1.0) ** power
        caps = [getattr(config, name, None) for name in SOFT_CAPS]
        return cls(1 / scale if config.model_type in INVERTED else scale, next(filter(None, caps), None))

    def logits(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(M, H) hidden states -> (M, V) logits, at least fp32."""
        logits = wide_product(rows, weight)
        if bias is not None:
            logits = logits + bias
        if self.scale != 1.0:
            logits = logits * self.scale
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits


def wide_product(rows: Tensor, weight: Tensor) -> Tensor:
    """(M, H) and (V, H) -> (M, V), accumulated and kept in fp32 for half types.

    A logit of 20 rounded to bf16 is off by up to 0.06, and log-probabilities would be as well.
    """
    if rows.dtype not in (torch.bfloat16, torch.float16):
        return linear(rows, weight)
    if rows.is_cuda:
        return torch.mm(rows, weight.T, out_dtype=torch.float32)  # not differentiable everywhere, see _ChunkedLogProbs
    return linear(rows.float(), weight.float())


def backbone_of(language_model: Any) -> Any:
    """The part of ``language_model`` (a transformers causal LM) that ends with the last hidden state.

    Raises:
        UserError: it cannot be found.
    """
    for name in (language_model.base_model_prefix, "model"):  # Llama 4 names a prefix it does not have
        if hasattr(language_model, name):
            return getattr(language_model, name)
    raise UserError(f"{language_model.config.model_type}: its backbone cannot be found; this model type cannot be used")


def output_head(language_model: Any) -> Any:
    """The module of ``language_model`` (a transformers causal LM) that holds the head's weight and bias.

    Raises:
        UserError: there is none, or it carries an adapter, which a head of our own would leave out.
    """
    head = language_model.get_output_embeddings()
    name = language_model.config.model_type
    if head is None or not isinstance(getattr(head, "weight", None), nn.Parameter):
        raise UserError(f"{name}: has no output head with one weight; it cannot be trained by log-probabilities here")
    if hasattr(head, "base_layer") or hasattr(head, "modules_to_save"):
        raise UserError(
            f"{name}: the adapter reaches the output head, which must stay as it is; "
            'leave it out of model.lora.target_modules ("all-linear" does)'
        )
    return head


@torch.no_grad()
def check_head(language_model: Any) -> None:
    """Compare ``LogitTransform`` with the model's own logits on a few tokens, and see that later ones change nothing.

    Costs three forwards of four tokens. A model on the meta device, or whose weights ZeRO-3 has partitioned already, is
    not checked: it cannot run. Nor is one whose logits are not finite.

    Raises:
        UserError: the model's logits come about in another way, it is not causal, or it is random.
    """
    head, config = output_head(language_model), language_model.config
    if any(p.is_meta or hasattr(p, "ds_id") for p in language_model.parameters()):
        return
    ids = torch.arange(1, 5, device=head.weight.device)[None] % head.weight.shape[0]
    with torch.compiler.set_stance("force_eager"):  # compiled layers need no graphs for this
        expected = language_model(input_ids=ids, use_cache=False).logits[0].double()
        hidden = _hidden(language_model, ids)
        if not expected.isfinite().all():
            return  # weights that diverged or are damaged say nothing of the head; whoever uses the log-probs finds out
        _require_causal(language_model, ids, hidden)
    seen = LogitTransform.of(config).logits(hidden.to(head.weight.dtype), head.weight, getattr(head, "bias", None))
    exact = head.weight.dtype in (torch.float32, torch.float64)
    tolerance = (1e-4 if exact else 2e-2) * max(1.0, expected.abs().max().item())
    error = (seen.double() - expected).abs().max().item() if seen.shape == expected.shape else float("inf")
    if not error <= tolerance:
        raise UserError(
            f"{config.model_type}: its logits differ by {error:.2g} from the scaled and soft-capped product of hidden "
            "states and head, so log-probabilities would be wrong; this model type cannot be used, please report it"
        )


def _require_causal(language_model: Any, ids: Tensor, hidden: Tensor) -> None:
    """Whether ``hidden`` (4, H) of ``ids`` (1, 4) stays the same before a last token that is another one.

    A router may turn to another expert on account of a last bit and move one token; what sees the future, or is random,
    moves them all.
    """
    other = ids.clone()
    other[0, -1] = 0
    if not _all_move(hidden, _hidden(language_model, other)):
        return
    if _all_move(hidden, _hidden(language_model, ids)):
        raise UserError(
            f"{language_model.config.model_type}: gives other hidden states each time it reads the same tokens, so "
            "policy and reference would not be the same network; turn off what is random in it (noise, dropout) in its "
            "config.json, or use another model type"
        )
    raise UserError(
        f"{language_model.config.model_type}: its tokens see those after them, so log-probabilities of responses would "
        "be wrong; give a causal (decoder-only) language model"
    )


def _all_move(before: Tensor, after: Tensor) -> bool:
    change = (after - before)[:-1].double().norm(dim=-1) / before[:-1].double().norm(dim=-1).clamp(min=1e-9)
    return bool((change > (1e-3 if before.dtype in (torch.float32, torch.float64) else 2e-2)).all())


def _hidden(language_model: Any, ids: Tensor) -> Tensor:
    return backbone_of(language_model)(input_ids=ids, use_cache=False).last_hidden_state[0]
