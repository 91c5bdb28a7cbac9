"""One schema for everything a run depends on, a file for each section; ``load_config`` reads YAML and overrides."""

from dmpo_dist.config.data import DataConfig, Simulator, Source
from dmpo_dist.config.evaluation import EvaluationConfig, RankingConfig
from dmpo_dist.config.load import config_of, dump_config, load_config
from dmpo_dist.config.model import LoraConfig, ModelConfig, ScratchModel, TemplateConfig
from dmpo_dist.config.objective import ObjectiveConfig
from dmpo_dist.config.run import CONFIG_VERSION, RunConfig
from dmpo_dist.config.training import (
    ClusterConfig,
    OnPolicyConfig,
    ReferenceConfig,
    SFTConfig,
    StageConfig,
    TrainConfig,
)

__all__ = [
    "CONFIG_VERSION",
    "ClusterConfig",
    "DataConfig",
    "EvaluationConfig",
    "LoraConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OnPolicyConfig",
    "RankingConfig",
    "ReferenceConfig",
    "RunConfig",
    "SFTConfig",
    "ScratchModel",
    "Simulator",
    "Source",
    "StageConfig",
    "TemplateConfig",
    "TrainConfig",
    "config_of",
    "dump_config",
    "load_config",
]
