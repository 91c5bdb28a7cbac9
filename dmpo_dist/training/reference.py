"""Reference log-probs computed once before training instead of in every step.

The reference is frozen, so one pass over the training groups gives every value a run will ask for. All ranks share the
pass; a value belongs to (group, stored candidate), so negatives that change from epoch to epoch find theirs.

On disk a cache is a folder named by the digest of all it depends on, with one safetensors file per block of groups.
Blocks appear whole, so an interrupted pass goes on where it stopped; ``complete.json`` is written last.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dmpo_dist import __version__
from dmpo_dist.artifacts.digest import digests_of
from dmpo_dist.artifacts.files import whole_file, write_json
from dmpo_dist.artifacts.stamp import ModelStamp
from dmpo_dist.batching.layout import Layout
from dmpo_dist.config import ModelConfig
from dmpo_dist.data.schema import above_last
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.backbone import ModelSource, find_model
from dmpo_dist.modeling.scoring import deal_for_scoring, score_micro_batches
from dmpo_dist.training.groups import candidate_columns, with_negatives
from dmpo_dist.training.runtime import from_rank_zero

Reference = Callable[[Layout, Sequence[int], int], Tensor]
"""(layout, its groups, epoch) -> (R,) reference log-probs of its responses on the layout's device."""

BLOCK = 4096
"""Groups per block: what an interruption loses at most."""
MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.model", "*.jinja")
FORMAT = 3
COMPLETE = "complete.json"


@dataclass(frozen=True)
class ReferenceCache:
    """Reference log-probs of all training groups.

    Attributes:
        values: (n_groups, 1 + M) float32 on the CPU, the positive first, NaN where a group has fewer candidates.
        stored: for each group how many negatives the data holds, and how many responses stand above them.
        negatives: K of a step.
    """

    values: Tensor
    stored: Sequence[tuple[int, int]]
    negatives: int

    def __call__(self, layout: Layout, groups: Sequence[int], epoch: int) -> Tensor:
        """(R,) log-probs of the responses of ``groups`` with the negatives of ``epoch``, in the order of the layout."""
        stored = (self.stored[group] for group in groups)
        columns = [candidate_columns(n, self.negatives, epoch * self.negatives, above) for n, above in stored]
        rows = [g for g, of_group in zip(groups, columns, strict=True) for _ in of_group]
        values = self.values[rows, [column for of_group in columns for column in of_group]]
        return values.to(layout.input_ids.device, non_blocking=True)


