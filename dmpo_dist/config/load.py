"""Reading and writing a configuration: YAML layers, then ``key=value`` overrides, checked against one schema."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from dmpo_dist.config.objective import BUILT_IN, CUSTOM, options_below
from dmpo_dist.config.run import RunConfig
from dmpo_dist.config.section import dotted
from dmpo_dist.config.serving import ServingConfig
from dmpo_dist.config.submit import SubmitConfig
from dmpo_dist.config.tune import TuneConfig
from dmpo_dist.errors import UserError
from dmpo_dist.parsing import parse_yaml, read_text, require_plain
from dmpo_dist.secrets import has_secret, redact

Extent = Literal["all", "saved", "changed"]
GRID = "experiment_"
"""How names of recipes begin that are grids of studies, for `dmpo experiment`."""


PASSES = {"sft.epochs": "sft.steps", "train.epochs": "train.steps"}
"""A number of passes -> the number of steps that counts instead where it is set."""


def load_config(layers: list[Path], overrides: list[str] | None = None, line: str = "the command line") -> RunConfig:
    """Merge YAML ``layers`` in order, apply ``key=value`` ``overrides`` and validate.

    Args:
        line: where the overrides were given, for errors.

    Raises:
        UserError: unreadable file, malformed YAML, unknown key (names the nearest one) or a bad value.
    """
    merged: dict[str, Any] = {}
    passes: set[str] = set()  # numbers of passes that a layer sets above a number of steps, or that an override sets
    for layer in layers:
        content = _read_layer(layer)
        merged = _with_layer(merged, content)
        of_layer = {*dotted(content)}
        passes = {name for name in passes | {*PASSES} & of_layer if PASSES[name] not in of_layer}
    for override in overrides or []:
        key, sep, raw = override.partition("=")
        if not sep or not key:
            raise UserError(f"override {override!r} is not of the form key=value, for example train.learning_rate=1e-4")
        merged = _with_layer(merged, _nest(key.split("."), parse_value(raw)))
    config = _validated(merged, [str(layer) for layer in layers], overrides or [], line)
    _require_epochs_count(config, passes.union(override.partition("=")[0] for override in overrides or []))
    return config


def with_keys(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """``config`` with other ``values`` by dotted key; raises as ``config_of`` does."""
    merged = changed_values(config)
    for key, value in values.items():
        merged = _with_layer(merged, _nest(key.split("."), value))
    config = _validated(merged, ["settings"], [])
    _require_epochs_count(config, values)
    return config


def config_of(values: Mapping[str, Any]) -> RunConfig:
    """The configuration with ``values`` by dotted key, ``{"train.steps": 20, "model.lora": {}}``, over the defaults.

    Raises:
        UserError: an unknown key (names the nearest one) or a bad value.
    """
    merged: dict[str, Any] = {}
    for key, value in values.items():
        merged = _with_layer(merged, _nest(key.split("."), value))
    config = _validated(merged, ["settings"], [])
    _require_epochs_count(config, values)
    return config


def _validated(
    values: dict[str, Any], layers: list[str], overrides: list[str], line: str = "the command line"
) -> RunConfig:
    """``values`` against the schema; errors name the ``layers`` they came from, or ``line`` for ``overrides``."""
    for key, value in dotted(values).items():
        _require_writable(key, value)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        # a mistake is the command line's where an override names the key, a section of it, or a key of that section
        given = [f"{override.partition('=')[0]}." for override in overrides]
        mistaken = [".".join(_key_path(e)) + "." for e in error.errors()]
        on_line = [any(key.startswith(g) or g.startswith(key) for g in given) for key in mistaken]
        sources = [] if all(on_line) else list(layers)
        sources += [line] if any(on_line) or not layers else []
        problems = "\n".join(_explain(e) for e in error.errors())
        raise UserError(f"configuration ({', '.join(sources)}):\n{problems}") from None
    for key, value in dotted(changed_values(config)).items():
        _require_writable(key, value)  # again, as a text of the command line may have become a number
    return config


def _require_epochs_count(config: RunConfig, keys: Iterable[str]) -> None:
    """Raise UserError where one of ``keys``, which the user sets, is a number of passes, and steps are set as well."""
    for name in sorted(PASSES.keys() & {*keys}):
        steps = getattr(config, name.partition(".")[0]).steps
        if steps is not None:
            raise UserError(f"{name} has no effect while {PASSES[name]}={steps} is set; add {PASSES[name]}=null")


def _require_writable(key: str, value: Any) -> None:
    """Raise UserError for a value that cannot, or should not, be written into a run's folder and job files."""
    try:
        require_plain(value, most=None)
    except ValueError as error:
        raise UserError(f"configuration: {key}: {error}") from None
    if key.startswith("template."):  # prompts may hold anything
        return
    if has_secret(str(value)):
        variable = " (MLFLOW_TRACKING_URI)" if key == "tracking.mlflow.tracking_uri" else ""
        raise UserError(
            f"configuration: {key}: {redact(str(value))!r} holds a password or token, which would be written into "
            f"config.yaml, reports and job files; leave it out, and set it in the environment of the job{variable}"
        )


