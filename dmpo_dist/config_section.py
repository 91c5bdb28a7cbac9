"""What every section of the configuration is."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A configuration section: unknown keys are errors, field docstrings are help texts."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)