@dataclass(frozen=True)
class ReferencePass:
    """What a pass needs: the reference itself, and how the ranks share the work.

    Attributes:
        log_probs: ``Layout -> (R,)`` reference log-probs; under ZeRO-3 a collective.
        negatives: K of a step.
        epochs: epochs of the run, which decides how many stored negatives are needed.
        token_budget, shared, device: how a forward is laid out.
        rank, world_size: this process among those that share the pass.
        say: prints a line on rank 0.
    """

    log_probs: Callable[[Layout], Tensor]
    negatives: int
    epochs: int
    token_budget: int
    shared: bool
    device: torch.device
    rank: int
    world_size: int
    say: Callable[[str], None]

    def run(
        self, groups: Sequence[TokenGroup], folder: Path | None = None, key: dict[str, Any] | None = None
    ) -> ReferenceCache:
        """The cache of ``groups``; every rank calls it and gets all values.

        Args:
            groups: all training groups with every stored negative.
            folder: where caches on disk live; None keeps this one in memory.
            key: all the values depend on but the token ids, JSON; names the cache in ``folder``.

        Raises:
            UserError: on every rank, if a complete cache is damaged or a log-prob is not finite.
        """
        above = [above_last(group.levels) for group in groups]
        stored = [(len(group.branches) - number, number) for group, number in zip(groups, above, strict=True)]
        needed = [replace(with_negatives(group, self.negatives * self.epochs, 0), prefix_scored=()) for group in groups]
        width = max(len(group.branches) for group in needed)
        named = {**(key or {}), "candidates": width, "groups": len(groups), "tokens": token_digest(needed)}
        cache = None if folder is None else _CacheFolder(folder, named)
        blocks = [needed[start : start + BLOCK] for start in range(0, len(needed), BLOCK)]
        values = torch.cat(
            [self._block(number, block, width, cache, len(blocks)) for number, block in enumerate(blocks)]
        )
        if cache is not None and self.rank == 0:
            cache.finish(len(blocks))
        return ReferenceCache(values, stored, self.negatives)

    def _block(
        self, number: int, groups: Sequence[TokenGroup], width: int, cache: "_CacheFolder | None", count: int
    ) -> Tensor:
        """(len(groups), width) values, read by rank 0 where they are on disk, else computed by all."""
        if cache is not None:
            values = self._read(cache, number, (len(groups), width))
            if values is not None:
                return values
        values = self._compute(groups, width, first=number * BLOCK)
        if cache is not None and self.rank == 0:
            cache.write(number, values)
        self.say(f"reference log-probs: block {number + 1} of {count}")
        return values

    def _compute(self, groups: Sequence[TokenGroup], width: int, first: int) -> Tensor:
        """All ranks score their share of ``groups``, the run's from ``first`` on, then add up, each value being zero on
        all ranks but one."""
        values = torch.zeros(len(groups), width, dtype=torch.float64)
        own = deal_for_scoring(groups, self.world_size, self.token_budget, self.shared)[self.rank]
        for index, scores in score_micro_batches(self.log_probs, groups, own, self.shared, self.device):
            values[index, : len(scores)] = torch.from_numpy(np.asarray(scores, dtype=np.float64))
        values = values.to(self.device)
        dist.all_reduce(values)
        values = values.cpu().float()
        absent = torch.arange(width) >= torch.tensor([len(group.branches) for group in groups])[:, None]
        broken = (~torch.isfinite(values) & ~absent).any(1).nonzero()
        if len(broken):
            raise UserError(
                f"the reference gives training group {first + int(broken[0])} a log-probability that is not "
                "finite; the starting model is broken, or overflows in this dtype: try model.dtype=float32"
            )
        return values.masked_fill(absent, torch.nan)

    def _read(self, cache: "_CacheFolder", number: int, shape: tuple[int, int]) -> Tensor | None:
        """What rank 0 finds on disk, on every rank, and the same error on every rank."""
        found: Tensor | UserError | None = None
        if self.rank == 0:
            try:
                found = cache.read(number, shape)
            except UserError as error:
                found = error
        found = from_rank_zero(found)
        if isinstance(found, UserError):
            raise found
        return found


