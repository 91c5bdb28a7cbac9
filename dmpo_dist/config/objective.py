"""The ``objective`` section: a preference objective with its options, or a loss class of the user's own."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from dmpo_dist.config.section import Section

CUSTOM = "import_path"


class PreferenceOptions(Section, frozen=True):
    """What every preference objective takes; a subclass adds its name, and options of its own."""

    name: str = ""
    """Which objective; see ``DmpoConfig``."""
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
    dynamic_beta: float = Field(0.0, ge=0, lt=1)
    """Largest change of beta by DynamicPO's two margins, as a share of it: 0 keeps beta constant, the paper's code
    takes 0.5. It needs ``negative_selection=boundary`` (see ``objectives/dynamic_beta.py``)."""
    dynamic_beta_margin: float = 6.0
    """By how many nats the first margin must exceed the second before beta grows."""

    REFUSED: ClassVar[Mapping[str, str]] = {}
    """Options that do not apply to an objective, and why."""

    @model_validator(mode="after")
    def _takes_its_options(self) -> "PreferenceOptions":
        for option, why in self.REFUSED.items():
            if getattr(self, option) != type(self).model_fields[option].default:
                raise ValueError(f"{option} does not go with name={self.name}, {why}; leave it out")
        return self

    @model_validator(mode="after")
    def _dynamic_beta_needs_a_boundary(self) -> "PreferenceOptions":
        if self.dynamic_beta and self.negative_selection != "boundary":
            raise ValueError("dynamic_beta measures the boundary negatives; set objective.negative_selection=boundary")
        return self

    @model_validator(mode="after")
    def _loss_on_needs_weight(self) -> "PreferenceOptions":
        if self.sft_loss_on == "all_titles" and not self.sft_weight:
            raise ValueError("sft_loss_on=all_titles has no effect while sft_weight is 0; set objective.sft_weight")
        return self


class DmpoConfig(PreferenceOptions):
    name: Literal["dmpo"] = "dmpo"
    """One positive against negatives: dmpo | sdpo | dpo_pairs | dmpo_released | ipo | simpo | recpo |
    rank_reward (of ``train.on_policy``). Also several positives and ordered lists: mult_dpo | plackett_luce. Each takes
    options of its own; left out beside ``import_path``."""


class SdpoConfig(PreferenceOptions):
    name: Literal["sdpo"] = "sdpo"


class DpoPairsConfig(PreferenceOptions):
    name: Literal["dpo_pairs"] = "dpo_pairs"


class DmpoReleasedConfig(PreferenceOptions):
    name: Literal["dmpo_released"] = "dmpo_released"


CONSTANT_BETA = {"dynamic_beta": "whose source keeps beta constant"}
NO_BOUNDARY = CONSTANT_BETA | {"negative_selection": "whose source knows no boundary negatives"}
NO_SIGMOID = {"label_smoothing": "which has no sigmoid to smooth"}


class IpoConfig(PreferenceOptions):
    name: Literal["ipo"] = "ipo"

    REFUSED: ClassVar[Mapping[str, str]] = CONSTANT_BETA | NO_SIGMOID


class SimpoConfig(PreferenceOptions):
    name: Literal["simpo"] = "simpo"
    beta: float = Field(2.0, gt=0)
    """Scale of the mean log-prob of a token."""
    gamma: float = Field(0.5, ge=0)
    """Target margin: by how much beta times the positive's mean log-prob must exceed a negative's."""
    reference_free: Literal[True] = True
    """Always: SimPO has no reference."""
    length_normalize: Literal[True] = True
    """Always: SimPO's reward is the mean log-prob of a token."""

    REFUSED: ClassVar[Mapping[str, str]] = CONSTANT_BETA


class RecpoConfig(PreferenceOptions):
    name: Literal["recpo"] = "recpo"
    margin_weight: float = Field(2.0, ge=0)
    """Weight of the margin score(positive) / score(negative); 0 is sdpo. Scores come with the rows: see
    ``data.levels``."""

    REFUSED: ClassVar[Mapping[str, str]] = NO_BOUNDARY


class MultDpoConfig(PreferenceOptions):
    name: Literal["mult_dpo"] = "mult_dpo"

    REFUSED: ClassVar[Mapping[str, str]] = NO_BOUNDARY | NO_SIGMOID


class PlackettLuceConfig(PreferenceOptions):
    name: Literal["plackett_luce"] = "plackett_luce"

    REFUSED: ClassVar[Mapping[str, str]] = NO_BOUNDARY


class RankRewardConfig(PreferenceOptions):
    name: Literal["rank_reward"] = "rank_reward"
    kl: float = Field(0.001, ge=0)
    """Weight of the penalty on the distance from the reference; 0 needs no reference."""
    target: Literal["generated", "always"] = "generated"
    """generated: a group whose positive the search did not find has no gradient, as in the sources; always: the
    positive counts with its reward of 1 even so."""

    REFUSED: ClassVar[Mapping[str, str]] = (
        NO_BOUNDARY
        | NO_SIGMOID
        | {
            "beta": "which scales nothing but its penalty, by objective.kl",
            "reference_free": "which is so with objective.kl=0",
        }
    )


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


OURS: tuple[type[PreferenceOptions], ...] = (
    DmpoConfig, SdpoConfig, DpoPairsConfig, DmpoReleasedConfig,
    IpoConfig, SimpoConfig, RecpoConfig, MultDpoConfig, PlackettLuceConfig, RankRewardConfig,
)  # fmt: skip
BUILT_IN: tuple[str, ...] = tuple(ours.model_fields["name"].default for ours in OURS)


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
    | Annotated[IpoConfig, Tag("ipo")]
    | Annotated[SimpoConfig, Tag("simpo")]
    | Annotated[RecpoConfig, Tag("recpo")]
    | Annotated[MultDpoConfig, Tag("mult_dpo")]
    | Annotated[PlackettLuceConfig, Tag("plackett_luce")]
    | Annotated[RankRewardConfig, Tag("rank_reward")]
    | Annotated[CustomObjective, Tag(CUSTOM)],
    Discriminator(_kind),
]


def options_below(below: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """What a layer ``over`` keeps of the objective ``below`` it: one of ours has no use for a class's options, and the
    other way round."""
    if CUSTOM in over and CUSTOM not in below:
        return {key: value for key, value in below.items() if key == "kwargs"}
    return {} if CUSTOM in below and over.get("name") in BUILT_IN else below
