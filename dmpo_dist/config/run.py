"""The run configuration: everything a run depends on, as one pydantic schema.

The docstring below each field is its help text; ``dmpo config show --all`` prints all values.
"""

from pathlib import Path

from pydantic import Field, field_validator

from dmpo_dist.config.data import DataConfig
from dmpo_dist.config.evaluation import EvaluationConfig, RankingConfig
from dmpo_dist.config.model import ModelConfig, TemplateConfig
from dmpo_dist.config.objective import DmpoConfig, ObjectiveConfig
from dmpo_dist.config.section import PathText, Section
from dmpo_dist.config.serving import ServingConfig
from dmpo_dist.config.submit import SubmitConfig
from dmpo_dist.config.tracking import TrackingConfig
from dmpo_dist.config.training import ClusterConfig, ReferenceConfig, SFTConfig, TrainConfig
from dmpo_dist.config.tune import TuneConfig

CONFIG_VERSION = 1


class RunConfig(Section):
    """Everything a run depends on."""

    version: int = CONFIG_VERSION
    """Version of this schema."""
    output_dir: Path = Path("runs/dmpo")
    """Folder for everything the command writes; must not exist yet unless resuming."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Of everything drawn at random: new weights, negatives, order of groups, bootstraps; 32 bits, as NumPy takes."""
    data: DataConfig = Field(default_factory=DataConfig)
    template: TemplateConfig = Field(default_factory=TemplateConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    objective: ObjectiveConfig = Field(default_factory=DmpoConfig)
    reference: ReferenceConfig = Field(default_factory=ReferenceConfig)
    sft: SFTConfig = Field(default_factory=SFTConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    deepspeed: PathText = "zero2"
    """Name of a file in deepspeed_configs/ (zero0 ... zero3, zero2_offload, ...) or a path to a DeepSpeed JSON."""
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    ranking: RankingConfig = Field(default_factory=RankingConfig)
    serving: ServingConfig = Field(default_factory=ServingConfig)
    submit: SubmitConfig = Field(default_factory=SubmitConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    tune: TuneConfig = Field(default_factory=TuneConfig)

    @field_validator("version")
    @classmethod
    def _known_version(cls, value: int) -> int:
        if value != CONFIG_VERSION:
            raise ValueError(
                f"this configuration is of version {value}, this dmpo reads version {CONFIG_VERSION}; "
                "compare with `dmpo config show --all` and update the file"
            )
        return value
