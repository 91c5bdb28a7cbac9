"""Digests of files: whether what is read is what was written.

They are xxHash's XXH3 of 128 bits, which finds damage at the speed of the memory; they are no defence against a person
who means to deceive, as anybody can compute them.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

CHUNK = 1 << 22  # bytes


def file_digest(file: Path) -> str:
    """XXH3 (128 bits, hexadecimal) of the content of ``file``, read in pieces."""
    digest = xxhash.xxh3_128()
    with file.open("rb", buffering=0) as content:
        while piece := content.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def json_digest(content: Mapping[str, Any]) -> str:
    """XXH3 of ``content`` as JSON with sorted keys."""
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def digests_of(folder: Path, files: Iterable[Path] | None = None) -> dict[str, str]:
    """Path below ``folder`` -> digest, of ``files``, or of all that lie in ``folder`` or below."""
    chosen = (path for path in folder.rglob("*") if path.is_file()) if files is None else files
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in sorted(chosen)}


def damage(folder: Path, expected: Mapping[str, str]) -> str:
    """What is wrong with the files of ``folder`` that ``expected`` names by path, a sentence; "" where nothing is."""
    for name, digest in expected.items():
        try:
            found = file_digest(folder / name)
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if found != digest:
            return f"{name} is not what was written: its digest is {found}, and was {digest}"
    return ""