def find_recipe(name: str, what: str, prefix: str = "") -> Path:
    """The file called ``name``, or the recipe of that name.

    Args:
        what: what the name stands for, for the message of an error.
        prefix: only recipes whose names begin with it count; without one, those that are no grid of a study.

    Raises:
        UserError: neither is there, or a grid of a study was named instead.
    """
    recipes = recipes_with(prefix)
    if Path(name).is_file():
        return Path(name)
    if name in recipes:
        return recipes[name]
    if name in recipes_with(GRID):
        raise UserError(f"{what} {name}: is the grid of a study, which `dmpo experiment {name}` runs")
    raise UserError(f"{what} {name}: no such file, and no recipe of that name; recipes are {', '.join(recipes)}")


def recipes_with(prefix: str = "") -> dict[str, Path]:
    """Name -> file of the recipes that begin with ``prefix``; without one, of those that are no grid of a study."""
    files = sorted(Path(str(file)) for file in resources.files("dmpo_dist.recipes").iterdir())
    names = {file.stem: file for file in files if file.suffix == ".yaml"}
    return {name: file for name, file in names.items() if name.startswith(prefix) and (prefix or GRID not in name)}


def dump_config(config: RunConfig, extent: Extent = "saved") -> str:
    """The configuration as YAML that ``load_config`` reads back equal.

    Args:
        extent: ``all`` keys, those that differ from their defaults (``changed``), or all but a ``submit``,
            ``serving`` or ``tune`` section that is wholly default (``saved``, what a run's folder keeps).
    """
    content = changed_values(config) if extent == "changed" else config.model_dump(mode="json")
    for name, default in (("submit", SubmitConfig()), ("serving", ServingConfig()), ("tune", TuneConfig())):
        if extent == "saved" and getattr(config, name) == default:
            del content[name]
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    if any(mark in text for mark in "\x85\u2028\u2029"):  # PyYAML reads these line breaks as spaces unless escaped
        text = yaml.safe_dump(content, sort_keys=False)
    return text


