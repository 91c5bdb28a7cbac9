"""What a worker needs to know to train one stage; plain data, so that it travels to any process."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dmpo_dist.config import RunConfig, StageConfig
from dmpo_dist.objectives import Objective

Kind = Literal["sft", "train"]


@dataclass(frozen=True)
class Job:
    """One training stage.

    Attributes:
        kind: ``sft`` or ``train`` (a preference objective).
        config: the resolved configuration, with an absolute ``data.path``.
        start: model folder or hub id to start from.
        output: absolute folder of the run; rank 0 writes ``model/`` and ``best/`` there.
        run_id: tells the run from an earlier one in the same folder, whose checkpoints are not its own.
    """

    kind: Kind
    config: RunConfig
    start: str
    output: Path
    run_id: str = ""

    @property
    def stage(self) -> StageConfig:
        """The section of the configuration with the stage's optimizer settings."""
        return self.config.sft if self.kind == "sft" else self.config.train

    @property
    def objective(self) -> Objective:
        """The preference objective of a ``train`` stage."""
        return Objective(**self.config.objective.model_dump(exclude={"sft_loss_on"}))

    @property
    def needs_reference(self) -> bool:
        """Whether training asks for reference log-probs."""
        return self.kind == "train" and self.objective.needs_reference

    @property
    def scores_history(self) -> bool:
        """Whether the titles of the history are scored next to the responses."""
        if self.kind == "sft":
            return self.config.sft.loss_on == "all_titles"
        return self.config.objective.sft_weight > 0 and self.config.objective.sft_loss_on == "all_titles"
