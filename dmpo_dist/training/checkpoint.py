"""Saving what training needs to go on, and what people use afterwards."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dmpo_dist.artifacts.files import whole_folder
from dmpo_dist.data.store import PreparedData, texts_of_data
from dmpo_dist.data.template import make_template
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.backbone import find_model, write_stamp
from dmpo_dist.training.engine import gathered_state
from dmpo_dist.training.job import Job
from dmpo_dist.training.runtime import Runtime

TAG = "state"
SHARD_SIZE = "50GB"


def save_checkpoint(runtime: Runtime, engine: Any, step: int, best: dict[str, float]) -> None:
    """Keep what training needs to go on after ``step`` steps: every rank's part of optimizer and trainable weights, and
    the best validation so far; all ranks call it."""
    state = {"dmpo": json.dumps({"step": step, "best": best})}
    frozen = _has_frozen(engine)
    runtime.save(
        step,
        lambda folder: engine.save_checkpoint(
            str(folder), tag=TAG, client_state=state, exclude_frozen_parameters=frozen
        ),
    )
    runtime.log({"kind": "checkpoint", "step": step})


def resume(runtime: Runtime, engine: Any) -> tuple[int, dict[str, float]]:
    """Go on from the latest checkpoint: the steps it has done and the best validation so far; 0 and {} without one.

    Raises:
        UserError: the checkpoint is damaged or was written by another number of ranks.
    """
    with runtime.restore() as folder:
        if folder is None:
            return 0, {}
        try:
            _, client = engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=not _has_frozen(engine))
        except Exception as error:
            raise UserError(
                f"{folder}: the checkpoint cannot be resumed ({(str(error) or repr(error)).splitlines()[0]}); "
                "use the same number of workers and ZeRO stage as the run that wrote it"
            ) from error
    state = json.loads(client["dmpo"])
    runtime.log({"kind": "note", "text": f"resumed from step {state['step']}"})
    return state["step"], state["best"]


def _has_frozen(engine: Any) -> bool:
    return any(not parameter.requires_grad for parameter in engine.module.parameters())


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
        base = {"quantization": job.config.model.quantization, "rendered": rendered}
        with whole_folder(folder, replace=True) as part:
            _write_weights(causal_lm, part, state)
            tokenizer.save_pretrained(part)
            if job.config.template.item_fields and job.config.data.path is not None:
                texts_of_data(job.config.template, PreparedData.load(job.config.data.path)).write(part)
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
