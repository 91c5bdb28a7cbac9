"""The ``sft``, ``train``, ``reference`` and ``cluster`` sections: what the training stages depend on."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from dmpo_dist.config.section import PathText, Section


class ReferenceConfig(Section):
    cache: Literal["off", "memory", "disk"] = "off"
    """off runs the frozen reference in every step; memory and disk run it once over the training groups before the
    first step, which pays from the second epoch on (and saves full fine-tuning its second copy of the model)."""
    path: Path | None = None
    """Folder for cache=disk, shared by runs on equal model, data and template; None: output_dir/reference."""

    @field_validator("cache", mode="before")
    @classmethod
    def _yaml_off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML 1.1 reads off as false

    @model_validator(mode="after")
    def _path_needs_disk(self) -> "ReferenceConfig":
        if self.path is not None and self.cache != "disk":
            raise ValueError(f"path has no effect with cache={self.cache}; set reference.cache=disk")
        return self


class StageConfig(Section):
    """What the two training stages have in common."""

    steps: int | None = Field(None, ge=1)
    """Optimizer steps; overrides epochs."""
    epochs: float = Field(1.0, gt=0, le=1_000_000)
    """Passes over the training groups."""
    global_batch_size: int = Field(32, ge=1)
    """Preference groups per optimizer step, over all workers."""
    token_budget: Annotated[int, Field(ge=16)] | Literal["auto"] = 4096
    """Most tokens in one packed micro-batch row; auto finds the largest that fits into memory by a short probe."""
    learning_rate: float = Field(1e-4, gt=0)
    """Highest learning rate, reached after the warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after warm-up."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this global norm."""
    validate_every: int = Field(50, ge=1)
    """Steps between two rankings of the validation requests."""
    checkpoint_every: int = Field(100, ge=1)
    """Steps between two checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """Checkpoints kept; older ones are removed."""
    select: Literal["best", "last"] = "best"
    """Which weights become the result: best by ``select_metric`` on validation, those of the start
    included, or the last."""
    select_metric: Literal["ndcg@10", "hr@1", "mrr", "auc"] = "ndcg@10"
    """Metric on the validation requests that ``select=best`` goes by."""
    log_every: int = Field(10, ge=1)
    """Steps between two log lines."""


class SFTConfig(StageConfig):
    loss_on: Literal["response", "all_titles"] = "response"
    """Loss on the response alone, or also on every title of the history (its items must then end with {end})."""
    history_order: Literal["given", "shuffled"] = "given"
    """given, or shuffled: a new random order of each history in every epoch, so that any title is asked for after any
    others. More to learn from the same likes where their order says little."""
    negatives: int = Field(7, ge=1)
    """Negatives that a template with {candidates} lists beside the positive in each step; no effect without one."""


class OnPolicyConfig(Section):
    every: int = Field(20, ge=1)
    """Steps between two draws: each searches titles by the weights of that time for the groups of as many steps."""
    beams: int = Field(20, ge=1)
    """Width of the search, which is the number of titles that it finds for a group."""
    top: int = Field(16, ge=1)
    """The negatives of a group are drawn among so many of the best titles found, after ``skip``; where there are fewer
    than ``train.negatives``, stored ones fill up."""
    skip: int = Field(0, ge=0)
    """The very best titles, which are left out: the user may like them without the log showing it."""

    @model_validator(mode="after")
    def _within_the_beams(self) -> "OnPolicyConfig":
        if self.top + self.skip > self.beams:
            raise ValueError(
                f"top={self.top} and skip={self.skip} need {self.top + self.skip} titles, but beams={self.beams} finds "
                "fewer; raise train.on_policy.beams, or lower the others"
            )
        return self


class TrainConfig(StageConfig):
    negatives: int = Field(7, ge=1)
    """K: negatives per preference group in each step; among levels (``data.levels``) responses of the last one, beside
    all of the others."""
    on_policy: OnPolicyConfig | None = None
    """Negatives from the model itself: the titles of the catalogue that it ranks first for each prompt, found by a beam
    search now and then. None takes the negatives that the data holds."""
    self_check: bool = True
    """Compare one group's fused log-probs with separate rows before the first step, and the first loss with its known
    value."""


class ClusterConfig(Section):
    workers: int = Field(1, ge=1)
    """Number of training workers (ranks); [2, 8] is fewest_workers=2 and workers=8."""
    fewest_workers: int | None = Field(None, ge=1)
    """Fewest workers that training goes on with when nodes are lost; as nodes join, Ray adds workers, up to
    ``workers``. None: training waits for all ``workers``."""
    cpus_per_worker: float = Field(1.0, gt=0)
    """CPUs that Ray reserves for a worker."""
    gpus_per_worker: float | None = Field(None, ge=0)
    """GPUs per worker; None takes 1 where the cluster has GPUs, else 0."""
    address: str | None = None
    """Ray cluster to join (as in ``ray.init``); None joins RAY_ADDRESS if set, else starts a local one."""
    max_failures: int = Field(2, ge=0)
    """Worker failures survived by going back to the latest checkpoint."""
    storage_path: PathText | None = None
    """Shared folder or bucket for checkpoints; None uses the output folder (on one machine or a shared file system)."""

    @model_validator(mode="before")
    @classmethod
    def _range(cls, values: Any) -> Any:
        workers = values.get("workers") if isinstance(values, dict) else None
        if isinstance(workers, list) and len(workers) == 2:
            return values | {"fewest_workers": workers[0], "workers": workers[1]}
        return values

    @model_validator(mode="after")
    def _fewest_first(self) -> "ClusterConfig":
        if self.fewest_workers is not None and self.fewest_workers > self.workers:
            raise ValueError(f"fewest_workers={self.fewest_workers} is above workers={self.workers}; lower it")
        return self

    @property
    def fewest(self) -> int:
        """Workers without which training does not go on."""
        return self.fewest_workers or self.workers
