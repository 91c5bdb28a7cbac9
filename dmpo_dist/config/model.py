"""The ``model`` and ``template`` sections: the backbone, its adapters, and how a history becomes a prompt."""

import re
from datetime import date as Date
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from dmpo_dist.config.section import PathText, Section

PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")
CANDIDATES = "{candidates}"
"""Where ``template.request`` lists the candidates."""


class TemplateConfig(Section):
    """How a history becomes a prompt and a title becomes a response. ``{end}`` stands for the terminator."""

    preamble: str = "A user liked these titles, oldest first:\n"
    """Text before the history. {age} and the like are fields of the user (``data.source.users_columns``)."""
    item: str = "- {title}\n"
    """One history item; must contain {title}. {genres}, {description} and the like are fields of the item, see
    ``data.source.columns`` and ``items_columns``."""
    request: str = "The title this user will like next:\n"
    """Text between the history and the response, which may have fields of the user. {candidates} in it, once, lists the
    titles to choose from there, in an order drawn for each request by the run's seed."""
    candidate: str = "- {title}\n"
    """One title of that list; must contain {title} and may have fields of the item. Without {candidates} in ``request``
    it has no effect."""
    response: str = "{title}"
    """The response without its terminator; must contain {title}, and no other field."""
    terminator: str = "{eos}"
    """What ends a response; {eos} is the tokenizer's end token. Ignored with a chat template, which ends turns."""
    chat: Literal["auto", "always", "never"] = "auto"
    """Wrap the prompt in the tokenizer's chat template: when it has one, always, or never."""
    date: str = "2024-07-26"
    """YYYY-MM-DD: what a chat template that prints today's date prints instead, so that a model is asked the same on
    every day."""

    @property
    def lists_candidates(self) -> bool:
        """Whether prompts list the candidates."""
        return CANDIDATES in self.request

    @property
    def item_fields(self) -> tuple[str, ...]:
        """Fields of items that prompts show, beside the title."""
        shown = self.item + (self.candidate if self.lists_candidates else "")
        return tuple(sorted({*PLACEHOLDER.findall(shown)} - {"title", "end"}))

    @property
    def user_fields(self) -> tuple[str, ...]:
        """Fields of users that prompts show."""
        return tuple(sorted({*PLACEHOLDER.findall(self.preamble + self.request)} - {"candidates"}))

    @field_validator("date", mode="before")
    @classmethod
    def _is_a_day(cls, value: Any) -> str:
        try:
            return (value if isinstance(value, Date) else Date.fromisoformat(value)).isoformat()
        except (TypeError, ValueError):
            raise ValueError("must be a date such as 2024-07-26") from None

    @field_validator("item", "candidate", "response")
    @classmethod
    def _has_title(cls, value: str) -> str:
        if "{title}" not in value:
            raise ValueError("must contain {title}")
        return value

    @field_validator("preamble", "request", "response", "terminator")
    @classmethod
    def _known_placeholders(cls, value: str, info: ValidationInfo) -> str:
        named = set(PLACEHOLDER.findall(value))
        if info.field_name in ("preamble", "request"):
            wrong, known = named & {"title", "end", "eos"}, "fields of users"
        else:
            known = "{title}" if info.field_name == "response" else "{eos}"
            wrong = {name for name in named - {"candidates"} if f"{{{name}}}" != known}
        if wrong:
            raise ValueError(f"{{{min(wrong)}}} is no placeholder of template.{info.field_name}, which takes {known}")
        return value

    @field_validator("preamble", "item", "candidate", "response", "terminator")
    @classmethod
    def _lists_nothing(cls, value: str) -> str:
        if CANDIDATES in value:
            raise ValueError("{candidates} belongs into template.request")
        return value

    @field_validator("request")
    @classmethod
    def _lists_once(cls, value: str) -> str:
        if value.count(CANDIDATES) > 1:
            raise ValueError("must contain {candidates} at most once")
        return value


class ScratchModel(Section):
    """A small Llama trained from nothing, with a tokenizer learned from the catalogue's titles."""

    hidden_size: int = Field(64, ge=8)
    """Width of the layers."""
    layers: int = Field(3, ge=1)
    """Number of decoder layers."""
    heads: int = Field(4, ge=1)
    """Attention heads of a layer; their number divides ``hidden_size``."""
    intermediate_size: int = Field(192, ge=8)
    """Width of the feed-forward part of a layer."""
    vocab_size: int = Field(1024, ge=64)
    """Upper limit of the learned vocabulary."""


class LoraConfig(Section):
    """Low-rank adapters (PEFT) on all linear layers by default."""

    r: int = Field(16, ge=1)
    """Rank of the adapters."""
    alpha: float = Field(32.0, gt=0)
    """Scale of the adapters: their output is multiplied by alpha / r."""
    target_modules: str | list[str] = "all-linear"
    """Layers that get an adapter, by the ends of their names; all-linear takes every linear layer but the head."""
    variant: Literal["lora", "rslora", "dora"] = "lora"
    """rslora scales by alpha / sqrt(r); dora trains the length of each weight column beside its direction."""


class ModelConfig(Section):
    path: PathText = "scratch"
    """A model folder or hub id, a folder written by an earlier stage, a GGUF file (converted once), the name of a
    model that ``dmpo models fetch`` brought, or "scratch"."""
    scratch: ScratchModel = Field(default_factory=ScratchModel)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights and the arithmetic."""
    lora: LoraConfig | None = None
    """Train adapters of this shape; None trains all weights. A stage that starts from an adapter keeps its shape."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Round the frozen base of an adapter to 4 bits (nf4) or 8 (int8, for scoring only), by bitsandbytes; policy and
    reference share it."""
    double_quantization: bool = True
    """Also round the scales of nf4, which saves another 0.37 bits per weight."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    compile: bool = False
    """Compile the decoder layers with torch.compile: a minute or more at the start, then some 1.25 times faster steps
    of an 8B model on a GPU. Not with ZeRO-3."""
    attention: Literal["auto", "two_part", "flex", "sdpa", "unshared"] = "auto"
    """How K+1 responses share their prompt: auto picks by model and device (see ``dmpo doctor``); unshared runs
    separate rows."""
    max_length: int = Field(512, ge=8)
    """Longest prompt plus response in tokens; the oldest history is dropped to fit."""
