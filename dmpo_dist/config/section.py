"""What every section of the configuration is."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A configuration section: unknown keys and infinite numbers are errors, field docstrings are help texts.

    A default has the type of its field (32.0 and not 32 for a float), as defaults are not converted: files that hold it
    (``adapter_config.json``) are then the same byte for byte whether it was left out or read back.
    """

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one level, ``{"train.steps": 20}``; an empty section is a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= dotted(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
