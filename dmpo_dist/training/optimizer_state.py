"""What an engine's optimizer holds of each trained weight, whatever the ZeRO stage and the number of ranks.

DeepSpeed (read in 0.19.8) keeps the fp32 weights, and with them the moments, in one of these forms:

- stage 0 in fp32: the model's own parameters, on every rank;
- stage 0 in bf16 or fp16: a copy of each parameter, or of each parameter group in a row, on every rank;
- stages 1 and 2: each parameter group in a row, of which a rank has one part; ``_hp_mapping`` of a parameter says where
  its share of that lies;
- stage 3: each parameter is cut into equal parts, one a rank, and a rank's parts lie in a row; ``grad_position`` says
  where.

Each of these is a tensor that the optimizer knows, here called the holder, and a slice of it that is a slice of a
weight. All that an optimizer remembers of a weight lies in tensors of the holder's shape, and in single numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dmpo_dist.errors import UserError
from dmpo_dist.training.engine import updated_whole, whole_shape

LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What dynamic loss scaling remembers, under fp16."""


@dataclass(frozen=True)
class Fragment:
    """A slice of a trained weight that this rank updates.

    Attributes:
        name: of the weight in the engine's module.
        holder: the optimizer's tensor; where the slice begins in it is ``offset``.
        start, numel: the slice of the weight, flattened.
        copied: whether every rank holds it.
    """

    name: str
    holder: Tensor
    offset: int
    start: int
    numel: int
    copied: bool

    def of(self, tensor: Tensor) -> Tensor:
        """(numel,) the slice in ``tensor``, which has the holder's shape; a view."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


def trained_parameters(engine: Any) -> dict[str, Any]:
    """Trained parameters of the engine's module by name."""
    return {name: p for name, p in engine.module.named_parameters() if p.requires_grad}


def trained_shapes(engine: Any) -> dict[str, list[int]]:
    """Whole shapes of the trained weights by name."""
    return {name: list(whole_shape(parameter)) for name, parameter in trained_parameters(engine).items()}


def fragments(engine: Any) -> list[Fragment]:
    """This rank's slices of the trained weights, in the order of the module."""
    parameters, optimizer = trained_parameters(engine), engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return _stage3(parameters, optimizer)
    if any(hasattr(parameter, "_hp_mapping") for parameter in parameters.values()):
        return _stages_1_and_2(parameters, optimizer)
    return _stage0(parameters, optimizer)


def _stage3(parameters: dict[str, Any], optimizer: Any) -> list[Fragment]:
    found = []
    for name, parameter in parameters.items():
        group, offset, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = numel * dist.get_rank(parameter.ds_process_group)
        kept = max(0, min(numel, parameter.ds_numel - start))  # the last parts are padded
        found.append(Fragment(name, optimizer.fp32_partitioned_groups_flat[group], offset, start, kept, False))
    return [fragment for fragment in found if fragment.numel]


def _stages_1_and_2(parameters: dict[str, Any], optimizer: Any) -> list[Fragment]:
    bf16_optimizer = hasattr(optimizer, "fp32_groups_flat_partition")
    flat = optimizer.fp32_groups_flat_partition if bf16_optimizer else optimizer.single_partition_of_fp32_groups
    found = []
    for name, parameter in parameters.items():
        mapping = parameter._hp_mapping
        if mapping is not None:  # else it lies on other ranks
            at, of_weight = mapping.hp_fragment_address, mapping.lp_fragment_address
            holder = flat[mapping.param_group_index]
            found.append(Fragment(name, holder, at.start, of_weight.start, of_weight.numel, False))
    return found


def _stage0(parameters: dict[str, Any], optimizer: Any) -> list[Fragment]:
    holders = {id(parameter): (parameter, 0) for parameter in parameters.values()}
    for group, own in enumerate(getattr(optimizer, "fp16_groups", [])):
        offset = 0
        for index, parameter in enumerate(own):
            if hasattr(optimizer, "fp32_groups_flat"):
                holders[id(parameter)] = (optimizer.fp32_groups_flat[group], offset)
                offset += parameter.numel()
            else:
                holders[id(parameter)] = (optimizer.fp32_groups[group][index], 0)
    return [Fragment(name, *holders[id(p)], 0, p.numel(), True) for name, p in parameters.items()]


def remembered(engine: Any, holder: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What the optimizer remembers of ``holder``: tensors of its shape, and numbers, such as how many steps it took.

    Raises:
        UserError: something else, which another number of workers could not use.
    """
    tensors, numbers = {}, {}
    for key, value in _inner(engine).state.get(holder, {}).items():
        if torch.is_tensor(value) and value.numel() == holder.numel() and value.ndim:
            tensors[key] = value
        elif isinstance(value, int | float) or (torch.is_tensor(value) and value.ndim == 0):
            numbers[key] = value.item() if torch.is_tensor(value) else value
        else:
            kind = type(_inner(engine)).__name__
            raise UserError(f"deepspeed: the optimizer {kind} keeps {key}, which no checkpoint can hold; use AdamW")
    return tensors, numbers


def restore_memory(engine: Any, holder: Tensor, kinds: dict[str, torch.dtype], numbers: dict[str, float]) -> None:
    """Give the optimizer the ``numbers`` of ``holder``, and zeros of its shape for each of ``kinds`` to be filled."""
    in_tensors = type(_inner(engine)).__module__.startswith("torch.")
    state = {key: torch.zeros_like(holder, dtype=dtype, requires_grad=False) for key, dtype in kinds.items()}
    # torch counts steps in a tensor, DeepSpeed's own optimizers in a number
    counts = {key: torch.tensor(float(v)) if in_tensors else v for key, v in numbers.items()}
    _inner(engine).state[holder] = counts | state


def loss_scale(engine: Any) -> dict[str, float]:
    """What dynamic loss scaling remembers; {} without it."""
    scaler = _scaler(engine)
    return {name: float(getattr(scaler, name)) for name in LOSS_SCALE if hasattr(scaler, name)}


def restore_loss_scale(engine: Any, values: dict[str, float]) -> None:
    """Go on scaling the loss as another engine did, see ``loss_scale``."""
    scaler = _scaler(engine)
    for name, value in values.items():
        if hasattr(scaler, name):
            setattr(scaler, name, value if name == "cur_scale" else int(value))


def copy_to_model(engine: Any, weight_of: Callable[[str], Tensor]) -> None:
    """Put the whole, flat fp32 weights that ``weight_of`` has by name into the model itself, in the model's type.

    One at a time; a collective under ZeRO-3, where rank 0 alone asks for them.
    """
    stage3 = engine.zero_optimization_stage() == 3
    for name, parameter in trained_parameters(engine).items():
        with torch.no_grad(), updated_whole(parameter, stage3) as own:
            if own:
                parameter.data.copy_(weight_of(name).view(parameter.shape))


def _inner(engine: Any) -> Any:
    """torch's or DeepSpeed's own optimizer within the one of the ZeRO stage."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _scaler(engine: Any) -> Any:
    return getattr(engine.optimizer, "loss_scaler", None) or getattr(engine.optimizer, "loss_scale_config", None)
