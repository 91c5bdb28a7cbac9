"""What a worker needs to know to train one stage; plain data, so that it travels to any process."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dmpo_dist.config import RunConfig, StageConfig

Kind = Literal["sft", "train"]


@dataclass(frozen=True)
class Job:
    """One training stage.

    Attributes:
        kind: ``sft`` or ``train`` (a preference objective).
        config: the resolved configuration, with an absolute ``data.path``.
        start: model folder or hub id to start from.
        output: absolute folder of the run; rank 0 writes ``model/`` and ``best/`` there.
    """

    kind: Kind
    config: RunConfig
    start: str
    output: Path

    @property
    def stage(self) -> StageConfig:
        """The section of the configuration with the stage's optimizer settings."""
        return self.config.sft if self.kind == "sft" else self.config.train
