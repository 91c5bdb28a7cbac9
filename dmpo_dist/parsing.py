"""Text that anybody may have written, as JSON or YAML, and what a parser raises, as one message that names the file.

Parsers of damaged or hostile files raise nearly anything: Arrow a KeyError, zlib its own errors, PyYAML an
AttributeError, and ``json`` returns what no file can hold again. Every reader of this package goes through here.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import yaml

from dmpo_dist.errors import UserError

DEEPEST = 64
"""Levels of lists and mappings; no file of ours has more than ten."""
MOST_VALUES = 1_000_000
"""In one YAML file, each counted as often as aliases repeat it."""
INT, FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
LARGEST = 2**63
"""Whole numbers lie between minus this and this: NumPy, PyTorch and Arrow take no larger ones."""
SUSPECT = re.compile(r"\\u[dD][89a-fA-F]|[0-9]{19}")
"""JSON text that may hold half of a surrogate pair, or a number above ``LARGEST``."""


@contextmanager
def parsing(path: object, advice: str) -> Iterator[None]:
    """A parser at work on ``path``, and nothing of our own: whatever it raises is a UserError that names the path.

    Args:
        path: the file or folder, as the message names it.
        advice: what to do about one that cannot be read.

    Raises:
        UserError: the parser raised anything.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path}: cannot be read ({reason}); {advice}") from None


def read_text(path: Path, advice: str) -> str:
    """The text of a UTF-8 file; a byte order mark at its start is left out.

    Raises:
        UserError: it cannot be read or is not UTF-8.
    """
    with parsing(path, advice):
        return path.read_text(encoding="utf-8-sig")


def parse_json(text: str, mend_halves: bool = False) -> Any:
    """JSON as Python values that can be written again.

    Args:
        mend_halves: half of a surrogate pair, as of a cut emoji, becomes a question mark.

    Raises:
        ValueError: not JSON, deeper than ``DEEPEST``, half of a surrogate pair, or a whole number beyond 64 bits.
    """
    try:
        content = json.loads(text)
        if mend_halves and SUSPECT.search(text):  # as text without escapes, in which halves can be told from pairs
            content = json.loads(json.dumps(content, ensure_ascii=False).encode("utf-8", errors="replace"))
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} levels deep") from None
    if SUSPECT.search(text) or text.count("[") + text.count("{") > DEEPEST:
        require_plain(content, most=None)
    return content


def parse_yaml(text: str) -> Any:
    """YAML as Python values that can be written again.

    Raises:
        ValueError: not YAML, or as ``parse_json``; also where aliases make more than ``MOST_VALUES`` of few.
    """
    try:
        content = yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} levels deep") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except Exception as error:  # of a tag that does not fit its text, such as !!timestamp x
        raise ValueError(first_line(error)) from None
    require_plain(content, most=MOST_VALUES)
    return content


def require_plain(content: Any, most: int | None) -> None:
    """Raise ValueError for values that cannot be written again: see ``parse_json``; at most ``most`` values in all."""
    level, count = [content], 0
    for _ in range(DEEPEST + 1):
        count += len(level)
        if most is not None and count > most:
            raise ValueError(f"holds more than {most:,} values; are its aliases meant?")
        for value in level:
            if isinstance(value, str):
                _require_writable(value)
            elif isinstance(value, int) and abs(value) >= LARGEST:
                raise ValueError(f"the number {_shown(value)} has more than 64 bits")
        level = [below for value in level for below in _below(value)]
        if not level:
            return
    raise ValueError(f"nested more than {DEEPEST} levels deep")


def first_line(error: BaseException) -> str:
    """What an error says, without the list below it; with the list's first line where there is nothing else."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return f"{lines[0]} {lines[1].strip()}" if lines[0].endswith(":") and lines[1:] else lines[0]


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but for numbers to the base 60: of ``12:00:00`` it makes 43200, and means a time of day or a limit."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {  # pyrefly: ignore
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (INT, FLOAT)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    INT, re.compile(r"[-+]?0b[01_]+$|[-+]?0[0-7_]+$|[-+]?(?:0|[1-9][0-9_]*)$|[-+]?0x[0-9a-fA-F_]+$"), [*"-+0123456789"]
)
_Loader.add_implicit_resolver(
    FLOAT,
    re.compile(
        r"[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+][0-9]+)?$|\.[0-9][0-9_]*(?:[eE][-+][0-9]+)?$"
        r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
    ),
    [*"-+0123456789."],
)


def _below(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return list(value) if isinstance(value, list | tuple | set) else []


def _require_writable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"the text {text[:40]!a} holds {half}, half of a character; was an emoji cut?") from None


def _shown(value: int) -> str:
    """A whole number, or how long it is: Python refuses to write one of more than 4,300 digits."""
    return str(value) if value.bit_length() < 128 else f"of {value.bit_length()} bits"
