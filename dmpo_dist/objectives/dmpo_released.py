"""What the DMPO authors' released code trains: reference-free ``dpo_pairs`` plus the positive's likelihood."""

from dmpo_dist.config.objective import DmpoReleasedConfig
from dmpo_dist.objectives.dpo_pairs import DpoPairs
from dmpo_dist.objectives.preference import Preference


class DmpoReleased(DmpoReleasedConfig, Preference):
    """``sft_weight`` comes on top of the likelihood that is in it."""

    @property
    def needs_reference(self) -> bool:
        return False

    @property
    def likelihood_weight(self) -> float:
        return self.sft_weight + 1.0

    preference_loss = DpoPairs.preference_loss
