"""Seeded damage: to bytes, to values of JSON and YAML, and to files."""

import copy
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

ODD_VALUES: list[Any] = [
    None, True, False, "", "x", "\0", "\ud83d", "🎬", "[/x]", "exp[lr=1e-3]", "\u202e", "x" * 5000, "../..", "/", "nan",
    0, -1, 1, 0.5, 10**20, -(10**20), 10**4000, 1e308, float("inf"), float("nan"), [], {}, [[]], [None], {"": None},
    "1e999", "2024-13-45", {"a": {"b": {}}}, ["x"] * 300,
]  # fmt: skip
ODD_TEXTS = [
    b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"null", b"[]", b"{}", b"1", b'"x"', b"[" * 5000, b"{" + b'"a":' * 3000,
    b"[" * 400 + b"]" * 400, b"9" * 5000, b"NaN", b"{\n", b"\n\n\n", b"a: &a [*a]", b"!!timestamp x", b"!!int ''",
    b"!!python/object:os.system x", b"? [a]\n: b", b"- - - -", b"%YAML 9.9", b"\t\t", b"a: b: c", b"=", b"<<: 1",
]  # fmt: skip


def damaged_bytes(rng: random.Random, content: bytes) -> bytes:
    """``content`` cut, flipped, doubled or with something foreign in it."""
    at = rng.randrange(len(content) + 1)
    to = min(len(content), at + rng.choice((1, 2, 8, 64, 1000)))
    kind = rng.randrange(7)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + content[to:]
    if kind == 2:
        return content[:at] + bytes(rng.randrange(256) for _ in range(to - at)) + content[to:]
    if kind == 3:
        return content[:at] + rng.choice(ODD_TEXTS) + content[at:]
    if kind == 4:
        return content[:at] + content[at:to] * 3 + content[to:]
    if kind == 5:
        flipped = bytearray(content or b"x")
        for _ in range(rng.randint(1, 4)):
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    return rng.choice(ODD_TEXTS)


def damaged_value(rng: random.Random, content: Any) -> Any:
    """JSON ``content`` with one to three of its values replaced, removed or moved to another key."""
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 3)):
        holders = [value for value in _containers(content) if value]
        if not holders:
            return rng.choice(ODD_VALUES)
        holder = rng.choice(holders)
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        kind = rng.randrange(5)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(("", "\ud83d", "x", "[/b]", key + "x"))] = holder.pop(key)
        else:
            holder[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    return content


def damaged_json(rng: random.Random, content: bytes) -> bytes:
    """A JSON file with damaged values or, one time in three, damaged bytes."""
    if rng.random() < 0.33:
        return damaged_bytes(rng, content)
    return _json(damaged_value(rng, json.loads(content)))


def damaged_lines(rng: random.Random, content: bytes) -> bytes:
    """JSON lines, one of which is damaged as ``damaged_json`` does it."""
    lines = content.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = damaged_json(rng, lines[at])
    return b"\n".join(lines) + b"\n"


TEARS: dict[str, Callable[[Path], None]] = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "last byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "flipped": lambda path: path.write_bytes(bytes(byte ^ 4 for byte in path.read_bytes())),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a loop": lambda path: (path.unlink(), path.symlink_to(path.name)),
    "foreign": lambda path: path.write_bytes(b'{"who": "\\ud83d", "am": [1e400, ' + b"9" * 5000 + b"]}"),
}
"""What may happen to a file."""


def copy_of(folder: Path, target: Path) -> Path:
    """``folder`` again at ``target``; its files are links where that is enough."""
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(folder, target, copy_function=os.link))


def replace_file(file: Path, content: bytes) -> None:
    """Write ``file`` anew, so that what it was linked to stays."""
    file.unlink(missing_ok=True)
    file.write_bytes(content)


def _containers(content: Any) -> list[Any]:
    found = [content] if isinstance(content, dict | list) else []
    below = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return found + [one for value in below for one in _containers(value)]


def _json(content: Any) -> bytes:
    """JSON as ``json.dumps`` writes it, also of numbers that Python does not write."""
    text = json.dumps(content, default=str) if not _has_huge(content) else None
    if text is None:
        marked = json.loads(json.dumps(_marked(content)))
        text = json.dumps(marked).replace('"HUGE"', "9" * 5000)
    return text.encode()


def _has_huge(content: Any) -> bool:
    return any(isinstance(v, int) and abs(v) > 10**1000 for c in [[content], *_containers(content)]
               for v in (c.values() if isinstance(c, dict) else c))  # fmt: skip


def _marked(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _marked(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_marked(value) for value in content]
    return "HUGE" if isinstance(content, int) and abs(content) > 10**1000 else content
