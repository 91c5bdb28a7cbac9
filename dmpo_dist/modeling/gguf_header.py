"""What a GGUF file says of itself before its weights.

It is read in a moment, where the library's reader takes half a minute.
"""

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from dmpo_dist.errors import UserError

MAGIC, VERSIONS = b"GGUF", (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9  # the other two kinds of values


@dataclass(frozen=True)
class Header:
    """A GGUF file's kind and size.

    Attributes:
        architecture: as llama.cpp names it; "" where it is not said.
        tokenizer: kind of vocabulary, such as llama or gpt2; "" where there is none.
        licence: identifier, "" where none is given.
        weights: number of weights.
    """

    architecture: str
    tokenizer: str
    licence: str
    weights: int


def read_header(file: Path) -> Header:
    """Read and check the header of ``file``.

    Raises:
        UserError: no GGUF file, one that is cut off, or one of several that hold a model together.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as content:
            fields, tensors, position = _read(content, file)
        alignment, parts = int(fields.get("general.alignment", 32)), int(fields.get("split.count", 0))
        start = -(-position // alignment) * alignment  # the weights begin at the next multiple
    except (struct.error, ValueError, TypeError, KeyError, MemoryError, ArithmeticError):
        raise UserError(
            f"{file}: its header is cut off or damaged ({size:,} bytes); copy or download it again"
        ) from None
    if parts > 1:
        raise UserError(
            f"{file}: one of {parts} files that hold the model together; join them by llama.cpp's "
            "`llama-gguf-split --merge`, and take the file that it makes"
        )
    end = start + max((offset + length for _, offset, length in tensors), default=0)
    if size < end:
        raise UserError(f"{file}: cut off, {size:,} of {end:,} bytes are there; copy or download it again")
    kinds = ("general.architecture", "tokenizer.ggml.model", "general.license")
    return Header(*(str(fields.get(kind, "")) for kind in kinds), weights=sum(count for count, _, _ in tensors))


def _read(content: BinaryIO, file: Path) -> tuple[dict[str, Any], list[tuple[int, int, int]], int]:
    """Fields that are no arrays, (weights, offset, bytes) of each tensor, and where this ends."""
    magic, version, tensor_count, field_count = _unpack(content, "4sIQQ")
    if magic != MAGIC:
        raise UserError(f"{file}: no GGUF file (it begins with {magic!r}, not {MAGIC!r}); is it the right file?")
    if version not in VERSIONS:
        raise UserError(f"{file}: GGUF version {version}; versions 2 and 3 are known, so convert it anew")
    fields = {}
    for _ in range(field_count):
        key = _string(content)
        fields[key] = _value(content, *_unpack(content, "I"))
    tensors = []
    for _ in range(tensor_count):
        _string(content)
        (dimensions,) = _unpack(content, "I")
        weights = prod(_unpack(content, f"{dimensions}Q"))
        kind, offset = _unpack(content, "IQ")
        if kind not in iter(GGMLQuantizationType):
            raise UserError(f"{file}: holds weights of the unknown type {kind}; a newer gguf package may know it")
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        tensors.append((weights, offset, weights // block * block_bytes))
    return fields, tensors, content.tell()


def _value(content: BinaryIO, kind: int) -> Any:
    """A field's value; None for an array, which is passed over."""
    if kind == STRING:
        return _string(content)
    if kind != ARRAY:
        return _unpack(content, SCALARS[kind])[0]
    kind, count = _unpack(content, "IQ")
    if kind == STRING:
        for _ in range(count):
            (length,) = _unpack(content, "Q")
            content.seek(length, 1)
    else:
        content.seek(count * struct.calcsize(SCALARS[kind]), 1)
    return None


def _string(content: BinaryIO) -> str:
    (length,) = _unpack(content, "Q")
    return _unpack(content, f"{length}s")[0].decode("utf-8")


def _unpack(content: BinaryIO, form: str) -> tuple[Any, ...]:
    """Little-endian values; struct.error where the file ends before them."""
    return struct.unpack(f"<{form}", content.read(struct.calcsize(f"<{form}")))
