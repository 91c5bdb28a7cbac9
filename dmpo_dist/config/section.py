"""What every section of the configuration is."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A configuration section: unknown keys and infinite numbers are errors, field docstrings are help texts.

    Defaults are validated like given values, so that a setting left out and the same one read back are equal in type
    too: files that hold it (``adapter_config.json``) are then the same byte for byte.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True)


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one level, ``{"train.steps": 20}``; an empty section is a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= dotted(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
