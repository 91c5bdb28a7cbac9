"""What ``dmpo evaluate`` and ``dmpo rank`` depend on."""

from pydantic import Field

from dmpo_dist.config_section import Section


class EvaluationConfig(Section):
    bootstrap_samples: int = Field(1000, ge=100)
    """Resamples of the users for the 95 % intervals."""
    token_budget: int = Field(8192, ge=16)
    """Most tokens in one scoring row."""
    knn_neighbours: int = Field(50, ge=1)
    """Neighbours kept per item by the item-kNN baseline."""


class RankingConfig(Section):
    """What titles are ranked by, and how users are divided among workers."""

    reference: str | None = None
    """Subtract this model's log-probs: "base" for an adapter's base, "start" for what training started from, or a model
    folder or hub id with the same tokenizer. None subtracts nothing."""
    length_normalize: bool = False
    """Divide log-probs by the number of response tokens."""
    popularity_weight: float = Field(0.0, ge=0)
    """Subtract this times log(1 + a title's interactions)."""
    exclude_history: bool = True
    """Leave titles of the history out of a ranking of the whole catalogue."""
    users_per_part: int = Field(64, ge=1)
    """Users a worker ranks before they are kept; what a lost worker or driver loses at most for each worker."""
