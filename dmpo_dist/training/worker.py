"""One rank of a training stage: set up, train, save. Runs unchanged under Ray Train and under torchrun."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from pydantic import ValidationError

from dmpo_dist.config import ModelConfig
from dmpo_dist.data.reorder import ReorderedGroups
from dmpo_dist.data.store import PreparedData, groups_from_rows, texts_of_data
from dmpo_dist.data.template import make_template
from dmpo_dist.data.tokenization import GroupTokenizer, TokenGroup, check_texts, check_titles, tokenize_rows
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.backbone import (
    ModelSource,
    ReferenceMode,
    count_parameters,
    find_model,
    load_causal_lm,
    load_policy,
    load_tokenizer,
    read_model_config,
)
from dmpo_dist.modeling.compile import compile_layers
from dmpo_dist.modeling.logprobs import LogProbModel, unwrap_peft
from dmpo_dist.modeling.lora_targets import reach_note
from dmpo_dist.modeling.memory import keep_freed_memory
from dmpo_dist.modeling.quantize import require_partitioned
from dmpo_dist.modeling.routing import Route, take_route, use_backend
from dmpo_dist.modeling.suitability import noise_note, require_known_ids
from dmpo_dist.training.budget import Probe
from dmpo_dist.training.catalogue import CatalogueGroups
from dmpo_dist.training.engine import (
    is_stage3,
    partitioned_loading,
    resolve_config,
    start_engine,
    start_frozen_engine,
    start_process_group,
    whole_shape,
)
from dmpo_dist.training.groups import Batches, make_schedule, with_negatives
from dmpo_dist.training.job import Job
from dmpo_dist.training.listed import listed_groups
from dmpo_dist.training.loop import Trainer
from dmpo_dist.training.on_policy import OnPolicy, rewards_of, takes_rewards
from dmpo_dist.training.reference import Reference, ReferencePass
from dmpo_dist.training.reference_cache import cache_key
from dmpo_dist.training.runtime import Runtime
from dmpo_dist.training.schedule import epochs_begun
from dmpo_dist.training.title_search import TitleSearch, require_searchable


def run(job: Job, runtime: Runtime) -> None:
    """Train ``job`` on this rank, from the latest checkpoint if the runtime has one; raises like ``set_up``."""
    trainer = set_up(job, runtime)
    try:
        trainer.fit()
    finally:
        trainer.engine.destroy()


def set_up(job: Job, runtime: Runtime) -> Trainer:
    """Load everything this rank trains with, and log the run's first record.

    Raises:
        UserError: anything in data, model or configuration that keeps the run from starting or going on.
    """
    started = time.monotonic()
    device = start_process_group()
    deepspeed = resolve_config(
        job.config.deepspeed, job.stage, job.config.model.dtype, runtime.world_size, count_parameters(job.start)
    )
    stage3 = is_stage3(deepspeed)
    if job.config.model.compile and stage3:
        raise UserError("model.compile=true does not work with ZeRO-3; set it to false, or deepspeed=zero2")
    if device.type == "cpu" and job.config.model.dtype == "float16":
        raise UserError("model.dtype=float16 does not train on a CPU; use float32 or bfloat16")
    policy = load_module(job, device, deepspeed)
    data = _load_data(job, policy, runtime.world_size)
    require_known_ids([*data.groups, *data.validation], unwrap_peft(policy.module.causal_lm).config)
    engine = _start_engine(policy.module, deepspeed, job.config.deepspeed)
    if stage3 and runtime.world_size > 1:
        require_partitioned(policy.module, runtime.world_size)
    batches = _batches(job, policy, data, engine, runtime.world_size, device)
    on_policy = _on_policy(job, policy, engine, data, batches, runtime, device, stage3)
    if on_policy is not None:
        batches = replace(batches, of_epoch=on_policy.group)
    keep_freed_memory()
    trainer = Trainer(
        job=job,
        runtime=runtime,
        device=device,
        engine=engine,
        tokenizer=policy.tokenizer,
        loss=job.loss,
        reference=_reference(job, policy, engine, data, batches, runtime, device, deepspeed),
        batches=batches,
        validation=data.validation,
        on_policy=on_policy,
    )
    runtime.log(
        {
            "kind": "start",
            "stage": job.section,
            "route": policy.route.backend,
            "route_reason": policy.route.reason,
            "reference": _reference_name(job, policy),
            "parameters": sum(map(_numel, policy.module.parameters())),
            "trainable": sum(_numel(p) for p in policy.module.parameters() if p.requires_grad),
            "groups": len(batches.groups),
            "token_budget": batches.token_budget,
            "validation_requests": len(data.validation),
            "truncated": data.truncated,
            "steps": trainer.total_steps,
            "world_size": runtime.world_size,
            "device": str(device),
            "deepspeed": deepspeed,
            "setup_seconds": time.monotonic() - started,
        }
    )
    for text in policy.notes:
        runtime.log({"kind": "note", "text": text})
    if data.balance:
        runtime.log({"kind": "note", "text": data.balance})
    ambiguous = sum(group.ambiguous for group in (*data.groups, *data.validation))
    if ambiguous:
        runtime.log(
            {
                "kind": "note",
                "text": f"{ambiguous} of {len(data.groups) + len(data.validation)} rows have a negative that the "
                "tokenizer reads as their positive (another case, say): it teaches nothing, and such candidates tie",
            }
        )
    return trainer


def _start_engine(module: LogProbModel, deepspeed: dict[str, Any], name: str) -> Any:
    """The engine; DeepSpeed itself knows which settings it takes."""
    try:
        return start_engine(module, deepspeed)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"deepspeed={name}: {key}: {first['msg']} (got {first['input']!r}); correct the JSON") from None


@dataclass(frozen=True)
class Policy:
    """The trainable module, what it was made from, and ``notes`` of what was changed or left out on the way."""

    module: LogProbModel
    tokenizer: Any
    route: Route
    source: ModelSource
    reference_mode: ReferenceMode | None
    notes: tuple[str, ...] = ()


def load_module(job: Job, device: torch.device, deepspeed: dict[str, Any] | None = None) -> Policy:
    """The starting model of ``job`` on ``device``, its attention routed; under a ZeRO-3 configuration this rank's part.

    A quantized model is read whole (it is small) and taken apart by the engine.
    """
    config = job.config.model
    torch.manual_seed(job.config.seed)  # new adapters start alike on every rank
    source = find_model(job.start)
    with _in_parts(config, deepspeed):
        model, mode = load_policy(source, config, job.loss.needs_reference)
    language_model = unwrap_peft(model)
    notes = [noise_note(read_model_config(source.base, 0))]
    if config.lora is not None and not source.is_adapter:
        notes.append(reach_note(model, config.lora.target_modules))
    route = take_route(language_model, device.type, config.max_length, config.attention)
    if config.compile and route.backend == "flex":
        raise UserError(
            "model.compile=true does not go with model.attention=flex, which compiles itself; set it to false"
        )
    if config.compile:
        compile_layers(language_model)
    module = LogProbModel(model, None if mode == "model_copy" else mode).to(device)
    return Policy(module, load_tokenizer(source), route, source, mode, tuple(note for note in notes if note))


def _in_parts(config: ModelConfig, deepspeed: dict[str, Any] | None) -> AbstractContextManager[None]:
    return nullcontext() if deepspeed is None or config.quantization != "none" else partitioned_loading(deepspeed)


def _numel(parameter: torch.Tensor) -> int:
    """Weights in ``parameter``, wherever they are and however packed."""
    state = getattr(parameter, "quant_state", None)
    return (state.shape if state is not None else whole_shape(parameter)).numel()


def _reference_name(job: Job, policy: Policy) -> str:
    """What the run header says of the reference."""
    if policy.reference_mode is None:
        return "none"
    cache = job.config.reference.cache
    return policy.reference_mode if cache == "off" else f"{policy.reference_mode}, cached ({cache})"


def _reference(
    job: Job, policy: Policy, engine: Any, data: "_Data", batches: Batches, runtime: Runtime, device: torch.device,
    deepspeed: dict[str, Any],
) -> Reference | None:  # fmt: skip
    """Where the run's reference log-probs come from. With a cache they are computed now, before any checkpoint is
    loaded: in full fine-tuning the policy itself still is the reference then, and no second model is needed."""
    if not job.loss.needs_reference:
        return None
    copied, cache = policy.reference_mode == "model_copy", job.config.reference.cache
    if cache == "off":
        frozen = frozen_copy(job, policy.route, device, deepspeed) if copied else engine
        return lambda layout, groups, epoch: frozen(layout, "reference")
    reference_pass = ReferencePass(
        log_probs=(lambda layout: engine(layout)) if copied else (lambda layout: engine(layout, "reference")),
        negatives=batches.negatives,
        epochs=epochs_begun(job.stage, batches.schedule),
        token_budget=batches.token_budget,
        shared=batches.shared,
        device=device,
        rank=runtime.rank,
        world_size=runtime.world_size,
        say=lambda text: runtime.log({"kind": "note", "text": text}),
    )
    if cache == "memory":
        return reference_pass.run(data.groups)
    folder = job.config.reference.path or job.output / "reference"
    return reference_pass.run(
        data.groups, folder, cache_key(job.config.model, policy.source, data.fingerprint, device.type)
    )


def frozen_copy(job: Job, route: Route, device: torch.device, deepspeed: dict[str, Any]) -> Any:
    """The starting weights once more for full fine-tuning: in parts under ZeRO-3, else whole on every rank."""
    with _in_parts(job.config.model, deepspeed):
        model = load_causal_lm(find_model(job.start).base, job.config.model)
    use_backend(model, route.backend)
    frozen = LogProbModel(model.requires_grad_(False), "whole").to(device).train()
    return start_frozen_engine(frozen, deepspeed) if is_stage3(deepspeed) else frozen


@dataclass(frozen=True)
class _Data:
    """What a stage trains on and is validated by.

    Attributes:
        groups: as they are in the first epoch, with every stored negative where prompts are the same in all epochs.
        of_epoch: see ``Batches``; longest: most tokens of a group that it makes.
        balance: where positives stand in lists of candidates, a sentence; "" where prompts list none.
        catalogue: the groups with all titles, where negatives come from the model itself.
    """

    groups: list[TokenGroup]
    validation: list[TokenGroup]
    truncated: int
    fingerprint: str
    of_epoch: Callable[[int, int], TokenGroup] | None = None
    longest: int = 0
    balance: str = ""
    catalogue: CatalogueGroups | None = None


def _load_data(job: Job, policy: Policy, world_size: int) -> _Data:
    config, tokenizer = job.config, policy.tokenizer
    assert config.data.path is not None
    prepared = PreparedData.for_training(config.data)
    template = make_template(config.template, tokenizer)
    if prepared.items is not None:
        check_titles(prepared.items["title"].tolist(), tokenizer)
    texts = texts_of_data(config.template, prepared)
    check_texts(texts, tokenizer)
    encode = GroupTokenizer(
        tokenizer, template, config.model.max_length, job.loss.scores_history, seed=config.seed, texts=texts
    )
    validation = tokenize_rows(prepared.validation, replace(encode, score_history=False))
    if config.template.lists_candidates:
        listed = listed_groups(job, prepared, encode)
        groups = [listed(index, 0) for index in range(len(listed))]
        truncated, epochs = encode.truncated, epochs_begun(job.stage, make_schedule(job, len(listed), world_size))
        longest = listed.largest(epochs, policy.route.backend != "unshared")  # raises now, rather than in a later epoch
        of_epoch = _remembered(job, listed)
        return _Data(groups, validation, truncated, prepared.fingerprint, of_epoch, longest, listed.balance(epochs))
    if job.kind == "preference" and config.train.on_policy is not None:
        catalogue = CatalogueGroups(prepared, encode)
        groups = catalogue.stored()
        longest = catalogue.largest(groups, config.train.negatives, policy.route.backend != "unshared")
        return _Data(groups, validation, encode.truncated, prepared.fingerprint, longest=longest, catalogue=catalogue)
    if job.kind == "sft" and config.sft.history_order == "shuffled":
        of_epoch = _reordered(job, prepared, encode)
        groups = [of_epoch(index, 0) for index in range(len(prepared.train))]
        longest = config.model.max_length
        return _Data(groups, validation, encode.truncated, prepared.fingerprint, of_epoch, longest)
    groups = tokenize_rows(prepared.train, encode, negatives=0 if job.kind == "sft" else None)
    return _Data(groups, validation, encode.truncated, prepared.fingerprint)


def _reordered(job: Job, prepared: PreparedData, encode: GroupTokenizer) -> Callable[[int, int], TokenGroup]:
    """Token groups by index and epoch, each user's titles in a new order; every stage draws orders of its own."""
    stages = find_model(job.start).stamp.stages
    reordered = ReorderedGroups(groups_from_rows(prepared.train), (job.config.seed, stages))
    for group in reordered.not_yet_asked_for:
        encode(group)  # raises now, rather than in an epoch to come, where a title is too long

    return _remembered(job, lambda index, epoch: encode(reordered(index, epoch)))


