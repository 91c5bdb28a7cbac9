"""What a worker needs to know to train one stage; plain data, so that it travels to any process."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dmpo_dist.config import RunConfig, StageConfig
from dmpo_dist.objectives.likelihood import Likelihood
from dmpo_dist.objectives.loss import Loss
from dmpo_dist.objectives.registry import make_objective

Kind = Literal["sft", "preference"]


@dataclass(frozen=True)
class Job:
    """One training stage.

    Attributes:
        kind: supervised fine-tuning, or a preference objective.
        config: the resolved configuration, with an absolute ``data.path``.
        start: model folder or hub id to start from.
        output: absolute folder of the run; rank 0 writes ``model/`` and ``best/`` there.
        run_id: tells the run from an earlier one in the same folder, whose checkpoints are not its own.
        checkpointed: the step of the latest checkpoint that the log of a resumed run tells of; 0 without one.
        inputs: fingerprints of the data and the starting model that the run began with.
        finished: it is resumed, and its last step and its model are there already.
    """

    kind: Kind
    config: RunConfig
    start: str
    output: Path
    run_id: str = ""
    checkpointed: int = 0
    inputs: dict[str, Any] = field(default_factory=dict)
    finished: bool = False

    @property
    def run(self) -> str:
        """What names the run among others in the same storage."""
        return f"{self.output.name}-{self.run_id}"

    @property
    def section(self) -> Literal["sft", "train"]:
        """The stage's section of the configuration, which is also its command and its name in what a run leaves."""
        return "sft" if self.kind == "sft" else "train"

    @property
    def stage(self) -> StageConfig:
        """The stage's settings."""
        return self.config.sft if self.kind == "sft" else self.config.train

    @property
    def loss(self) -> Loss:
        """What the stage minimises.

        Raises:
            UserError: ``objective.import_path`` or its ``kwargs`` do not make a loss.
        """
        if self.kind == "sft":
            return Likelihood(scores_history=self.config.sft.loss_on == "all_titles")
        return make_objective(self.config.objective)