class _CacheFolder:
    """The folder of one cache."""

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self._key = {"format": FORMAT, **key}
        digest = hashlib.sha256(json.dumps(self._key, sort_keys=True).encode()).hexdigest()
        self._folder = folder / digest[:16]

    def read(self, number: int, shape: tuple[int, int]) -> Tensor | None:
        """Block ``number``; None where it has not been computed.

        Raises:
            UserError: the block is damaged, or missing from a cache that says it is complete.
        """
        path = self._path(number)
        if not path.exists():
            if (self._folder / COMPLETE).exists():
                raise UserError(self._advice(path, "is missing from a complete reference cache"))
            return None
        try:
            with safe_open(path, "pt") as file:
                values, written = file.get_tensor("log_probs"), (file.metadata() or {}).get("digest")
        except (SafetensorError, OSError) as error:
            raise UserError(self._advice(path, f"cannot be read ({error})")) from None
        if written != _digest(values):
            raise UserError(self._advice(path, "is not what was written, by its digest"))
        if tuple(values.shape) != shape:
            raise UserError(self._advice(path, f"holds {tuple(values.shape)} values instead of {shape}"))
        return values

    def write(self, number: int, values: Tensor) -> None:
        """Block ``number``, whole or not at all; the key lies beside it for people to read."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(self._folder / "key.json", dict(sorted(self._key.items())))
        with whole_file(self._path(number)) as part:
            save_file({"log_probs": values.contiguous()}, part, {"digest": _digest(values)})

    def finish(self, blocks: int) -> None:
        write_json(self._folder / COMPLETE, {"blocks": blocks})

    def _path(self, number: int) -> Path:
        return self._folder / f"block-{number:05d}.safetensors"

    def _advice(self, path: Path, what: str) -> str:
        return f"{path}: {what}; remove the folder {self._folder} and run again, or set reference.cache=memory"


def _digest(values: Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(values.contiguous().numpy().data)


NOT_IN_KEY = frozenset({"path", "scratch", "lora", "gradient_checkpointing"})
"""Keys of the configuration's section ``model`` that leave reference log-probs as they are. ``path`` and ``scratch``
say where the starting weights come from, whose files are digested; a new adapter is not part of the reference; and
recomputing activations changes when something is computed, not what."""

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
"""What computes: another version may round, or read a model, in another way."""


def cache_key(config: ModelConfig, source: ModelSource, rows: str, device: str) -> dict[str, Any]:
    """Everything reference log-probs depend on but the token ids, which ``ReferencePass`` adds itself.

    Args:
        config: the model section; a key added to it counts, unless ``NOT_IN_KEY`` says why not.
        source: the starting weights; the content of their files counts, not their path.
        rows: fingerprint of the prepared data.
        device: kind of device the reference runs on.
    """
    return {
        "base": file_digests(source.base),
        "adapter": file_digests(source.path) if source.is_adapter else {},
        "rows": rows,
        "model": config.model_dump(mode="json", exclude=set(NOT_IN_KEY)),
        "device": device,
        "versions": {"dmpo_dist": __version__, **{name: _version(name) for name in LIBRARIES}},
    }


def token_digest(groups: Sequence[TokenGroup]) -> str:
    """sha256 of all ids of ``groups`` and of where their scoring begins.

    It stands for data, template, tokenizer, context and whatever else decides what the model reads (today's date in a
    chat template, say).
    """
    digest = hashlib.sha256()
    for group in groups:
        lengths = [len(group.prefix), *map(len, group.branches)]
        numbers = [len(lengths), *lengths, *group.prefix, *chain.from_iterable(group.branches), *group.scored_from]
        digest.update(np.array(numbers, dtype=np.int64).tobytes())
    return digest.hexdigest()


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def file_digests(model: str) -> dict[str, str]:
    """sha256 of the weights, configuration and tokenizer files of a model folder or downloaded hub id, by name.

    Raises:
        UserError: nothing is there to digest.
    """
    folder = Path(model)
    if not folder.exists():
        config = try_to_load_from_cache(model, "config.json")
        folder = Path(config).parent if isinstance(config, str) else folder
    files = sorted(path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file())
    if not files:
        raise UserError(f"{model}: no model files to name a reference cache by; use reference.cache=memory")
    return {path.name: _sha256(path) for path in files if path.name != ModelStamp.FILE}


def start_digests(start: str) -> dict[str, str]:
    """Digests of the files of a starting model: its base, and its adapter where it is one.

    A downloaded hub id is known by its revision; one that is not downloaded by nothing.

    Raises:
        UserError: a file of a model that training wrote is not what was written.
    """
    source = find_model(start)
    folders = {"base": source.base} | ({"adapter": source.path} if source.is_adapter else {})
    found = {f"{part}/{name}": digest for part, model in folders.items() for name, digest in _content(model).items()}
    written, part = source.stamp.digests or {}, "adapter" if source.is_adapter else "base"
    damaged = [name for name, digest in written.items() if found.get(f"{part}/{name}", digest) != digest]
    if damaged:
        raise UserError(
            f"{source.path}: {damaged[0]} is not what training wrote; copy the model again, or train it again"
        )
    return found


def _content(model: str) -> dict[str, str]:
    """File -> digest of a model's folder, or the revision of a downloaded hub id."""
    folder = Path(model)
    if folder.exists():
        files = {path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()}
        return digests_of(folder, (path for path in files if path.name != ModelStamp.FILE))
    config = try_to_load_from_cache(model, "config.json")
    return {"revision": Path(config).parent.name} if isinstance(config, str) else {}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
