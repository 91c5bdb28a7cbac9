"""Loading, making and saving backbones: full models, adapters, and small ones from nothing.

A *model folder* is what a stage writes and any other command reads: a Hugging Face model or a PEFT adapter with its
tokenizer, and ``dmpo.json`` with the template that every later use of the model must keep to.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dmpo_dist import __version__
from dmpo_dist.artifacts.base import read_config
from dmpo_dist.artifacts.run_folder import CONFIG_FILE
from dmpo_dist.artifacts.stamp import ModelStamp
from dmpo_dist.config import LoraConfig, ModelConfig, RunConfig, ScratchModel, TemplateConfig
from dmpo_dist.data.template import Template
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.gguf import local_model, moved_base
from dmpo_dist.modeling.lora_targets import no_such_layer, require_targets
from dmpo_dist.modeling.memory import keep_freed_memory
from dmpo_dist.modeling.published import PUBLISHED
from dmpo_dist.modeling.quantize import keep_arithmetic, quantization_config, require_trainable
from dmpo_dist.modeling.suitability import require_causal, require_deterministic, require_embedded, silence
from dmpo_dist.parsing import first_line, parse_json, parsing

ADAPTER = "adapter_config.json"
STARTS_BESIDE_THE_BASE = frozenset({"gaussian", "eva", "orthogonal"})
"""Values of PEFT's ``init_lora_weights`` that leave the base's weights as they are; true and false do as well."""


@dataclass(frozen=True)
class ModelSource:
    """Where a stage starts from.

    Attributes:
        path: folder or hub id of the weights to start from; an adapter folder or a full model.
        base: folder or hub id of the base weights (``path`` itself for a full model).
        is_adapter: whether ``path`` holds an adapter.
        stamp: ``dmpo.json`` beside the model, an empty one where there is none.
    """

    path: str
    base: str
    is_adapter: bool
    stamp: ModelStamp


def find_model(path: str, weights: bool = True, option: str = "model.path or --model") -> ModelSource:
    """Look at a model folder, GGUF file, name of a fetched model or hub id; a new GGUF file is converted first.

    Args:
        weights: False takes a folder without weights too, which is enough for a plan.
        option: what the user names it by, for errors.

    Raises:
        UserError: a folder that is not there or holds no model, or a damaged file in it.
    """
    path = local_model(path)
    folder = Path(path)
    if not folder.exists():
        if (
            path.startswith((".", "/", "~"))
            or path.count("/") != 1
            or (folder.parent.exists() and folder.parent != Path("."))
        ):
            raise UserError(
                f"{path}: there is no such model folder; correct {option} to a model folder, a GGUF file or a hub id "
                f"such as org/name; or fetch one of {', '.join(PUBLISHED)} by `dmpo models fetch`"
            )
        return ModelSource(path, path, False, _hub_stamp(path))
    stamp = ModelStamp.read_if_there(folder) or ModelStamp()
    if stamp.template is not None and stamp.max_length is None:  # an earlier version's: its run's folder says it
        with suppress(UserError):
            stamp.max_length = (read_config(folder.parent / CONFIG_FILE).get("model") or {}).get("max_length")
    if (folder / ADAPTER).exists():
        base = _read_json(folder / ADAPTER).get("base_model_name_or_path")
        if not base:
            raise UserError(f"{folder / ADAPTER}: names no base model; set its base_model_name_or_path")
        if weights:
            _check_weights(folder)
        base = moved_base(base)
        relative = folder / base
        if base.startswith(("/", ".")) and not relative.exists():
            raise UserError(
                f"{folder / ADAPTER}: its base model {base} is not there; correct its base_model_name_or_path"
            )
        return ModelSource(path, str(relative.resolve()) if relative.exists() else base, True, stamp)
    if not (folder / "config.json").exists():
        inside = Path(path) / "model"
        advice = f"a run's model is in {inside}" if inside.is_dir() else "is it a model folder?"
        raise UserError(f"{path}: holds neither config.json nor {ADAPTER}; {advice}")
    _read_json(folder / "config.json")
    if weights:
        _check_weights(folder)
    return ModelSource(path, path, False, stamp)


@cache
def _hub_stamp(path: str) -> ModelStamp:
    """The ``dmpo.json`` of a hub's repository, where ``dmpo export`` has put one and it can be had."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return ModelStamp.read(Path(hf_hub_download(path, ModelStamp.FILE)))
    except (HfHubHTTPError, OSError, ValueError):  # no such file there; or offline, and not in the cache
        return ModelStamp()


