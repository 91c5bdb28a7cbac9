"""Saving what training needs to go on, and what people use afterwards."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dmpo_dist.artifacts.files import whole_folder
from dmpo_dist.data.store import PreparedData, texts_of_data
from dmpo_dist.data.template import make_template
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.backbone import find_model, write_stamp
from dmpo_dist.modeling.model_files import weights_digests, written_digests
from dmpo_dist.training.engine import gathered_state
from dmpo_dist.training.job import Job
from dmpo_dist.training.optimizer_state import trained_shapes
from dmpo_dist.training.runtime import Runtime, from_rank_zero
from dmpo_dist.training.state_files import files_damage, read_index, read_state, write_state

SHARD_SIZE = "50GB"
Best = dict[str, float]
"""The best validation so far, see ``selection.Selection``."""


def save_checkpoint(
    runtime: Runtime, engine: Any, job: Job, step: int, best: Best, drawn: list[list[Any]] | None = None
) -> None:
    """Keep what training needs to go on after ``step`` steps: trained weights, optimizer, the best validation so far
    and the titles that were ``drawn`` for the next steps; all ranks call it."""
    about: dict[str, Any] = {"step": step, "best": best, "run_id": job.run_id, "inputs": job.inputs}
    if drawn:
        about["drawn"] = drawn
    runtime.save(step, lambda folder: write_state(folder, engine, about))
    runtime.log({"kind": "checkpoint", "step": step})


class Resumed(NamedTuple):
    """Where a run goes on: ``step`` steps are done, 0 without a checkpoint; the best validation so far; and the titles
    that were drawn for the next steps (``OnPolicy.state``)."""

    step: int
    best: Best
    drawn: list[list[Any]]


def resume(runtime: Runtime, engine: Any, job: Job, lost: Callable[[int, Best], str]) -> Resumed:
    """Go on from the latest checkpoint that can be used.

    Args:
        lost: (step, best) of a checkpoint -> why the weights that were the best then are gone, "" where they are not.

    Raises:
        UserError: there are checkpoints, or the log tells of some, and none of them can be used.
    """
    found: dict[str, Any] = {}

    def problem(folder: Path, step: int) -> str:
        index = from_rank_zero(read_index(folder))
        if isinstance(index, str):
            return index
        found.update(index)
        if index["step"] != step or index["run_id"] != job.run_id:
            return f"it holds step {index['step']} of the run {index['run_id'] or 'without a name'}, not of this one"
        return files_damage(folder, index) or lost(step, index["best"])

    with runtime.restore(problem) as folder:
        if folder is None:
            _require_no_record(job)
            return Resumed(0, {}, [])
        if trained_shapes(engine) != found["shapes"]:
            raise UserError(f"{folder}: the checkpoint is of other weights than the model; resume with its settings")
        read_state(folder, engine, found)
    step = found["step"]
    engine.global_steps = step
    runtime.log({"kind": "note", "text": f"resumed from step {step}"})
    return Resumed(step, found["best"], found.get("drawn", []))


def _require_no_record(job: Job) -> None:
    if job.checkpointed:
        storage = job.config.cluster.storage_path or job.output
        raise UserError(
            f"{job.output}: its log tells of a checkpoint of step {job.checkpointed}, and {storage} holds none of this "
            "run; bring it back, give the cluster.storage_path where it is, or start anew with another output_dir"
        )


def save_model(engine: Any, tokenizer: Any, folder: Path, job: Job, stamp: dict[str, Any]) -> None:
    """Write the policy as a Hugging Face model or PEFT adapter with tokenizer and ``stamp``; all ranks call it.

    The folder appears whole or not at all, and what was written is read back and compared.
    """
    rank = dist.get_rank()
    causal_lm, stage3 = engine.module.causal_lm, engine.zero_optimization_stage() == 3
    state = gathered_state(causal_lm, stage3, keep=rank == 0, trained_only=hasattr(causal_lm, "peft_config"))
    if rank == 0:
        behind = {"stages": 1 + find_model(job.start).stamp.stages}
        rendered = make_template(job.config.template, tokenizer).rendered()
        model = job.config.model
        base = {"quantization": model.quantization, "max_length": model.max_length, "rendered": rendered}
        with whole_folder(folder, replace=True) as part:
            _write_weights(causal_lm, part, state)
            tokenizer.save_pretrained(part)
            if job.config.template.item_fields and job.config.data.path is not None:
                texts_of_data(job.config.template, PreparedData.load(job.config.data.path)).write(part)
            base["digests"] = written_digests(part)
            if hasattr(causal_lm, "peft_config"):
                base["base_digests"] = weights_digests(find_model(job.start).base)
            write_stamp(part, job.config.template, stage=job.section, start=job.start, **behind, **base, **stamp)
    dist.barrier()


def _write_weights(model: Any, folder: Path, state: dict[str, Tensor]) -> None:
    if not hasattr(model, "peft_config"):
        _write_whole(model, folder, state)
        return
    from peft import get_peft_model_state_dict

    adapter = get_peft_model_state_dict(model, state_dict=state, adapter_name="default", save_embedding_layers=False)
    _write_adapter(model, folder, {name: tensor.contiguous() for name, tensor in adapter.items()})


def _write_whole(model: Any, folder: Path, state: dict[str, Tensor]) -> None:
    """Save the gathered ``state`` and load it again, because names in the files need not be those in memory.

    Transformers renames weights when it saves, and splits stacked experts, so only a reload says what was written.
    ``state`` is empty afterwards: digests stand for it while the model is loaded, so that rank 0 holds one copy of the
    weights on the host at a time. The reload reads the files once, and each weight is hashed twice.
    """
    persistent = model.state_dict().keys()
    weights = {name: tensor for name, tensor in state.items() if name in persistent}
    expected = {name: (tensor.dtype, _digest(tensor)) for name, tensor in weights.items()}
    model.save_pretrained(folder, state_dict=weights, max_shard_size=SHARD_SIZE)
    weights.clear()
    state.clear()
    again = type(model).from_pretrained(folder, dtype=model.dtype)
    seen = dict(again.named_parameters())  # tied weights once, as in ``gathered_state``
    strange = sorted(seen.keys() - expected.keys())
    seen |= dict(again.named_buffers())
    # a few models keep some weights in fp32 when they are loaded, whatever type they were trained in
    lost = [n for n, (dtype, digest) in expected.items() if n not in seen or _digest(seen[n].to(dtype)) != digest]
    if lost or strange:
        raise RuntimeError(f"{folder}: {[*lost, *strange][0]} did not survive saving")


def _digest(tensor: Tensor) -> bytes:
    return hashlib.sha256(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data).digest()


def _write_adapter(model: Any, folder: Path, adapter: dict[str, Tensor]) -> None:
    from safetensors.torch import load_file, save_file

    if not adapter or not all(tensor.numel() for tensor in adapter.values()):
        raise RuntimeError("the gathered adapter is empty")
    file = folder / "adapter_model.safetensors"
    save_file(adapter, file, metadata={"format": "pt"})
    config = model.peft_config["default"]
    inference_mode, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = inference_mode
    written = load_file(file)
    for name in adapter.keys() | written.keys():
        if name not in written or name not in adapter or not torch.equal(written[name], adapter[name]):
            raise RuntimeError(f"{file}: {name} did not survive saving")
