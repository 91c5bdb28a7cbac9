"""A trained model as others use it: an adapter, or whole weights in shards, with all that belongs to it.

What is written is read back, compared, and scored beside the trained model, so that the cost of merging and of the
narrower type is a measured number and not a hope.
"""

import gc
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dmpo_dist.artifacts.evaluation import Evaluation
from dmpo_dist.artifacts.files import whole_folder
from dmpo_dist.artifacts.stamp import ModelStamp
from dmpo_dist.commands.model_card import model_card
from dmpo_dist.config import ModelConfig
from dmpo_dist.data.prompt_texts import PromptTexts
from dmpo_dist.data.schema import PreferenceGroup
from dmpo_dist.data.store import PreparedData
from dmpo_dist.data.tokenization import GroupTokenizer, TokenGroup, tokenize_rows
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.difference import Difference, compare_scores
from dmpo_dist.evaluation.generation import greedy_config
from dmpo_dist.evaluation.seeds import split_name
from dmpo_dist.modeling.backbone import (
    ADAPTER,
    ModelSource,
    find_model,
    load_for_scoring,
    read_model_config,
)
from dmpo_dist.modeling.model_files import written_digests
from dmpo_dist.modeling.quantize import quantization_of
from dmpo_dist.modeling.ranking_model import RankingModel
from dmpo_dist.modeling.self_check import tolerance
from dmpo_dist.records.provenance import Provenance, read_provenance

Dtype = Literal["bfloat16", "float32"]

REQUESTS = 64
"""Validation requests scored to measure the difference."""
TOKEN_BUDGET = 4096
SHARD_SIZE = "5GB"
WEIGHTS = "adapter_model.safetensors"
WORDS = "Amber Birch Cedar Delta Ember Fjord Grove Haven Iris Jade Karst Lotus".split()


def export(
    model: str,
    output: Path,
    merge: bool = False,
    dtype: Dtype | None = None,
    shard_size: str | None = None,
    data: Path | None = None,
    evaluation: Path | None = None,
    accept_difference: bool = False,
    echo: Callable[[str], None] = print,
) -> Difference:
    """Write the model folder ``model`` to ``output``, which appears whole or not at all.

    An adapter is merged in fp32 into its full-precision base and rounded once, which holds the base in fp32 in memory.
    A head tied to an embedding that the adapter changes becomes a weight of its own: in training it stayed as it was.

    Args:
        merge: write an adapter and its base as one whole model.
        dtype: of the weights written; None keeps an adapter's and makes a whole model bfloat16.
        shard_size: largest file of weights, such as 5GB; None is 5GB.
        data: prepared data whose validation requests the difference is measured on; None takes made-up prompts.
        evaluation: an ``evaluation.json``, or its folder, that ranks the model, for its card.
        accept_difference: write a model whose log-probs move by more than rounding explains.

    Returns:
        How far what was written is from the trained model.

    Raises:
        UserError: anything about the folders, the model or the options that keeps it from being written rightly.
    """
    source = find_model(model)
    _check_request(source, output, merge, shard_size)
    base_config = read_model_config(source.base, 0)
    prepared = PreparedData.load(data) if data else None
    origin = read_provenance(source, prepared.card if prepared else None)
    ranked = _find_in_evaluation(evaluation, model) if evaluation else None
    trained = _trained_as(origin, source.stamp, base_config)
    encode = RankingModel.load(model, trained).encode
    _check_base(source, base_config, merge)
    with whole_folder(output) as part:
        requests = _requests(prepared, encode)
        before = _scores(model, encode, trained, requests)
        _require_finite(
            before, f"{model}: its scores", "its training diverged or its weights are damaged; train it again"
        )
        written = _write_weights(source, encode, part, merge, dtype, shard_size)
        whole = {"dtype": written.dtype, "quantization": "none"}
        as_written = trained if written.is_adapter else trained.model_copy(update=whole)
        after = _scores(str(part), encode, as_written, requests)
        _require_finite(after, f"{model}: scores in {written.dtype}", "it is too narrow a type; try --dtype float32")
        difference = compare_scores(before, after, requests.name, requests.real, _type_of(trained))
        if not accept_difference:
            _require_alike(before, after, difference, (trained.dtype, written.dtype))
        nats = {"max_nats": difference.max_nats, "mean_nats": difference.mean_nats}
        encode.texts.write(part)
        _stamp(source, part, {"merged": merge, "dtype": written.dtype, **nats}).write(part)
        card = model_card(output.resolve().name, str(written), origin, encode.template, str(difference), ranked)
        (part / "README.md").write_text(card, encoding="utf-8")
        for file in part.iterdir():
            file.chmod((part / "README.md").stat().st_mode)  # safetensors lets only the owner read
    _tell(echo, source, origin, output, written, difference)
    return difference