def read_model_config(path: str, max_length: int) -> Any:
    """The transformers configuration of the full model in ``path``.

    Raises:
        UserError: not a causal language model that transformers knows, or a context shorter than ``max_length``.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:  # each model family checks its own keys, or trips over them
        raise UserError(
            f"{path}: its config.json cannot be used ({first_line(error)}); is it a language model?"
        ) from None
    require_causal(config, path)
    context = getattr(config, "max_position_embeddings", None)
    if context and max_length > context:
        raise UserError(f"model.max_length={max_length} exceeds the context of {context} of {path}; lower it")
    return config


def count_parameters(path: str) -> int:
    """Parameters of the full model (or an adapter's base) in ``path``, from its config.json alone."""
    from transformers import AutoModelForCausalLM

    config = read_model_config(find_model(path).base, 0)
    with parsing(path, "does its config.json describe a model that can be made?"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())


def load_tokenizer(source: ModelSource) -> Any:
    """The tokenizer beside the model, or its base's.

    Raises:
        UserError: there is none, it is no fast one, or it has ids that the model has no embedding for.
    """
    from transformers import AutoTokenizer

    beside = Path(source.path)
    folder = source.path if (beside / "tokenizer_config.json").exists() or not source.is_adapter else source.base
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the Rust tokenizers raise plain Exceptions
        raise UserError(
            f"{folder}: no tokenizer could be loaded ({first_line(error)}); its files, tokenizer.json and "
            "tokenizer_config.json, must lie whole beside the model"
        ) from None
    if not tokenizer.is_fast:
        raise UserError(f"{folder}: the tokenizer is not a fast one; convert it, so that there is a tokenizer.json")
    require_embedded(tokenizer, read_model_config(source.base, 0), source.path)
    return tokenizer


def load_causal_lm(path: str, config: ModelConfig) -> Any:
    """A transformers causal LM in ``config.dtype`` with all dropout and other noise set to 0.

    Raises:
        UserError: unknown model, damaged weights, or a context shorter than ``model.max_length``.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    model_config = read_model_config(path, config.max_length)
    silence(model_config)
    more = quantization_config(config, model_config, path)
    options = {"dtype": getattr(torch, config.dtype)} | ({"quantization_config": more} if more else {})
    try:
        model = AutoModelForCausalLM.from_pretrained(path, config=model_config, **options)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise UserError(f"{path}: could not be loaded as a causal language model: {first_line(error)}") from None
    _without_dropout(model)
    if config.quantization == "nf4":
        keep_arithmetic(model)
    return model


def _without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


ReferenceMode = Literal["adapter_off", "adapter_copy", "model_copy"]


def load_policy(
    source: ModelSource, config: ModelConfig, needs_reference: bool = True
) -> tuple[Any, ReferenceMode | None]:
    """The trainable model of a stage, and where its reference log-probs come from.

    Returns:
        The model (a PEFT model under LoRA) and the reference mode: ``adapter_off`` for a new adapter,
        ``adapter_copy`` where training goes on from an adapter (the frozen copy is the adapter "reference"),
        ``model_copy`` for full fine-tuning; None where the stage needs no reference, and none is loaded.

    Raises:
        UserError: see ``load_causal_lm``, an adapter that does not fit, a quantization or model that cannot be trained.
    """
    require_trainable(config, source.is_adapter or config.lora is not None)
    require_deterministic(read_model_config(source.base, 0), source.base)
    model = load_causal_lm(source.base, config)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    mode: ReferenceMode
    if source.is_adapter:
        _require_low_rank_only(source)
        if needs_reference:
            _require_base_as_it_is(source)
        model, mode = _with_adapter(model, source, train=True, copy=needs_reference).train(), "adapter_copy"
    elif config.lora is not None:
        model, mode = with_new_adapter(model, config.lora), "adapter_off"
    else:
        model, mode = model.train(), "model_copy"
    return model, mode if needs_reference else None


def load_for_scoring(path: str, config: ModelConfig) -> Any:
    """A frozen model in evaluation mode, with the adapter if ``path`` holds one; the process keeps memory it frees."""
    source = find_model(path)
    model = load_causal_lm(source.base, config)
    if source.is_adapter:
        model = _with_adapter(model, source, train=False, copy=False)
    keep_freed_memory()
    return model.eval().requires_grad_(False)


def _with_adapter(model: Any, source: ModelSource, train: bool, copy: bool) -> Any:
    """``model`` with its adapter, which ``train`` makes trainable, and with ``copy`` a frozen one named "reference".

    The dropout that an adapter was trained with elsewhere is set to 0, as the model's own is.
    """
    from peft import PeftModel

    try:
        peft = PeftModel.from_pretrained(model, source.path, is_trainable=train)
        _require_same_adapter(peft, source)
        if copy:
            peft.load_adapter(source.path, "reference", is_trainable=False)
            peft.set_adapter("default")
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            f"{source.path}: the adapter does not fit {source.base} ({first_line(error)}); name the base it was "
            f"trained on as base_model_name_or_path in its {ADAPTER}"
        ) from None
    _without_dropout(peft)
    return peft


def _require_low_rank_only(source: ModelSource) -> None:
    """Refuse to train on from an adapter that also holds whole weights: policy and reference would share them."""
    config = _read_json(Path(source.path) / ADAPTER)
    for key, harmless in (("modules_to_save", None), ("trainable_token_indices", None), ("bias", "none")):
        if config.get(key, harmless) not in (harmless, [], {}):
            raise UserError(
                f"{Path(source.path) / ADAPTER}: {key} is {config[key]!r}, so training it on would change the "
                "reference as well; merge it into its base (dmpo export --merge) and start from that with model.lora "
                "set"
            )


def changes_base(source: ModelSource) -> str | None:
    """What in its ``adapter_config.json`` makes an adapter leave another base behind when it is turned off.

    Trained biases replace the base's own. A start from the base's weights (PiSSA, OLoRA, LoftQ) takes its share out of
    them when the adapter is loaded, and a second adapter's once more out of what is left.
    """
    config = _read_json(Path(source.path) / ADAPTER)
    start = config.get("init_lora_weights")
    changes = {
        "bias": config.get("bias", "none") != "none",
        "init_lora_weights": isinstance(start, str) and start not in STARTS_BESIDE_THE_BASE,
        "layer_replication": bool(config.get("layer_replication")),
    }
    return next((f"{key} is {config[key]!r}" for key, does in changes.items() if does), None)


def _require_base_as_it_is(source: ModelSource) -> None:
    """Refuse to train on, beside a frozen copy, from an adapter that ``changes_base``."""
    why = changes_base(source)
    if why:
        raise UserError(
            f"{Path(source.path) / ADAPTER}: {why}, so policy and reference cannot share its base; merge it into its "
            "base (dmpo export --merge) and start from that with model.lora set"
        )


def _require_same_adapter(peft: Any, source: ModelSource) -> None:
    """PEFT leaves out what a file has too much of, and only warns of what it lacks.

    Raises:
        ValueError: the adapter's file holds other layers than the model has.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    file = Path(source.path) / "adapter_model.safetensors"
    if not file.exists():
        return
    with safe_open(file, framework="pt") as content:
        names = set(content.keys()) ^ get_peft_model_state_dict(peft, save_embedding_layers=False).keys()
    differing = [name for name in names if ".lora_" in name]  # embeddings may lie beside them
    if differing:
        raise ValueError(f"{len(differing)} weights are in one alone, such as {min(differing)}")


def with_new_adapter(model: Any, lora: LoraConfig) -> Any:
    """``model`` with a new, trainable adapter of this shape around its linear layers.

    Raises:
        UserError: ``lora.target_modules`` names a layer that is not there.
    """
    from peft import LoraConfig as PeftLora
    from peft import get_peft_model

    shape = PeftLora(
        r=lora.r, lora_alpha=lora.alpha, target_modules=lora.target_modules, lora_dropout=0.0,
        task_type="CAUSAL_LM", use_rslora=lora.variant == "rslora", use_dora=lora.variant == "dora",
    )  # fmt: skip
    try:
        peft = get_peft_model(model, shape)
    except ValueError as error:
        if "not found in the base model" not in str(error):
            raise UserError(f"model.lora.target_modules={lora.target_modules!r}: {first_line(error)}") from None
        names = [lora.target_modules] if isinstance(lora.target_modules, str) else lora.target_modules
        raise UserError(no_such_layer(model, names)) from None
    require_targets(peft, lora.target_modules)
    return peft.train()


def scratch_config(scratch: ScratchModel, vocab_size: int, max_length: int, **special: int) -> Any:
    """The transformers configuration of a small Llama; ``special`` are ids of tokens."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=scratch.hidden_size,
        num_hidden_layers=scratch.layers,
        num_attention_heads=scratch.heads,
        num_key_value_heads=scratch.heads,
        intermediate_size=scratch.intermediate_size,
        vocab_size=vocab_size,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        **special,
    )


def make_scratch_model(folder: Path, scratch: ScratchModel, texts: Sequence[str], max_length: int, seed: int) -> None:
    """Write a small random Llama and a byte-level BPE tokenizer learned from ``texts`` to ``folder``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=scratch.vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=max_length
    )
    torch.manual_seed(seed)
    special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
    model = LlamaForCausalLM(scratch_config(scratch, backend.get_vocab_size(), max_length, **special))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def with_length_of(sources: Sequence[ModelSource], config: RunConfig) -> RunConfig:
    """``config`` with the ``model.max_length`` that ``sources`` were trained with, unless it was set.

    Of several it is the largest, where none says so the default, and at most the shortest context.
    """
    if "max_length" in config.model.model_fields_set:
        return config
    trained = max((source.stamp.max_length or 0 for source in sources), default=0)
    contexts = [getattr(read_model_config(source.base, 0), "max_position_embeddings", None) for source in sources]
    length = min([trained or config.model.max_length, *(context for context in contexts if context)])
    return config.model_copy(update={"model": config.model.model_copy(update={"max_length": length})})