def changed_values(section: BaseModel) -> dict[str, Any]:
    """The fields that differ from the defaults of their section, as JSON types; sections within are nested."""
    whole, changed = section.model_dump(mode="json"), {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        # a type with one literal, such as the name of a loss, says which class of a union the section is of
        one_literal = get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1
        if one_literal or value != field.get_default(call_default_factory=True):
            changed[name] = changed_values(value) if isinstance(value, BaseModel) else whole[name]
    return changed


def _read_layer(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"{path}: no such configuration file; correct the path")
    text = read_text(path, "correct the path, or give another configuration file")
    try:
        content = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a mapping of keys to values, not a {type(content).__name__}")
    return content


def parse_value(raw: str) -> Any:
    """A YAML value; numbers like 1e-4, which YAML 1.1 leaves a string, become floats through pydantic.

    A template's texts, such as ``{title}``, ``- {title}``, ``Next:`` or ``# Liked``, stay texts: lists and mappings are
    those in brackets with a colon in each mapping.
    """
    if not raw:
        return ""  # "key=" empties a text; "key=null" is YAML's nothing
    try:
        value = parse_yaml(raw)
    except ValueError:
        return raw
    text = raw.strip()
    if isinstance(value, dict | list):
        placeholder = isinstance(value, dict) and value and ":" not in text
        return _with_spaces(value) if text[0] in "[{" and not placeholder else raw
    if isinstance(value, str):
        return value if text[0] in "'\"" else raw
    return raw if value is None and text.startswith("#") else value


def _with_spaces(value: Any) -> Any:
    """``{r:8}`` as ``{r: 8}``, also within: to YAML it is a key "r:8" without a value, which no key of ours is."""
    if isinstance(value, list):
        return [_with_spaces(one) for one in value]
    if not isinstance(value, dict):
        return value
    spaced = {}
    for key, of_key in value.items():
        name, colon, text = key.partition(":") if of_key is None and isinstance(key, str) else (key, "", "")
        spaced[name] = parse_value(text) if colon and text else _with_spaces(of_key)
    return spaced


def _nest(keys: list[str], value: Any) -> dict[str, Any]:
    for key in reversed(keys):
        value = {key: value}
    return value


def _with_layer(merged: dict[str, Any], layer: dict[str, Any]) -> dict[str, Any]:
    below, over = merged.get("objective"), layer.get("objective")
    if isinstance(below, dict) and isinstance(over, dict):
        merged = merged | {"objective": options_below(below, over)}
    return _merge(merged, layer)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        both = isinstance(out.get(key), dict) and isinstance(value, dict)
        out[key] = _merge(out[key], value) if both else value
    return out


def _explain(error: Any) -> str:
    path = _key_path(error)
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        known = _all_keys(RunConfig)
        if key in known:
            return f"  {key}: {_no_option_here(error)}"
        return f"  {key}: unknown key; the nearest known key is {nearest_key(key, known)}"
    if error["type"] == "union_tag_invalid":  # the objective is the one section with a choice of options
        name = error["input"].get("name")
        return f"  {key}.name: must be one of {', '.join(BUILT_IN)}, or give {key}.import_path (got {name!r})"
    if error["type"] == "union_tag_not_found":
        return f"  {key}: must be a mapping of options (got {error['input']!r})"
    message = error["msg"].removeprefix("Value error, ")
    shown = isinstance(error["input"], Mapping) or "(got " in message  # a section says which of its keys it is about
    return f"  {key or 'top level'}: {message}" + ("" if shown else f" (got {error['input']!r})")


def nearest_key(key: str, known: Sequence[str]) -> str:
    """The known key that was probably meant: one of the same section by its initials or spelling, else any."""
    section, _, name = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    for sibling, whole in siblings.items():
        if name == "".join(word[:1] for word in sibling.split("_")) or name.startswith(sibling):  # lr, rank
            return whole
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.5)
    if close:
        return siblings[close[0]]
    anywhere = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
    last_parts = {k.rpartition(".")[2]: k for k in known}
    return anywhere[0] if anywhere else last_parts[difflib.get_close_matches(name, last_parts, n=1, cutoff=0.0)[0]]


def _key_path(error: Any) -> list[str]:
    """The key an error is about; pydantic puts the kind of objective between the section and its options."""
    path = [str(part) for part in error["loc"]]
    return [*path[:1], *path[2:]] if path[:1] == ["objective"] else path


def _no_option_here(error: Any) -> str:
    """Why an option that some kind of objective takes is refused for the one that was chosen."""
    kind = error["loc"][1]
    if kind == CUSTOM:
        return "is no option beside objective.import_path; options of your class go into objective.kwargs"
    return f"is no option of objective.name={kind}; leave it out, or choose the objective that takes it"


def _all_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all keys below ``section``."""
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        for below in sections_of(field.annotation):
            keys += _all_keys(below, prefix + name + ".")
    return list(dict.fromkeys(keys))


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field of this type may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in sections_of(argument)]