@dataclass(frozen=True)
class Written:
    """What kind of weights lie in the folder."""

    is_adapter: bool
    dtype: str
    files: int

    def __str__(self) -> str:
        kind = "PEFT adapter (LoRA)" if self.is_adapter else "Whole model in safetensors"
        return f"{kind}, {self.dtype}, {self.files} file{'s' * (self.files > 1)} of weights"


@dataclass(frozen=True)
class ComparedRequests:
    """The requests on which the exported model is compared with the trained one.

    ``real``: whether the users are known to like the positives.
    """

    groups: list[TokenGroup]
    name: str
    real: bool


def _scores(path: str, encode: GroupTokenizer, config: ModelConfig, requests: ComparedRequests) -> list[np.ndarray]:
    """By the model in ``path``, which is gone when this returns: the next copy has the memory to itself."""
    return RankingModel(find_model(path), encode, config, TOKEN_BUDGET).score_groups(requests.groups)


def _require_finite(scores: Sequence[np.ndarray], whose: str, advice: str) -> None:
    if not np.isfinite(np.concatenate(scores)).all():
        raise UserError(f"{whose} are not finite; {advice}")


def _require_alike(
    before: Sequence[np.ndarray], after: Sequence[np.ndarray], difference: Difference, dtypes: Sequence[str]
) -> None:
    """Refuse what ranks otherwise: a log-prob further away than rounding to the coarser of ``dtypes`` explains.

    Candidates that lie closer together than that may still change places.
    """
    name = max(dtypes, key=lambda name: torch.finfo(getattr(torch, name)).eps)
    old, new = np.concatenate(before), np.concatenate(after)
    error, allowed = np.abs(new - old), tolerance(old, getattr(torch, name))
    worst = int((error - allowed).argmax())
    if error[worst] > allowed[worst]:
        raise UserError(
            f"the exported model would rank otherwise: a candidate has {new[worst]:.4g} nats where the trained model "
            f"gives {old[worst]:.4g}, and rounding to {name} explains {allowed[worst]:.2g}. {difference} Try --dtype "
            "float32, or leave --merge out; --accept-difference writes it nonetheless"
        )


def _check_request(source: ModelSource, output: Path, merge: bool, shard_size: str | None) -> None:
    """Everything that can be known before weights or tokenizer are read."""
    if output.exists() or output.is_symlink():
        raise UserError(f"{output}: exists already and is left as it is; remove it or choose another output folder")
    if source.stamp.template is None:
        raise UserError(
            f"{source.path}: has no {ModelStamp.FILE} with a template, so how to prompt it is not known; give a model "
            "folder that `dmpo sft` or `dmpo train` wrote, such as runs/dmpo/model"
        )
    if merge and not source.is_adapter:
        raise UserError(f"--merge: {source.path} is a whole model already, with nothing to merge; leave --merge out")
    if shard_size is not None and source.is_adapter and not merge:
        raise UserError(f"--shard-size {shard_size}: an adapter is one file; leave it out, or add --merge")
    if shard_size is not None and not re.fullmatch(r"[1-9]\d*[KMGT]B", shard_size):
        raise UserError(f"--shard-size {shard_size}: write a whole number and KB, MB, GB or TB, such as 5GB")


def _check_base(source: ModelSource, base_config: Any, merge: bool) -> None:
    """Whether the base's weights are not rounded already."""
    stored = quantization_of(base_config)
    if stored is not None and (merge or not source.is_adapter or stored not in ("nf4", "int8")):
        advice = (
            f"set base_model_name_or_path in {source.path}/{ADAPTER} to the full-precision model it was made from"
            if source.is_adapter
            else "export the adapter it was trained with instead"
        )
        raise UserError(f"{source.base}: its weights are quantized, and a merge would round them again; {advice}")


