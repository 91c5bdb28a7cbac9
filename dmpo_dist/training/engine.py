"""DeepSpeed behind a few functions: the process group, the configuration, loading in parts, engines, gathered weights.

Everything that leans on how DeepSpeed behaves (checked on 0.19.8) is in this file and in ``optimizer_state``.
"""

import logging
import os
import re
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor, distributed, nn

from dmpo_dist.config import StageConfig
from dmpo_dist.errors import UserError
from dmpo_dist.parsing import parse_json
from dmpo_dist.training.network import bind_gloo_towards

ZERO_NUMBERS = re.compile(r"(_size|_live_parameters|_threshold|_distance)$")
"""Keys of ``zero_optimization`` that hold numbers."""
SMALL_MODEL = 100_000_000
"""Below this many parameters ZeRO-3 partitions every one, however small."""


def start_process_group() -> torch.device:
    """Join the ranks named by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; returns this rank's device."""
    cuda = torch.cuda.is_available()
    for key, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(key, value)
    os.environ.setdefault("MASTER_PORT", "29500")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    deepspeed = _import_deepspeed()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        # init_distributed would compile a shared-memory collective for a minute that is then not used without
        # LOCAL_SIZE; marking it incompatible skips the build. A private table: deepspeed is pinned below 0.20.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if not distributed.is_initialized():  # under Ray it is, on the network of the nodes
            several_hosts = os.environ["WORLD_SIZE"] != os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
            bind_gloo_towards(os.environ["MASTER_ADDR"], several_hosts)
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
    return device


@contextmanager
def single_rank() -> Iterator[None]:
    """Within, this process is the only rank of a run, as torchrun would have started it; afterwards it is free again.

    For a notebook: environment and process group are as they were before when this ends.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    before = dict(os.environ)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        if distributed.is_initialized():
            _import_deepspeed().comm.destroy_process_group()


SET_BY = {
    "lr": "the stage's learning_rate",
    "weight_decay": "the stage's weight_decay",
    "gradient_clipping": "the stage's max_grad_norm",
    "bf16.enabled": "model.dtype",
    "fp16.enabled": "model.dtype",
}
"""Settings of DeepSpeed that keys of ours decide, so that config.yaml and the model card name what was trained by."""


def resolve_config(name: str, stage: StageConfig, dtype: str, world_size: int, parameters: int) -> dict[str, Any]:
    """The DeepSpeed configuration ``name`` with every "auto" filled in.

    Args:
        name: a file in deepspeed_configs/ without its ending, or a path to a JSON file.
        stage: gives learning rate, weight decay and clipping.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        world_size: number of ranks.
        parameters: number of parameters of the model.

    Raises:
        UserError: no such configuration, not JSON, no optimizer or ZeRO stage, or settings under which the gradients
            would be wrong.
    """
    config = {"gradient_clipping": "auto", "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}} | _read_config(
        name
    )
    _require_exact_accumulation(config, name)
    _require_engine(config, name)
    values = {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": world_size,
        "lr": stage.learning_rate,
        "weight_decay": stage.weight_decay,
        "gradient_clipping": stage.max_grad_norm,
        "bf16.enabled": dtype == "bfloat16",
        "fp16.enabled": dtype == "float16",
        "stage3_param_persistence_threshold": 0 if parameters < SMALL_MODEL else 100_000,
    }
    filled = _fill(config, values, name)
    _require_zero_values(filled["zero_optimization"], name)
    return filled


@contextmanager
def partitioned_loading(config: dict[str, Any]) -> Iterator[None]:
    """Within, each rank keeps only its part of the weights that ``from_pretrained`` reads, if ``config`` is ZeRO-3."""
    if not is_stage3(config):
        yield
        return
    _import_deepspeed()
    from transformers.integrations import deepspeed as hooks

    watched = hooks.HfDeepSpeedConfig(config)  # transformers only holds it weakly
    try:
        yield
    finally:
        del watched
        hooks.unset_hf_deepspeed_config()


def is_stage3(config: dict[str, Any]) -> bool:
    """Whether a resolved configuration partitions parameters."""
    return config["zero_optimization"]["stage"] == 3


def start_engine(module: nn.Module, config: dict[str, Any]) -> Any:
    """Wrap ``module``; only parameters that require gradients are optimized, norms and biases without decay."""
    deepspeed = _import_deepspeed()
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if len(whole_shape(p)) > 1]},
        {"params": [p for p in trainable if len(whole_shape(p)) <= 1], "weight_decay": 0.0},
    ]
    engine, *_ = deepspeed.initialize(model=module, model_parameters=[g for g in groups if g["params"]], config=config)
    return engine


def start_frozen_engine(module: nn.Module, config: dict[str, Any]) -> Any:
    """An engine that only runs ``module`` forward, its parameters partitioned over the ranks (ZeRO-3)."""
    deepspeed = _import_deepspeed()
    forward_only = {key: value for key, value in config.items() if key != "optimizer"}
    zero = {key: value for key, value in config["zero_optimization"].items() if key != "offload_optimizer"}
    engine, *_ = deepspeed.initialize(model=module, config=forward_only | {"zero_optimization": zero})
    return engine


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of ``parameter`` before ZeRO-3 took it apart."""
    return getattr(parameter, "ds_shape", parameter.shape)


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Use ``learning_rate`` in the next step; a pure function of the step sets it, so no scheduler has state."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