def _remembered(job: Job, of_epoch: Callable[[int, int], TokenGroup]) -> Callable[[int, int], TokenGroup]:
    """The same, kept for the two calls of a step: one for the cost, one for the ids."""
    return lru_cache(maxsize=2 * job.stage.global_batch_size)(of_epoch)


def _on_policy(
    job: Job, policy: Policy, engine: Any, data: _Data, batches: Batches, runtime: Runtime, device: torch.device,
    stage3: bool,
) -> OnPolicy | None:  # fmt: skip
    """What draws negatives from the model, where the run asks for that."""
    settings = job.config.train.on_policy if job.kind == "preference" else None
    if settings is None:
        return None
    assert data.catalogue is not None, "loaded with the same setting"
    require_searchable(unwrap_peft(policy.module.causal_lm), job.config.model.max_length)
    search = TitleSearch(
        engine=engine,
        backend=policy.route.backend,
        beams=settings.beams,
        token_budget=batches.token_budget,
        device=device,
        in_step=stage3 and runtime.world_size > 1,
        check=job.config.train.self_check,
        can_widen=not stage3 and job.config.model.quantization == "none",
    )
    always = getattr(job.loss, "target", "") == "always"
    return OnPolicy(
        settings=settings,
        catalogue=data.catalogue,
        schedule=batches.schedule,
        negatives=batches.negatives,
        seed=job.config.seed,
        searching=search,
        rewards=partial(rewards_of, always=always) if takes_rewards(job.loss) else None,
        say=lambda text: runtime.log({"kind": "note", "text": text}),
    )


def _batches(job: Job, policy: Policy, data: _Data, engine: Any, world_size: int, device: torch.device) -> Batches:
    schedule = make_schedule(job, len(data.groups), world_size)
    negatives = job.config.train.negatives if job.kind == "preference" else 0
    shared = policy.route.backend != "unshared"
    budget = job.stage.token_budget
    if budget == "auto":
        groups = [with_negatives(group, negatives, 0) for group in data.groups]
        in_module = job.loss.needs_reference and policy.reference_mode != "model_copy"
        budget = Probe(engine, groups, shared, in_module, device).largest_budget()
        budget = max(budget, data.longest)
    if budget < data.longest:
        what = "its list of candidates" if data.catalogue is None else "the longest titles of the catalogue"
        raise UserError(
            f"{job.section}.token_budget={budget}, but a preference group with {what} takes "
            f"{data.longest} tokens; raise {job.section}.token_budget, or lower the number of negatives or "
            "model.max_length"
        )
    return Batches(data.groups, schedule, negatives, world_size, budget, shared, data.of_epoch)