def _trained_as(origin: Provenance, stamp: ModelStamp, base_config: Any) -> ModelConfig:
    """Type, quantization and length the model was trained in, as far as its stamp and the run's config.yaml say."""
    run = origin.config.get("model") or {}
    context = getattr(base_config.get_text_config(), "max_position_embeddings", None) or 512
    length = stamp.max_length or run.get("max_length") or 512
    known = run.get("dtype") if run.get("dtype") in ("float32", "bfloat16", "float16") else "float32"
    asked = quantization_of(base_config) or stamp.quantization or run.get("quantization")
    quantization = asked if asked in ("nf4", "int8") else "none"
    double = bool(run.get("double_quantization", True))
    return ModelConfig(
        dtype=known, max_length=min(int(length), int(context)), quantization=quantization, double_quantization=double
    )


def _type_of(trained: ModelConfig) -> str:
    return trained.dtype + ("" if trained.quantization == "none" else f" on a base in {trained.quantization}")


def _requests(prepared: PreparedData | None, encode: GroupTokenizer) -> ComparedRequests:
    """Validation requests, or made-up ones in the model's template, whose fields are made up too."""
    own = encode.texts
    try:
        return _with_texts(prepared, encode)
    finally:
        encode.texts = own


def _with_texts(prepared: PreparedData | None, encode: GroupTokenizer) -> ComparedRequests:
    if prepared is not None:
        encode.texts = encode.texts.with_items(prepared.items).with_users(prepared.users)
        if not len(prepared.validation):
            raise UserError(
                f"--data {prepared.path}: holds no validation requests; leave --data out to use made-up prompts"
            )
        rows = prepared.validation.select(range(min(REQUESTS, len(prepared.validation))))
        return ComparedRequests(
            tokenize_rows(rows, encode), f"{len(rows)} validation requests of {prepared.card.name}", True
        )
    titles = [f"{first} {second}" for first in WORDS for second in WORDS[:4]]
    items, users = encode.texts.item_fields, encode.texts.user_fields
    encode.texts = PromptTexts(
        {title: dict.fromkeys(items, WORDS[0]) for title in titles}, {"made-up": dict.fromkeys(users, WORDS[0])}, items,
        users,
    )  # fmt: skip
    groups = [
        PreferenceGroup(
            "made-up", 0, tuple(titles[start : start + 3]), titles[start + 3], tuple(titles[start + 4 : start + 8])
        )
        for start in range(0, 40, 5)
    ]
    return ComparedRequests([encode(group) for group in groups], f"{len(groups)} made-up requests", False)


def _find_in_evaluation(file: Path, model: str) -> tuple[str, Evaluation]:
    """The model's name in an evaluation.json, and its content; one of several seeds is put among its models.

    Args:
        file: an evaluation.json, or the folder that holds it.

    Raises:
        UserError: it is no such file, or ranks no model of that folder.
    """
    found = Evaluation.read(file)
    name = found.name_of(Path(model))
    if name is None and found.name_of(Path(model), same_weights=False) is not None:
        raise UserError(
            f"--evaluation {file}: ranks what {model} held before it was trained again; run dmpo evaluate again"
        )
    if name is None:
        ranked = ", ".join(f"{name}={path}" for name, path in found.folders.items()) or "none"
        raise UserError(
            f"--evaluation {file}: ranks no model of {model} (it has {ranked}); leave it out or give the right file"
        )
    all_seeds, seed = split_name(name)
    if name not in found.models and [*found.seeds.get(all_seeds, {})] == [seed]:
        return all_seeds, found
    own = {name: found.figures_of(name)}
    return name, found.model_copy(update={"models": found.models | own})


def _write_weights(
    source: ModelSource, encode: GroupTokenizer, folder: Path, merge: bool, dtype: Dtype | None, shard_size: str | None
) -> Written:
    """Weights, tokenizer and generation configuration."""
    encode.tokenizer.save_pretrained(folder)
    generation = greedy_config(encode.tokenizer, encode.template)
    if source.is_adapter and not merge:
        written = _write_adapter(source, folder, dtype)
    else:
        written = _write_whole(source, folder, dtype or "bfloat16", shard_size or SHARD_SIZE, generation)
    generation.save_pretrained(folder)
    return written


