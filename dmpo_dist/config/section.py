"""What every section of the configuration is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator


def at_home(value: Any) -> Any:
    """``value``, or what it names in the user's home directory where it is a text or Path that begins with ``~/``,
    which the shell leaves as it is after a key."""
    below_home = isinstance(value, str | Path) and str(value).startswith("~/")
    return str(Path(value).expanduser()) if below_home else value


def _as_text(value: Any) -> Any:
    value = at_home(value)
    return str(value) if isinstance(value, Path) else value


PathText = Annotated[str, BeforeValidator(_as_text)]
"""A path that may also be something else, such as a hub id or the URI of a bucket."""


class Section(BaseModel):
    """A configuration section: unknown keys, infinite numbers and true for a number are errors, paths may begin with
    ``~/``, field docstrings are help texts.

    A default has the type of its field (32.0 and not 32 for a float), as defaults are not converted: files that hold it
    (``adapter_config.json``) are then the same byte for byte whether it was left out or read back.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: ValidationInfo) -> Any:
        types = _types_in(cls.model_fields[str(info.field_name)].annotation)
        values = value if isinstance(value, list) else [value]
        if any(isinstance(v, bool) for v in values) and types & {int, float} and not types & {bool, Any}:
            raise ValueError("must be a number, not true or false")
        return at_home(value) if Path in types else value


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one level, ``{"train.steps": 20}``; an empty section is a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= dotted(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _types_in(annotation: Any) -> set[Any]:
    """The types that a field of this type may hold, also those in a list."""
    return {annotation}.union(*(_types_in(argument) for argument in get_args(annotation)))