def unlike_training(source: ModelSource, config: ModelConfig) -> list[str]:
    """In what ``config`` would use a model otherwise than it was trained: words to follow "it was trained with"."""
    trained = {"quantization": source.stamp.quantization, "max_length": source.stamp.max_length}
    return [
        f"model.{name}={value}, and is used with {getattr(config, name)} here; give model.{name}={value} to keep to it"
        for name, value in trained.items()
        if source.stamp.template is not None and value not in (None, getattr(config, name))
    ]


def lora_without_effect(source: ModelSource, config: ModelConfig) -> list[str]:
    """What ``config.lora`` asks of an adapter that training goes on with, whose shape stays as it is."""
    if not source.is_adapter or config.lora is None:
        return []
    there = _read_json(Path(source.path) / ADAPTER)
    variant = "dora" if there.get("use_dora") else "rslora" if there.get("use_rslora") else "lora"
    has = {"r": there.get("r"), "alpha": there.get("lora_alpha"), "variant": variant}
    return [
        f"model.lora.{name}={getattr(config.lora, name)} has no effect: training goes on with the adapter in "
        f"{source.path}, which has {value}"
        for name, value in has.items()
        if value != getattr(config.lora, name)
    ]


def enforce_template(stamp: ModelStamp, asked: TemplateConfig, where: str) -> TemplateConfig:
    """The template a model was trained with; raises UserError where the configuration asks for another one."""
    trained = stamp.template
    if trained is None:
        return asked
    if asked not in (trained, TemplateConfig()):
        differing = [k for k in TemplateConfig.model_fields if getattr(asked, k) != getattr(trained, k)]
        raise UserError(
            f"{where} was trained with another template ({', '.join('template.' + k for k in differing)} differ); "
            f"leave the template out of the configuration to use the one in {where}/{ModelStamp.FILE}"
        )
    return trained


