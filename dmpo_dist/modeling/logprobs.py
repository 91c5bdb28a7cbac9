"""From a layout to one log-probability per response, in one module that DeepSpeed can wrap."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dmpo_dist.batching.layout import Layout, RowsLayout
from dmpo_dist.batching.request_row import RequestRow
from dmpo_dist.batching.targets import Targets
from dmpo_dist.batching.trie import PromptPart, TriePart
from dmpo_dist.modeling.attention import no_mask
from dmpo_dist.modeling.heads import LogitTransform, backbone_of, check_head, output_head
from dmpo_dist.modeling.lora_targets import require_in_layers
from dmpo_dist.modeling.rotary import own_frequencies, rotary_limit, rotary_modules
from dmpo_dist.modeling.vocabulary_blocks import BlockedLogProbs, product_gradient, within

AnyLayout = Layout | PromptPart | TriePart | RequestRow
Which = Literal["policy", "reference"]

MAX_CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**26}
"""Most logits held at once by kind of device: 64 or 256 MiB in fp32, whatever the vocabulary. A GPU reads the whole
head for every chunk, so that a chunk must have rows enough to be worth it. A CPU in half precision takes chunks of the
vocabulary instead, see ``vocabulary_blocks.py``."""
WIDENED_WEIGHTS = 2**21
"""Most weights of the head that a CPU widens to fp32 at once: 8 MiB, which stay in its cache until they are used."""


class LogProbHead(nn.Module):
    """The language model's head, run on the positions that predict a scored token and on nothing else.

    Shares ``weight`` and ``bias`` with the model's own head; being a module of its own lets ZeRO-3 gather them for
    one call. Accumulates in fp32 (fp64 for fp64 input); ``MAX_CHUNK_LOGITS`` bounds the logits it holds.
    """

    def __init__(self, lm_head: Any, transform: LogitTransform) -> None:
        super().__init__()
        self.weight: nn.Parameter = lm_head.weight
        self.bias: nn.Parameter | None = getattr(lm_head, "bias", None)
        self.transform = transform
        self.max_logits: int | None = None  # None: by the device it runs on; a plan for another device sets it

    def forward(self, hidden: Tensor, targets: Targets) -> Tensor:
        """(P, H) hidden states of all positions -> summed log-probs of responses and histories (``Targets.summed``)."""
        rows = hidden[targets.predict_index]  # (M, H), each source position once
        most = self.max_logits or MAX_CHUNK_LOGITS[rows.device.type]
        chunk = max(1, most // self.weight.shape[0])
        half = rows.dtype in (torch.bfloat16, torch.float16)
        arguments = (rows, self.weight, self.bias, targets.target_row, targets.target_ids, self.transform)
        if half and rows.device.type == "cpu":
            log_probs = BlockedLogProbs.apply(*arguments, max(1, min(most, WIDENED_WEIGHTS) // max(rows.shape)))
        elif rows.shape[0] <= chunk and not half:
            logits = self.transform.logits(rows, self.weight, self.bias)
            log_probs = logits[targets.target_row, targets.target_ids] - logits.logsumexp(-1)[targets.target_row]
        else:
            log_probs = _ChunkedLogProbs.apply(*arguments, chunk)
        return targets.summed(log_probs)


class _ChunkedLogProbs(torch.autograd.Function):
    """log softmax(transform.logits(rows))[target_row, target_ids], a chunk of rows at a time.

    Forward keeps the (M,) log-sum-exp; backward computes each chunk's logits again.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, target_row: Tensor, target_ids: Tensor,
        transform: LogitTransform, chunk: int,
    ) -> Tensor:  # fmt: skip
        # rows (M, H), weight (V, H), target_row and target_ids (N,); N >= M: branches share the row of a prompt's end
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        lse = rows.new_empty(rows.shape[0], dtype=wide)
        picked = rows.new_empty(target_ids.shape[0], dtype=wide)
        for start in range(0, rows.shape[0], chunk):
            logits = transform.logits(rows[start : start + chunk], weight, bias)  # (chunk, V), all that is held of them
            lse[start : start + chunk] = logits.logsumexp(-1)
            local, inside = within(target_row, start, logits.shape[0])
            picked = torch.where(inside, logits[local, target_ids], picked)  # (N,); each target is in one chunk
        ctx.save_for_backward(rows, weight, bias, target_row, target_ids, lse)
        ctx.transform, ctx.chunk = transform, chunk
        return picked - lse[target_row]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore
        rows, weight, bias, target_row, target_ids, lse = ctx.saved_tensors
        transform, chunk = ctx.transform, ctx.chunk
        wants_rows, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        d_rows = torch.empty_like(rows) if wants_rows else None
        d_weight = torch.zeros_like(weight, dtype=lse.dtype) if wants_weight else None
        d_bias = torch.zeros_like(bias, dtype=lse.dtype) if bias is not None and wants_bias else None
        # (M,) upstream gradients of all targets that a row predicts: softmax is subtracted once for their sum
        per_row = lse.new_zeros(rows.shape[0]).index_add_(0, target_row, upstream)
        for start in range(0, rows.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = transform.logits(rows[part], weight, bias)  # (chunk, V)
            local, inside = within(target_row, start, logits.shape[0])
            gradient = product_gradient(
                logits, lse[part], per_row[part], (local, target_ids), torch.where(inside, upstream, 0.0), transform
            )
            if d_bias is not None:
                d_bias += gradient.sum(0)
            if d_weight is not None:
                d_weight += gradient.T @ rows[part].to(gradient.dtype)
            if d_rows is not None:
                d_rows[part] = gradient.to(weight.dtype) @ weight
        return (
            d_rows,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            *(None,) * 4,
        )


class LogProbModel(nn.Module):
    """Backbone and log-prob head as one module: ``forward(layout) -> (R,) log-probs``.

    Args:
        causal_lm: a transformers causal LM, or a PEFT model around one.
        reference: how ``forward(layout, "reference")`` differs: ``adapter_off`` runs without adapters,
            ``adapter_copy`` with the frozen adapter named "reference", ``whole`` as it is (a model that is nothing but
            a reference); None where there is no reference here.

    Raises:
        UserError: the model has a head that ``LogProbHead`` cannot stand in for, or an adapter around its layers.
    """

    def __init__(
        self, causal_lm: nn.Module, reference: Literal["adapter_off", "adapter_copy", "whole"] | None = None
    ) -> None:
        super().__init__()
        self.causal_lm: Any = causal_lm
        self.reference = reference
        require_in_layers(causal_lm)
        language_model = unwrap_peft(causal_lm)
        check_head(language_model)
        self.head = LogProbHead(output_head(language_model), LogitTransform.of(language_model.config))
        self._rotary_limit = rotary_limit(language_model.config)

    def forward(self, layout: AnyLayout, which: Which = "policy") -> Tensor:
        """Log-probs summed over each response's scored tokens, fp32 or wider.

        Returns:
            (R,) of the responses; where the layout scores histories, the policy's (R + G,), see ``Targets.split``.
        """
        if which == "policy":
            return self._log_probs(layout, layout.targets)
        targets = layout.reference_targets or layout.targets
        if self.reference == "whole":
            return self._log_probs(layout, targets)
        if self.reference == "adapter_off":
            with self.causal_lm.disable_adapter():
                return self._log_probs(layout, targets)
        if self.reference == "adapter_copy":
            self.causal_lm.base_model.set_adapter("reference", inference_mode=True)
            try:
                return self._log_probs(layout, targets)
            finally:
                self.causal_lm.base_model.set_adapter("default")
        raise RuntimeError("this model holds no reference")

    def _log_probs(self, layout: AnyLayout, targets: Targets) -> Tensor:
        language_model = unwrap_peft(self.causal_lm)
        with self._frequencies(language_model, layout):
            hidden = backbone_of(language_model)(**forward_arguments(layout), use_cache=False).last_hidden_state
        return self.head(hidden.flatten(0, 1), targets)

    def _frequencies(self, language_model: Any, layout: AnyLayout) -> AbstractContextManager[None]:
        """Where rotary frequencies depend on a row's length: its own for each row."""
        if self._rotary_limit is None or not isinstance(layout, RowsLayout):
            return nullcontext()
        return own_frequencies(rotary_modules(language_model), self._rotary_limit[1], layout)


def forward_arguments(layout: AnyLayout) -> dict[str, Any]:
    """The keywords of a backbone's forward for ``layout``."""
    if isinstance(layout, RowsLayout):
        return {
            "input_ids": layout.input_ids,
            "position_ids": layout.position_ids,
            "attention_mask": layout.attention_mask,
        }
    return {
        "input_ids": layout.input_ids,
        "position_ids": layout.position_ids,
        "attention_mask": no_mask(layout.input_ids.device),
        "layout": layout,
    }


def unwrap_peft(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model
