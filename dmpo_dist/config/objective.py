"""The ``objective`` section: a preference objective with its options, or a loss class of the user's own."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from dmpo_dist.config.section import Section

CUSTOM = "import_path"


class PreferenceOptions(Section, frozen=True):
    """What every preference objective takes; a subclass adds its name, and options of its own."""

    name: str = ""
    """dmpo | sdpo | dpo_pairs | dmpo_released (a file each in ``dmpo_dist/objectives``)."""
    beta: float = Field(1.0, gt=0)
    """Scale of the log-ratio of policy to reference."""
    sft_weight: float = Field(0.0, ge=0)
    """Adds this times the mean-token negative log-likelihood of the positive."""
    sft_loss_on: Literal["response", "all_titles"] = "response"
    """Take that likelihood over the positive alone, or also over every title of the history, which the shared prompt
    yields at no further forward pass (its items must then end with {end})."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of preferences assumed flipped: e in (1 - e) * softplus(z) + e * softplus(-z)."""
    reference_free: bool = False
    """Treat all reference log-probs as equal."""
    length_normalize: bool = False
    """Divide log-probs by the number of response tokens."""
    negative_selection: Literal["all", "boundary"] = "all"
    """all, or only the negatives the policy rates at least as high as the positive, the hardest ones where there are
    none (arXiv 2605.00327); the choice is not differentiated."""

    @model_validator(mode="after")
    def _loss_on_needs_weight(self) -> "PreferenceOptions":
        if self.sft_loss_on == "all_titles" and not self.sft_weight:
            raise ValueError("sft_loss_on=all_titles has no effect while sft_weight is 0; set objective.sft_weight")
        return self


class DmpoConfig(PreferenceOptions):
    name: Literal["dmpo"] = "dmpo"
    """dmpo | sdpo | dpo_pairs | dmpo_released, each with options of its own; left out beside ``import_path``."""


class SdpoConfig(PreferenceOptions):
    name: Literal["sdpo"] = "sdpo"


class DpoPairsConfig(PreferenceOptions):
    name: Literal["dpo_pairs"] = "dpo_pairs"


class DmpoReleasedConfig(PreferenceOptions):
    name: Literal["dmpo_released"] = "dmpo_released"


class CustomObjective(Section):
    """A class that implements ``dmpo_dist.objectives.loss.Loss``, made as ``Class(**kwargs)``."""

    name: str = ""
    """What tables call it; the name of the class unless given."""
    import_path: str
    """module:Class, in a package that is installed or in the working directory, on every node."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Options of the class."""

    @field_validator("import_path")
    @classmethod
    def _module_and_class(cls, value: str) -> str:
        if not re.fullmatch(r"[\w.]+:\w+", value):
            raise ValueError("must be of the form module:Class, as in my_losses:Ipo")
        return value

    @model_validator(mode="after")
    def _named(self) -> "CustomObjective":
        if self.name in BUILT_IN:
            raise ValueError(f"name={self.name} is an objective of ours; leave it out, or leave out import_path")
        self.name = self.name or self.import_path.rpartition(":")[2]
        return self


BUILT_IN: tuple[str, ...] = tuple(
    ours.model_fields["name"].default for ours in (DmpoConfig, SdpoConfig, DpoPairsConfig, DmpoReleasedConfig)
)


def _kind(section: Any) -> str | None:
    """Which member of the union a section is: by its ``import_path``, else by its name."""
    if isinstance(section, Mapping):
        return CUSTOM if CUSTOM in section else str(section.get("name", "dmpo"))
    return CUSTOM if isinstance(section, CustomObjective) else getattr(section, "name", None)


ObjectiveConfig = Annotated[
    Annotated[DmpoConfig, Tag("dmpo")]
    | Annotated[SdpoConfig, Tag("sdpo")]
    | Annotated[DpoPairsConfig, Tag("dpo_pairs")]
    | Annotated[DmpoReleasedConfig, Tag("dmpo_released")]
    | Annotated[CustomObjective, Tag(CUSTOM)],
    Discriminator(_kind),
]


def options_below(below: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """What a layer ``over`` keeps of the objective ``below`` it: one of ours has no use for a class's options, and the
    other way round."""
    if CUSTOM in over and CUSTOM not in below:
        return {key: value for key, value in below.items() if key == "kwargs"}
    return {} if CUSTOM in below and over.get("name") in BUILT_IN else below
