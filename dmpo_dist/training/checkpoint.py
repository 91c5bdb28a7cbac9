"""Saving what training needs to go on, and what people use afterwards."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dmpo_dist.artifacts.files import whole_folder
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.backbone import find_model, write_stamp
from dmpo_dist.modeling.logprobs import LogProbModel, unwrap_peft
from dmpo_dist.training.engine import gathered_state
from dmpo_dist.training.job import Job

TAG = "state"


def save_state(engine: Any, folder: Path, state: dict[str, Any]) -> None:
    """Write every rank's part of optimizer and trainable weights, and ``state`` (JSON), to ``folder``."""
    frozen = any(not p.requires_grad for p in engine.module.parameters())
    engine.save_checkpoint(
        str(folder), tag=TAG, client_state={"dmpo": json.dumps(state)}, exclude_frozen_parameters=frozen
    )


def load_state(engine: Any, folder: Path) -> dict[str, Any]:
    """Put ``engine`` into the state saved in ``folder``; returns what ``save_state`` was given as ``state``.

    Raises:
        UserError: the checkpoint is damaged or was written by another number of ranks.
    """
    frozen = any(not p.requires_grad for p in engine.module.parameters())
    try:
        _, client = engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=not frozen)
    except Exception as error:
        raise UserError(
            f"{folder}: the checkpoint cannot be resumed ({str(error).splitlines()[0] if str(error) else error!r}); "
            "use the same number of workers and ZeRO stage as the run that wrote it"
        ) from error
    return json.loads(client["dmpo"])


def save_model(
    module: LogProbModel, tokenizer: Any, folder: Path, job: Job, facts: dict[str, Any], stage3: bool
) -> None:
    """Write the policy as a Hugging Face model or PEFT adapter with tokenizer and stamp; all ranks call it.

    The folder appears whole or not at all, and what was written is read back and compared.
    """
    rank = dist.get_rank()
    adapter_only = hasattr(module.causal_lm, "peft_config")
    state = gathered_state(module.causal_lm, stage3, keep=rank == 0, trained_only=adapter_only)
    if rank == 0:
        behind = {"stages": 1 + find_model(job.start).stamp.stages}
        base = {"quantization": job.config.model.quantization}
        with whole_folder(folder, replace=True) as part:
            _write_weights(module.causal_lm, part, state)
            tokenizer.save_pretrained(part)
            write_stamp(part, job.config.template, stage=job.kind, start=job.start, **behind, **base, **facts)
    dist.barrier()


def _write_weights(model: Any, folder: Path, state: dict[str, Tensor]) -> None:
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        adapter = get_peft_model_state_dict(
            model, state_dict=state, adapter_name="default", save_embedding_layers=False
        )
        adapter = {name: tensor.contiguous() for name, tensor in adapter.items()}
        _write_adapter(model, folder, adapter)
        return
    saved = unwrap_peft(model)
    saved.save_pretrained(folder, state_dict={n: t for n, t in state.items() if n in saved.state_dict()})
    _compare(folder / "model.safetensors", {n: state[n] for n in state})


def _write_adapter(model: Any, folder: Path, adapter: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    if not adapter or not all(tensor.numel() for tensor in adapter.values()):
        raise RuntimeError("the gathered adapter is empty")
    save_file(adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["default"]
    inference_mode, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = inference_mode
    _compare(folder / "adapter_model.safetensors", adapter)


def _compare(file: Path, expected: dict[str, Tensor]) -> None:
    """Read the weights back; a file that lost them is worse than an error."""
    from safetensors.torch import load_file

    if not file.exists():  # sharded: transformers wrote an index, whose shards it checks when loading
        return
    written = load_file(file)
    for name, tensor in written.items():
        if name not in expected or not torch.equal(tensor, expected[name]):
            raise RuntimeError(f"{file}: {name} did not survive saving")
