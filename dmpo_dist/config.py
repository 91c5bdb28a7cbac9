"""The run configuration: YAML layers, then ``key=value`` overrides, checked against one pydantic schema.

The docstring below each field is its help text; ``dmpo config show`` prints the resolved values.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from dmpo_dist.config_data import DataConfig
from dmpo_dist.config_data import Simulator as Simulator
from dmpo_dist.config_data import Source as Source
from dmpo_dist.config_ranking import EvaluationConfig, RankingConfig
from dmpo_dist.config_section import Section
from dmpo_dist.config_submit import SubmitConfig
from dmpo_dist.config_tracking import TrackingConfig
from dmpo_dist.errors import UserError

CONFIG_VERSION = 1


class TemplateConfig(Section):
    """How a history becomes a prompt and a title becomes a response. ``{end}`` stands for the terminator."""

    preamble: str = "A user liked these titles, oldest first:\n"
    """Text before the history."""
    item: str = "- {title}\n"
    """One history item; must contain {title}."""
    request: str = "The title this user will like next:\n"
    """Text between the history and the response."""
    response: str = "{title}"
    """The response without its terminator; must contain {title}."""
    terminator: str = "{eos}"
    """What ends a response; {eos} is the tokenizer's end token (ignored when a chat template is used: it ends its own turns)."""
    chat: Literal["auto", "always", "never"] = "auto"
    """Wrap the prompt in the tokenizer's chat template: when it has one, always, or never."""

    @field_validator("item", "response")
    @classmethod
    def _has_title(cls, value: str) -> str:
        if "{title}" not in value:
            raise ValueError("must contain {title}")
        return value


class ScratchModel(Section):
    """A small Llama trained from nothing, with a tokenizer learned from the catalogue's titles."""

    hidden_size: int = Field(64, ge=8)
    layers: int = Field(3, ge=1)
    heads: int = Field(4, ge=1)
    intermediate_size: int = Field(192, ge=8)
    vocab_size: int = Field(1024, ge=64)
    """Upper limit of the learned vocabulary."""


class LoraConfig(Section):
    """Low-rank adapters (PEFT) on all linear layers by default."""

    r: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0)
    target_modules: str | list[str] = "all-linear"
    variant: Literal["lora", "rslora", "dora"] = "lora"
    """rslora scales by alpha / sqrt(r); dora trains the length of each weight column beside its direction."""


class ModelConfig(Section):
    path: str = "scratch"
    """A model folder or hub id, a folder written by an earlier stage, or "scratch"."""
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
    """Compile the decoder layers with torch.compile: a minute or more at the start, then some 1.25 times faster steps of an 8B
    model on a GPU. Not with ZeRO-3."""
    attention: Literal["auto", "two_part", "flex", "sdpa", "unshared"] = "auto"
    """How K+1 responses share their prompt: auto picks by model and device (see ``dmpo doctor``); unshared runs
    separate rows."""
    max_length: int = Field(512, ge=8)
    """Longest prompt plus response in tokens; the oldest history is dropped to fit."""


class ObjectiveConfig(Section):
    name: Literal["dmpo", "sdpo", "dpo_pairs", "dmpo_released"] = "dmpo"
    """dmpo | sdpo | dpo_pairs | dmpo_released (see ``objectives.py``)."""
    beta: float = Field(1.0, gt=0)
    """Scale of the log-ratio of policy to reference."""
    sft_weight: float = Field(0.0, ge=0)
    """Adds this times the mean-token negative log-likelihood of the positive."""
    sft_loss_on: Literal["response", "all_titles"] = "response"
    """Take that likelihood over the positive alone, or also over every title of the history, which the shared prompt
    yields at no further forward pass (its items must then end with {end})."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of preferences assumed flipped."""
    reference_free: bool = False
    """Treat all reference log-probs as equal."""
    length_normalize: bool = False
    """Divide log-probs by the number of response tokens."""
    negative_selection: Literal["all", "boundary"] = "all"
    """all, or only the negatives the policy rates at least as high as the positive."""

    @model_validator(mode="after")
    def _loss_on_needs_weight(self) -> "ObjectiveConfig":
        if self.sft_loss_on == "all_titles" and not self.sft_weight:
            raise ValueError("sft_loss_on=all_titles has no effect while sft_weight is 0; set objective.sft_weight")
        return self


