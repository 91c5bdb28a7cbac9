"""A checkpoint's files: slices of weights and moments in safetensors, and ``checkpoint.json``, which describes them.

Every rank writes the slices that its optimizer has, in files of about a gibibyte, and says in their names where they
begin. So the files know neither how many ranks there were nor their ZeRO stage: a reader takes from them what its own
slices need. ``checkpoint.json`` is written last and holds the digest of each file and its own.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dmpo_dist.artifacts.digest import damage, file_digest, json_digest
from dmpo_dist.artifacts.files import write_json
from dmpo_dist.training.optimizer_state import (
    copy_to_model,
    fragments,
    loss_scale,
    remembered,
    restore_loss_scale,
    restore_memory,
    trained_shapes,
)

INDEX_FILE = "checkpoint.json"
VERSION = 1
WEIGHT = "weight"
FILE_BYTES = 1 << 30
"""A file is closed once it holds as much, which is what a rank needs on the host beside its own state."""


def write_state(folder: Path, engine: Any, about: dict[str, Any]) -> None:
    """Write this rank's slices to ``folder`` and, on rank 0, the index; all ranks call it.

    Args:
        folder: shared by all ranks, or of each rank alone, to be joined afterwards.
        about: goes into the index, JSON.
    """
    digests, numbers = _write_slices(folder, engine)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (digests, numbers))
    if dist.get_rank() == 0:
        content = {
            "version": VERSION,
            **about,
            "shapes": trained_shapes(engine),
            "numbers": {name: value for _, of_rank in gathered for name, value in of_rank.items()},
            "loss_scale": loss_scale(engine),
            "files": {name: digest for of_rank, _ in gathered for name, digest in of_rank.items()},
        }
        write_json(folder / INDEX_FILE, content | {"digest": json_digest(content)})


def _write_slices(folder: Path, engine: Any) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """Digests of the files written, and by weight the numbers that the optimizer remembers."""
    rank, digests = dist.get_rank(), {}
    numbers: dict[str, dict[str, float]] = {}
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        file = folder / f"state-{rank:05d}-{len(digests):05d}.safetensors"
        save_file(pending, file)
        digests[file.name] = file_digest(file)
        pending.clear()

    for fragment in fragments(engine):
        if fragment.copied and rank:
            continue
        tensors, numbers[fragment.name] = remembered(engine, fragment.holder)
        for kind, tensor in ({WEIGHT: fragment.holder} | tensors).items():
            # a copy, as slices of one tensor may not share memory in a file
            pending[f"{kind}/{fragment.start}/{fragment.name}"] = fragment.of(tensor).cpu().clone()
        if sum(tensor.nbytes for tensor in pending.values()) >= FILE_BYTES:
            flush()
    if pending:
        flush()
    return digests, numbers


def read_index(folder: Path) -> dict[str, Any] | str:
    """The content of the index, or a sentence that says why it cannot be used."""
    file = folder / INDEX_FILE
    if not file.is_file():
        return f"it has no {INDEX_FILE}: it is cut off, no checkpoint, or one that an earlier dmpo wrote"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        expected = content.pop("digest")
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        return f"{INDEX_FILE} is damaged ({type(error).__name__})"
    if content.get("version") != VERSION:
        return f"{INDEX_FILE} is of version {content.get('version')}, this dmpo reads version {VERSION}"
    if json_digest(content) != expected:
        return f"{INDEX_FILE} is not what was written"
    return content


def files_damage(folder: Path, index: dict[str, Any]) -> str:
    """What is wrong with the files, a sentence, "" where nothing is; ranks share the work, all get the same answer."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    own = {name: digest for n, (name, digest) in enumerate(index["files"].items()) if n % world_size == rank}
    found = [""] * world_size
    dist.all_gather_object(found, damage(folder, own))
    return next(filter(None, found), "")


def read_state(folder: Path, engine: Any, index: dict[str, Any]) -> None:
    """Give ``engine`` the state that ``index`` describes; all ranks call it."""
    with ExitStack() as stack:
        reader = _Reader([stack.enter_context(safe_open(folder / name, "pt")) for name in index["files"]])
        own = fragments(engine)
        for holder, names in _by_holder(own).items():
            kinds = {kind: reader.dtype(kind, name) for name in names for kind in reader.kinds(name)}
            numbers = [index["numbers"].get(name, {}) for name in names]
            # one holder may have been several, each with its own numbers: steps are taken together, so these are alike
            together = {key: max(n[key] for n in numbers if key in n) for n in numbers for key in n}
            if kinds or together:
                restore_memory(engine, holder, kinds, together)
        for fragment in own:
            tensors, _ = remembered(engine, fragment.holder)
            for kind in [WEIGHT, *reader.kinds(fragment.name)]:
                target = fragment.holder if kind == WEIGHT else tensors[kind]
                fragment.of(target).copy_(reader.read(kind, fragment.name, fragment.start, fragment.numel))
        copy_to_model(engine, lambda name: reader.read(WEIGHT, name, 0, _numel(index["shapes"][name])))
    restore_loss_scale(engine, index["loss_scale"])


def _by_holder(own: list[Any]) -> dict[Tensor, list[str]]:
    """Names of the weights of each holder; tensors are keys by identity."""
    found: dict[Tensor, list[str]] = {}
    for fragment in own:
        found.setdefault(fragment.holder, []).append(fragment.name)
    return found


def _numel(shape: list[int]) -> int:
    return torch.Size(shape).numel()


@dataclass
class _Slice:
    file: Any
    key: str
    start: int
    numel: int


class _Reader:
    """Any slice of any weight or moment, from however many slices in however many files.

    Args:
        files: opened safetensors.
    """

    def __init__(self, files: list[Any]) -> None:
        self._slices: dict[tuple[str, str], list[_Slice]] = {}
        for file in files:
            for key in file.keys():  # noqa: SIM118 - no mapping
                kind, start, name = key.split("/", 2)
                numel = file.get_slice(key).get_shape()[0]
                self._slices.setdefault((kind, name), []).append(_Slice(file, key, int(start), numel))

    def kinds(self, name: str) -> list[str]:
        """What is remembered of a weight."""
        return [kind for kind, of in self._slices if of == name and kind != WEIGHT]

    def dtype(self, kind: str, name: str) -> torch.dtype:
        first = self._slices[kind, name][0]
        return first.file.get_slice(first.key)[:0].dtype

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """(numel,) values from ``start`` on."""
        result = torch.empty(numel, dtype=self.dtype(kind, name))
        for overlap, first, last in self._overlaps(kind, name, start, start + numel):
            values = overlap.file.get_slice(overlap.key)[first - overlap.start : last - overlap.start]
            result[first - start : last - start] = values
            numel -= last - first
        if numel:
            raise SafetensorError(f"{kind} of {name} is not complete")
        return result

    def _overlaps(self, kind: str, name: str, start: int, end: int) -> Iterator[tuple[_Slice, int, int]]:
        for piece in self._slices[kind, name]:
            first, last = max(start, piece.start), min(end, piece.start + piece.numel)
            if first < last:
                yield piece, first, last