@contextmanager
def whole(parameters: list[Tensor], gather: bool) -> Iterator[None]:
    """Within, ZeRO-3 parameters are whole on every rank; a collective when ``gather`` is set."""
    if not gather:
        yield
        return
    deepspeed = _import_deepspeed()
    with deepspeed.zero.GatheredParameters(parameters):
        yield


@contextmanager
def updated_whole(parameter: Tensor, gather: bool) -> Iterator[bool]:
    """Within, write ``parameter`` whole where the value is True; under ZeRO-3 (``gather``) all ranks get rank 0's."""
    if not gather:
        yield True
        return
    with _import_deepspeed().zero.GatheredParameters([parameter], modifier_rank=0):
        yield distributed.get_rank() == 0


def gathered_state(module: nn.Module, stage3: bool, keep: bool, trained_only: bool) -> dict[str, Tensor]:
    """Names and CPU copies of parameters (tied ones once) and buffers of ``module``, one at a time under ZeRO-3.

    All ranks take part; only those with ``keep`` get the copies (the others an empty dict). With ``trained_only``
    frozen parameters are left where they are.
    """
    state: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if trained_only and not parameter.requires_grad:
            continue
        with whole([parameter], stage3):
            if keep:
                state[name] = parameter.detach().cpu().clone()
    if keep:
        state |= {n: b.detach().cpu().clone() for n, b in module.named_buffers()}
    return state


def _read_config(name: str) -> dict[str, Any]:
    shipped = resources.files("dmpo_dist.deepspeed_configs")
    file: Any = Path(name) if name.endswith(".json") else shipped / f"{name}.json"
    if not file.is_file():
        names = sorted(f.name.removesuffix(".json") for f in shipped.iterdir() if f.name.endswith(".json"))
        raise UserError(f"deepspeed={name}: no such configuration; known are {', '.join(names)}, or give a .json path")
    try:
        config = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"deepspeed={name}: cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"deepspeed={name}: must hold an object of settings, not a {type(config).__name__}")
    return config


def _require_exact_accumulation(config: dict[str, Any], name: str) -> None:
    """Packing makes the number of micro-batches vary, so DeepSpeed must not manage accumulation."""
    if config.get("gradient_accumulation_steps", 1) != 1 or config.get("managed_gradient_accumulation", True):
        raise UserError(
            f'deepspeed={name}: must set "gradient_accumulation_steps": 1 and "managed_gradient_accumulation": false; '
            "the training loop accumulates micro-batches itself, and gradients would be wrong otherwise"
        )


def _require_engine(config: dict[str, Any], name: str) -> None:
    """What DeepSpeed needs to train, and says less clearly, on a worker."""
    zero, optimizer = config.get("zero_optimization"), config.get("optimizer")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise UserError(f'deepspeed={name}: must set "zero_optimization": {{"stage": 0, 1, 2 or 3}}')
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("type"), str):
        raise UserError(
            f'deepspeed={name}: must set an optimizer, as in "optimizer": {{"type": "AdamW", "params": {{"lr": "auto", '
            '"weight_decay": "auto", "torch_adam": true}}'
        )


def _require_zero_values(zero: dict[str, Any], name: str) -> None:
    for key, value in zero.items():
        where = f"deepspeed={name}: zero_optimization.{key}"
        if ZERO_NUMBERS.search(key) and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise UserError(f"{where} is {value!r}, which is no number; write one, as in 5e8, or leave the key out")
        if key.startswith("offload_") and not isinstance(value, (dict, NoneType)):
            raise UserError(f'{where} is {value!r}; write a mapping, as in {{"device": "cpu"}}, or leave the key out')


def _fill(node: Any, values: dict[str, Any], name: str, path: str = "") -> Any:
    if isinstance(node, dict):
        return {k: _fill(v, values, name, f"{path}.{k}" if path else k) for k, v in node.items()}
    ours = next((key for key in SET_BY if path == key or path.endswith(f".{key}")), None)
    if ours and node != "auto" and node != values[ours]:
        raise UserError(
            f'deepspeed={name}: {path} is {node}, but {SET_BY[ours]} says {values[ours]}; write "auto" there, and '
            "set it by that key"
        )
    if node != "auto":
        return node
    for key in (path, ".".join(path.split(".")[-2:]), path.rsplit(".", 1)[-1]):
        if key in values:
            return values[key]
    raise UserError(f'deepspeed={name}: "auto" is not known for {path}; set a value')


def _import_deepspeed() -> Any:
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # torch calls the collectives DeepSpeed uses deprecated, once per call
    warnings.filterwarnings("ignore", category=FutureWarning, module="(torch|deepspeed)")
    return deepspeed