def require_same_rendering(stamp: ModelStamp, template: Template, where: str) -> None:
    """Raise UserError where tokenizer or chat template put other texts around a prompt than they did in training."""
    rendered, trained = template.rendered(), stamp.rendered or {}
    for name in rendered:
        if name in trained and trained[name] != rendered[name]:
            raise UserError(
                f"{where} was trained with {trained[name]!r} as the {name} of its prompts, and its tokenizer makes "
                f"{rendered[name]!r} of it now; restore the tokenizer files that training wrote beside it"
            )


def write_stamp(folder: Path, template: TemplateConfig, **facts: Any) -> None:
    """Write ``dmpo.json`` beside a saved model."""
    content = {"dmpo_dist": __version__, "template": template.model_dump(mode="json"), **facts}
    ModelStamp.model_validate(content).write(folder)


def _check_weights(folder: Path) -> None:
    """Whether every file of weights is whole: a safetensors header says how long its file must be."""
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files and not any(folder.glob("*.bin")):
        raise UserError(f"{folder}: holds no weights (*.safetensors); was a copy cut off?")
    for file in files:
        try:
            with safe_open(file, framework="pt") as content:
                empty = not list(content.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: damaged ({first_line(error)}); was a copy cut off? Copy it again") from None
        if empty:
            raise UserError(f"{file}: holds no weights; it was saved without them, so save or train the model again")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged, not JSON ({first_line(error)}); was a copy cut off? Copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not an object; restore the file")
    return content
