"""GGUF files become ordinary model folders: dequantised once, into a cache keyed by the file's content."""

import fcntl
import hashlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from dmpo_dist.cache import cache_folder
from dmpo_dist.config.section import at_home
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.gguf_header import Header, read_header
from dmpo_dist.modeling.published import PUBLISHED

SUFFIX = ".gguf"
LICENCE_PATTERNS = ("LICEN[CS]E*", "NOTICE*", "*TERMS*")
BYTES_PER_WEIGHT = 4  # written in float32: dequantised values are products of a scale and a small integer


def local_model(path: str) -> str:
    """The model folder behind a GGUF file or the name of a fetched model; any other ``path`` as it is.

    A GGUF file that was not met before is converted first, with a word on standard error.

    Raises:
        UserError: no such file, one that cannot be converted, or a model that was not fetched yet.
    """
    path = at_home(path)
    if path in PUBLISHED and not Path(path).exists():
        folder = folder_of(PUBLISHED[path].sha256)
        if not folder.exists():
            accept = "" if PUBLISHED[path].free else " --accept-terms"
            raise UserError(f"{path}: not on this machine yet; run `dmpo models fetch {path}{accept}` first")
        return str(folder)
    file = Path(path)
    if not path.lower().endswith(SUFFIX) or file.is_dir():
        return path
    if not file.is_file():
        raise UserError(f"{path}: no such GGUF file; correct model.path or --model")
    stat = file.stat()
    folder = folder_of(_digest(file.absolute(), stat.st_size, stat.st_mtime_ns))
    if not folder.exists():
        convert(file, folder, lambda line: print(line, file=sys.stderr, flush=True))
    return str(folder)


def moved_base(base: str) -> str:
    """The base an adapter names; one in another user's or machine's cache of GGUF files is looked for in our own.

    Raises:
        UserError: it is such a one and not here.
    """
    digest = Path(base).name
    if Path(base).exists() or Path(base).parent.name != "gguf" or not re.fullmatch(r"[0-9a-f]{64}", digest):
        return base
    if not folder_of(digest).exists():
        known = [name for name, model in PUBLISHED.items() if model.sha256 == digest]
        todo = f"run `dmpo models fetch {known[0]}`" if known else "use that file as model.path once, which converts it"
        raise UserError(
            f"{base}: the adapter's base was made from the GGUF file of this sha256 and is not here; {todo}"
        )
    return str(folder_of(digest))


def folder_of(digest: str) -> Path:
    """Where the GGUF file with this sha256 is kept as a model folder."""
    return cache_folder() / "gguf" / digest


@lru_cache(maxsize=64)
def _digest(file: Path, size: int, changed: int) -> str:
    """sha256 of ``file``; its size and time of change are there to notice another content."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def convert(file: Path, target: Path, echo: Callable[[str], None], licence: str = "", base: str = "") -> None:
    """Write the GGUF ``file`` as the model folder ``target`` in float32, with licence files that lie beside the file.

    The folder appears whole or not at all; of several processes one converts and the others wait for it.

    Args:
        licence: identifier for the model card; "" takes what the file says.
        base: hub id of the model that the file holds, where it is known.

    Raises:
        UserError: the file is cut off or of a kind that transformers does not convert, or there is no room.
    """
    header, began = read_header(file), time.monotonic()
    needed = header.weights * BYTES_PER_WEIGHT
    try:
        with _alone(target.parent):
            if target.exists():
                return
            _require_room(target.parent, needed, file)
            echo(f"{file.name}: {header.architecture}, {header.weights / 1e6:,.1f} M weights, dequantised once")
            _convert(file, header, target, (licence or header.licence, base), echo)
    except OSError as error:
        raise UserError(
            f"{target}: cannot be written ({error.strerror or error}); free some room or set XDG_CACHE_HOME to a "
            f"folder with {_gigabytes(needed)} free"
        ) from None
    echo(f"{target}: ready after {time.monotonic() - began:.0f} s")


def _convert(file: Path, header: Header, target: Path, named: tuple[str, str], echo: Callable[[str], None]) -> None:
    tokenizer, model = _load_tokenizer(file, header), _load_model(file, header)
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"{file}: {len(tokenizer)} tokens, but the model embeds {model.config.vocab_size}; its tokenizer is not "
            "the model's, so convert it anew from the original"
        )
    echo(f"writing {target}")
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    try:
        part.mkdir()
        _save(model, tokenizer, part)
        _keep_licence(file, *named, part)
        for path in part.iterdir():
            path.chmod((part / "README.md").stat().st_mode)  # safetensors lets only the owner read
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _load_tokenizer(file: Path, header: Header) -> Any:
    from transformers import AutoTokenizer

    if not header.tokenizer:
        raise UserError(f"{file}: holds no tokenizer (no tokenizer.ggml.model); take a GGUF file that holds one")
    try:
        return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except Exception as error:  # whatever a converter trips over in a file of a kind it does not know
        raise _not_convertible(file, header, error) from None


def _load_model(file: Path, header: Header) -> Any:
    """The causal LM with dense weights in float32, in a state that transformers saves."""
    from transformers import AutoModelForCausalLM, GgufConfig

    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
    except Exception as error:
        raise _not_convertible(file, header, error) from None
    lacking = sorted({*report["missing_keys"], *report["mismatched_keys"]}, key=str)
    if lacking:  # transformers fills them with random numbers
        raise UserError(f"{file}: lacks {len(lacking)} of the model's weights, such as {lacking[0]}; take another file")
    # save_pretrained refuses a model that came from GGUF, so its weights move into a new one of the same class.
    config = deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model


def _not_convertible(file: Path, header: Header, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(
        f"{file}: transformers cannot convert its architecture {header.architecture!r} with tokenizer "
        f"{header.tokenizer!r} ({reason}); take the model in Hugging Face's format"
    )


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    from safetensors import SafetensorError

    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # a full disk comes as this
        raise OSError(str(error)) from None
    tokenizer.save_pretrained(folder)


def _keep_licence(file: Path, licence: str, base: str, folder: Path) -> None:
    """Copy licence files from beside ``file``, and write a card that names licence and model (exports quote both)."""
    for pattern in LICENCE_PATTERNS:
        for beside in file.parent.glob(pattern):
            if beside.is_file():
                shutil.copyfile(beside, folder / beside.name)
    named = (f"license: {licence}\n" if licence else "") + (f"base_model: {base}\n" if base else "")
    text = f"---\n{named}---\nConverted to float32 from {file.name} by dmpo_dist.\n"
    (folder / "README.md").write_text(text, encoding="utf-8")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep this machine's other processes from converting into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _require_room(folder: Path, needed: int, file: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder}: {_gigabytes(free)} free, but {file.name} dequantised takes {_gigabytes(needed)}; free some "
            "room or set XDG_CACHE_HOME to a folder on a larger disk"
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