def _write_adapter(source: ModelSource, folder: Path, dtype: Dtype | None) -> Written:
    """The adapter's tensors and configuration; read back."""
    from safetensors.torch import load_file, save_file

    file = Path(source.path) / WEIGHTS
    if not file.exists():
        raise UserError(f"{file}: is not there; an adapter is exported from safetensors, so convert it first")
    tensors = load_file(file)
    if dtype:
        tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((Path(source.path) / ADAPTER).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = source.base  # one that was relative to the adapter would be so no longer
    (folder / ADAPTER).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _require_same(tensors, load_file(folder / WEIGHTS), folder / WEIGHTS)
    return Written(True, _name_of({tensor.dtype for tensor in tensors.values()}), 1)


def _write_whole(source: ModelSource, folder: Path, dtype: Dtype, shard_size: str, generation: Any) -> Written:
    """The model in shards, an adapter merged in fp32; loaded back as plain transformers does."""
    from transformers import AutoModelForCausalLM

    model = load_for_scoring(source.path, ModelConfig(dtype="float32", max_length=8))
    if source.is_adapter:
        model = _merged(model)
    model = model.to(getattr(torch, dtype))
    model.generation_config = generation  # the base's own may be one that transformers refuses to save
    model.save_pretrained(folder, max_shard_size=shard_size)
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if listed != {file.name for file in files}:
            raise RuntimeError(f"{index}: the files it lists are not those that were written")
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    _require_same(model.state_dict(), again.state_dict(), folder)
    del model, again
    gc.collect()  # before the next copy is loaded
    return Written(False, dtype, len(files))


def _merged(peft: Any) -> Any:
    """The base with the adapter in its weights; a head tied to an embedding that the adapter changes is untied."""
    base = peft.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    wrapped = any(hasattr(embedding, name) for name in ("base_layer", "modules_to_save", "token_adapter"))
    if not (wrapped and base.config.get_text_config().tie_word_embeddings):
        return peft.merge_and_unload(safe_merge=True)
    # The head multiplied by the embedding as it was before the adapter, and a merge would change both.
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    merged = peft.merge_and_unload(safe_merge=True)
    for config in (merged.config, merged.config.get_text_config()):
        config.tie_word_embeddings = False
    merged.all_tied_weights_keys = {}
    return merged


def _require_same(expected: dict[str, torch.Tensor], seen: dict[str, torch.Tensor], where: Path) -> None:
    if expected.keys() != seen.keys():
        raise RuntimeError(f"{where}: {sorted(expected.keys() ^ seen.keys())[0]} did not survive saving")
    for name, tensor in expected.items():
        if not torch.equal(tensor.double(), seen[name].double()):  # a few models keep some weights in fp32
            raise RuntimeError(f"{where}: {name} did not survive saving")


def _stamp(source: ModelSource, folder: Path, facts: dict[str, Any]) -> ModelStamp:
    """What the stage wrote, with the digests of ``folder`` and without paths of the machine it was written on."""
    stamp = source.stamp.model_copy(update={"export": facts, "digests": written_digests(folder)})
    if facts["merged"]:  # whole weights: on no base, and of their own precision
        stamp = stamp.model_copy(update={"quantization": "none", "base_digests": None})
    if stamp.start and Path(stamp.start).is_absolute():
        stamp.start, stamp.start_name = None, Path(stamp.start).name
    return stamp


def _tell(
    echo: Callable[[str], None],
    source: ModelSource,
    origin: Provenance,
    output: Path,
    written: Written,
    difference: Difference,
) -> None:
    echo(f"{written}. {difference}")
    if written.is_adapter and Path(source.base).exists():
        echo(
            f"its {ADAPTER} names the base by its folder on this machine, {source.base}; elsewhere correct it, or "
            "export with --merge"
        )
    if origin.same_data is False:
        echo("the requests are not from the data the model was trained on: the fingerprints differ")
    echo(
        f"written to {output}, with tokenizer, generation configuration, {ModelStamp.FILE} and a model card in README.md"
    )


def _name_of(dtypes: set[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
