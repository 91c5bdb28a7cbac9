"""``dmpo.json``: what a model folder says of its model beside the weights."""

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator

from dmpo_dist.artifacts.base import Artifact
from dmpo_dist.artifacts.log import COMMANDS
from dmpo_dist.config import TemplateConfig


def _command(stage: Any) -> Any:
    """The command that trains ``stage``; what is no stage stays for the type to refuse."""
    return COMMANDS.get(stage, stage) if isinstance(stage, str) else stage


class ModelStamp(Artifact):
    """The template that every use of a model must keep to, and how the model came about.

    Further keys are validation metrics at ``step``.
    """

    FILE: ClassVar[str] = "dmpo.json"
    ADVICE: ClassVar[str] = "was a copy cut off? Restore the file as training wrote it"

    dmpo_dist: str | None = None
    template: TemplateConfig | None = None
    rendered: dict[str, str] | None = None
    """What its tokenizer and chat template put around texts in training; None in stamps of earlier versions."""
    stage: Annotated[str | None, BeforeValidator(_command)] = None
    """The command that made it, sft or train; untuned for random weights."""
    start: str | None = None
    """Model folder or hub id that its stage started from."""
    start_name: str | None = None
    """Of an exported model: what that folder was called on the machine it was exported on; nothing looks for it."""
    stages: int = 0
    """How many stages it went through."""
    quantization: str = "none"
    """Of the base it was trained on."""
    max_length: int | None = None
    """``model.max_length`` in training, which every use keeps to unless it is told otherwise; None in stamps of earlier
    versions."""
    step: int | None = None
    digests: dict[str, str] | None = None
    """Path -> digest of the files beside this one, see ``modeling.model_files``; None in stamps of earlier versions."""
    base_digests: dict[str, str] | None = None
    """Of an adapter: likewise of the weights in the folder of its base."""
    export: dict[str, Any] | None = None
    """How ``dmpo export`` wrote it."""

    def validation(self) -> dict[str, float]:
        """Metric -> value on the validation requests, as the stamp has them."""
        return {name: value for name, value in (self.model_extra or {}).items() if isinstance(value, float)}
