"""Every key of the configuration with its type, default and help text, from the schema itself."""

import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from dmpo_dist.config.load import nearest_key, sections_of
from dmpo_dist.config.run import RunConfig
from dmpo_dist.errors import UserError

COMMENT_WIDTH = 110
# What one usually changes, in the order of work; None writes the default, other values are examples to be replaced.
USUAL: dict[str, Any] = {
    "data.source.path": "log.csv",
    "data.source.columns": {"user": "user", "item": "item", "timestamp": "timestamp", "title": "title"},
    "data.path": "runs/my/data",
    "data.rating_threshold": None,
    "data.repeats": None,
    "data.max_history": None,
    "data.train_requests_per_user": None,
    "template.preamble": None,
    "template.item": None,
    "template.request": None,
    "model.path": None,
    "model.dtype": None,
    "model.max_length": None,
    "sft.epochs": None,
    "sft.global_batch_size": None,
    "sft.learning_rate": None,
    "objective.name": None,
    "objective.beta": None,
    "train.negatives": None,
    "train.epochs": None,
    "train.global_batch_size": None,
    "train.learning_rate": None,
    "cluster.workers": None,
    "evaluation.baselines": None,
    "seed": None,
}


@dataclass(frozen=True)
class Key:
    """A key that holds a value.

    Attributes:
        name: dotted.
        kind: what it may hold, in words.
        default: as YAML.
        help: its docstring on one line; "" where it has none.
    """

    name: str
    kind: str
    default: str
    help: str


def all_keys() -> dict[str, Key]:
    """Dotted name -> key, in the order of the schema."""
    keys: dict[str, Key] = {}
    for key in _keys_below(RunConfig, ""):
        keys.setdefault(key.name, key)
    return keys


def keys_with(word: str) -> list[Key]:
    """The keys whose name or help text holds ``word``, in any case; all of them for ""."""
    return [key for key in all_keys().values() if word.lower() in f"{key.name} {key.help}".lower()]


def find_key(name: str) -> list[Key]:
    """The key ``name``, or those of the section ``name``.

    Raises:
        UserError: there is neither; the message names the nearest key.
    """
    keys = all_keys()
    found = [keys[name]] if name in keys else [key for key in keys.values() if key.name.startswith(f"{name}.")]
    if not found:
        raise UserError(f"{name}: unknown key; the nearest known key is {nearest_key(name, list(keys))}")
    return found


def starting_file() -> str:
    """YAML with the keys that one usually changes, each below its help text."""
    keys, lines, open_sections = all_keys(), ["# Give it to any command by -c; dmpo config keys lists all keys."], []
    for name, example in USUAL.items():
        *sections, leaf = name.split(".")
        shared = next((i for i, pair in enumerate(zip(sections, open_sections, strict=False)) if pair[0] != pair[1]),
                      min(len(sections), len(open_sections)))  # fmt: skip
        lines += [f"{'  ' * depth}{sections[depth]}:" for depth in range(shared, len(sections))]
        open_sections, indent = sections, "  " * len(sections)
        lines += [f"{indent}# {line}" for line in textwrap.wrap(keys[name].help, COMMENT_WIDTH - len(indent))]
        value = keys[name].default if example is None else _as_yaml(example)
        lines.append(f"{indent}{leaf}: {value}")
    return "\n".join(lines) + "\n"


def write_starting_file(file: Path) -> None:
    """Write ``starting_file`` to ``file``, which must not exist yet."""
    if file.exists():
        raise UserError(f"{file}: exists already and is kept; choose another name")
    file.write_text(starting_file(), encoding="utf-8")


def _keys_below(section: type[BaseModel], prefix: str) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        below = sections_of(field.annotation)
        default = field.get_default(call_default_factory=True)
        # A section that may be missing, such as model.lora, is a key itself
        if not below or default is None or NoneType in get_args(field.annotation):
            shown = "(needed)" if field.is_required() else _as_yaml(default)
            yield Key(prefix + name, _in_words(field.annotation), shown, _help(field.description or ""))
        for sub in below:
            yield from _keys_below(sub, f"{prefix}{name}.")


def _help(docstring: str) -> str:
    return " ".join(docstring.split()).replace("``", "`")


def _as_yaml(value: Any) -> str:
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value, ensure_ascii=False)  # "\n" on one line, which YAML reads as JSON does
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000, sort_keys=False).strip()
    return text.removesuffix("...").strip()


def _in_words(annotation: Any) -> str:
    """A type as people write it: ``whole number``, ``dmpo | sdpo``, ``list of text``."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return _in_words(arguments[0])
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, arguments))
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(_in_words(argument) for argument in arguments)
    if get_origin(annotation) is list:
        return f"list of {_in_words(arguments[0])}"
    names = {bool: "true | false", int: "whole number", float: "number", str: "text", Path: "path", NoneType: "null"}
    return names.get(annotation, "mapping" if arguments or annotation is dict else "section")