class ReferenceConfig(Section):
    cache: Literal["off", "memory", "disk"] = "off"
    """off runs the frozen reference in every step; memory and disk run it once over the training groups before the first
    step, which pays from the second epoch on (and saves full fine-tuning its second copy of the model)."""
    path: Path | None = None
    """Folder for cache=disk, which runs on equal model, data and template share; None puts it in output_dir/reference."""

    @field_validator("cache", mode="before")
    @classmethod
    def _yaml_off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML 1.1 reads off as false

    @model_validator(mode="after")
    def _path_needs_disk(self) -> "ReferenceConfig":
        if self.path is not None and self.cache != "disk":
            raise ValueError(f"path has no effect with cache={self.cache}; set reference.cache=disk")
        return self


class StageConfig(Section):
    """What the two training stages have in common."""

    steps: int | None = Field(None, ge=1)
    """Optimizer steps; overrides epochs."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the training groups."""
    global_batch_size: int = Field(32, ge=1)
    """Preference groups per optimizer step, over all workers."""
    token_budget: Annotated[int, Field(ge=16)] | Literal["auto"] = 4096
    """Most tokens in one packed micro-batch row; auto finds the largest that fits into memory by a short probe."""
    learning_rate: float = Field(1e-4, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after warm-up."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this global norm."""
    validate_every: int = Field(50, ge=1)
    """Steps between two rankings of the validation requests."""
    checkpoint_every: int = Field(100, ge=1)
    """Steps between two checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """Checkpoints kept; older ones are removed."""
    select: Literal["best", "last"] = "best"
    """Which weights become the result: best by ``select_metric`` on validation, or the last."""
    select_metric: Literal["ndcg@10", "hr@1", "mrr", "auc"] = "ndcg@10"
    log_every: int = Field(10, ge=1)
    """Steps between two log lines."""


class SFTConfig(StageConfig):
    loss_on: Literal["response", "all_titles"] = "response"
    """Loss on the response alone, or also on every title of the history (its items must then end with {end})."""
    history_order: Literal["given", "shuffled"] = "given"
    """shuffled permutes each user's titles anew in every epoch, so that any comes to be asked for after any others: more
    to learn from the same likes where their order says little."""


class TrainConfig(StageConfig):
    negatives: int = Field(7, ge=1)
    """K: negatives per preference group in each step."""
    self_check: bool = True
    """Compare one group's fused log-probs with separate rows before the first step, and the first loss with its known value."""


class ClusterConfig(Section):
    workers: int = Field(1, ge=1)
    """Number of training workers (ranks)."""
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: float | None = Field(None, ge=0)
    """GPUs per worker; None takes 1 where the cluster has GPUs, else 0."""
    address: str | None = None
    """Ray cluster to join (as in ``ray.init``); None joins RAY_ADDRESS if set, else starts a local one."""
    max_failures: int = Field(2, ge=0)
    """Worker failures survived by going back to the latest checkpoint."""
    storage_path: str | None = None
    """Shared folder or bucket for checkpoints; None uses the output folder (right for one machine or a shared file system)."""


class RunConfig(Section):
    """Everything a run depends on."""

    version: int = CONFIG_VERSION
    """Version of this schema."""
    output_dir: Path = Path("runs/dmpo")
    """Folder for everything the command writes; must not exist yet unless resuming."""
    seed: int = Field(0, ge=0)
    data: DataConfig = Field(default_factory=DataConfig)
    template: TemplateConfig = Field(default_factory=TemplateConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    reference: ReferenceConfig = Field(default_factory=ReferenceConfig)
    sft: SFTConfig = Field(default_factory=SFTConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    deepspeed: str = "zero2"
    """Name of a file in deepspeed_configs/ (zero0 ... zero3, zero2_offload, ...) or a path to a DeepSpeed JSON."""
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    ranking: RankingConfig = Field(default_factory=RankingConfig)
    submit: SubmitConfig = Field(default_factory=SubmitConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    @field_validator("version")
    @classmethod
    def _known_version(cls, value: int) -> int:
        if value != CONFIG_VERSION:
            raise ValueError(
                f"this configuration is of version {value}, this dmpo reads version {CONFIG_VERSION}; "
                "compare with `dmpo config show` and update the file"
            )
        return value


def load_config(layers: list[Path], overrides: list[str] | None = None) -> RunConfig:
    """Merge YAML ``layers`` in order, apply ``key=value`` ``overrides`` and validate.

    Raises:
        UserError: unreadable file, malformed YAML, unknown key (names the nearest one) or a bad value.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merge(merged, _read_layer(layer))
    for override in overrides or []:
        key, sep, raw = override.partition("=")
        if not sep or not key:
            raise UserError(f"override {override!r} is not of the form key=value, for example train.learning_rate=1e-4")
        merged = _merge(merged, _nest(key.split("."), _parse_value(raw)))
    try:
        return RunConfig.model_validate(merged)
    except ValidationError as error:
        given = [key.partition("=")[0] for key in overrides or []]
        mistaken = [".".join(str(part) for part in e["loc"]) for e in error.errors()]
        on_line = [
            any(key == g or key.startswith(f"{g}.") or g.startswith(f"{key}.") for g in given) for key in mistaken
        ]
        places = [] if all(on_line) else [str(layer) for layer in layers]
        where = ", ".join([*places, *(["the command line"] if any(on_line) or not layers else [])])
        raise UserError(f"configuration ({where}):\n" + "\n".join(_explain(e) for e in error.errors())) from None


def dump_config(config: RunConfig, leave_out: set[str] | None = None) -> str:
    """The resolved configuration, or its sections but ``leave_out``, as YAML that ``load_config`` reads back equal."""
    content = config.model_dump(mode="json", exclude=leave_out)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    if any(mark in text for mark in "\x85\u2028\u2029"):  # PyYAML reads these line breaks as spaces unless escaped
        text = yaml.safe_dump(content, sort_keys=False)
    return text


def _read_layer(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file; correct the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a mapping of keys to values, not a {type(content).__name__}")
    return content


def _parse_value(raw: str) -> Any:
    """A YAML value; numbers like 1e-4, which YAML 1.1 leaves a string, become floats through pydantic.

    A template's texts, such as ``{title}``, ``- {title}``, ``Next:`` or ``# Liked``, stay texts: lists and mappings are
    those in brackets with a colon in each mapping.
    """
    if not raw:
        return ""  # "key=" empties a text; "key=null" is YAML's nothing
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError:
        return raw
    text = raw.strip()
    if isinstance(value, dict | list):
        placeholder = isinstance(value, dict) and value and ":" not in text
        return value if text[0] in "[{" and not placeholder else raw
    if isinstance(value, str):
        return value if text[0] in "'\"" else raw
    return raw if value is None and text.startswith("#") else value


def _nest(keys: list[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return value


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        both = isinstance(out.get(key), dict) and isinstance(value, dict)
        out[key] = _merge(out[key], value) if both else value
    return out


def _explain(error: Any) -> str:
    path = [str(part) for part in error["loc"]]
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, _all_keys(RunConfig), n=1, cutoff=0.4) or difflib.get_close_matches(
            path[-1], [k.rsplit(".", 1)[-1] for k in _all_keys(RunConfig)], n=1, cutoff=0.0
        )
        return f"  {key}: unknown key; the nearest known key is {near[0]}"
    message = error["msg"].removeprefix("Value error, ")
    return f"  {key or 'top level'}: {message} (got {error['input']!r})"


def _all_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all keys below ``section``."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        for candidate in [field.annotation, *getattr(field.annotation, "__args__", ())]:
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                keys += _all_keys(candidate, prefix + name + ".")
    return keys
