"""Reference log-probs on disk: a folder named by all that they depend on, with a file for each block of groups.

Blocks appear whole, so an interrupted pass goes on where it stopped; ``complete.json`` is written last.
"""

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dmpo_dist import __version__
from dmpo_dist.artifacts.files import whole_file, write_json
from dmpo_dist.config import ModelConfig
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.backbone import ModelSource
from dmpo_dist.modeling.model_files import content_digests

FORMAT = 4
COMPLETE = "complete.json"


class CacheFolder:
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

    Raises:
        UserError: nothing is there to digest.
    """
    return {
        "base": _content(source.base),
        "adapter": _content(source.path) if source.is_adapter else {},
        "rows": rows,
        "model": config.model_dump(mode="json", exclude=set(NOT_IN_KEY)),
        "device": device,
        "versions": {"dmpo_dist": __version__, **{name: _version(name) for name in LIBRARIES}},
    }


def _content(model: str) -> dict[str, str]:
    found = content_digests(model)
    if not found:
        raise UserError(f"{model}: no model files to name a reference cache by; use reference.cache=memory")
    return found


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
