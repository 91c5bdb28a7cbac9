"""The ``objective`` section: the preference loss and its options."""

from typing import Literal

from pydantic import Field, model_validator

from dmpo_dist.config.section import Section


class ObjectiveConfig(Section):
    name: Literal["dmpo", "sdpo", "dpo_pairs", "dmpo_released"] = "dmpo"
    """dmpo | sdpo | dpo_pairs | dmpo_released (see ``objectives.py``)."""
    beta: float = Field(1.0, gt=0)
    """Scale of the log-ratio of policy to reference."""
    sft_weight: float = Field(0.0, ge=0)
    """Adds this times the mean-token negative log-likelihood of the positive."""
    sft_loss_on: Literal["response", "all_titles"] = "response"
    """Take that likelihood over the positive alone, or also over every title of the history, which the shared prompt
    yields at no further forward pass (its items must then end with {end})."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of preferences assumed flipped."""
    reference_free: bool = False
    """Treat all reference log-probs as equal."""
    length_normalize: bool = False
    """Divide log-probs by the number of response tokens."""
    negative_selection: Literal["all", "boundary"] = "all"
    """all, or only the negatives the policy rates at least as high as the positive."""

    @model_validator(mode="after")
    def _loss_on_needs_weight(self) -> "ObjectiveConfig":
        if self.sft_loss_on == "all_titles" and not self.sft_weight:
            raise ValueError("sft_loss_on=all_titles has no effect while sft_weight is 0; set objective.sft_weight")
        return self
