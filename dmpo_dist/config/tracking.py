"""The ``tracking`` section of the configuration: experiment trackers that get a run's figures beside its folder."""

from typing import Literal

from pydantic import Field

from dmpo_dist.config.section import Section


class WandbConfig(Section):
    """Weights & Biases; its API key comes from `wandb login` or WANDB_API_KEY."""

    project: str = "dmpo"
    """Project that the runs belong to."""
    entity: str | None = None
    """User or team; None is the key's default."""
    mode: Literal["online", "offline"] = "online"
    """offline writes to output_dir/wandb, for `wandb sync` later."""


class MlflowConfig(Section):
    """MLflow."""

    experiment: str = "dmpo"
    """Experiment that the runs belong to."""
    tracking_uri: str | None = None
    """Server or store, without a password; None takes MLFLOW_TRACKING_URI, which may hold one, else mlflow.db in the
    working directory, as `mlflow ui` does."""


class TrackingConfig(Section):
    """Trackers beside the JSON lines and TensorBoard files of every run; ``tracking.wandb={}`` turns one on."""

    wandb: WandbConfig | None = None
    """Send figures to Weights & Biases; null does not."""
    mlflow: MlflowConfig | None = None
    """Send figures to MLflow; null does not."""
    name: str | None = None
    """Name of the run there; None is the last part of output_dir."""
    tags: list[str] = Field(default_factory=list)
    """Tags of the run there, beside its stage and its objective."""
