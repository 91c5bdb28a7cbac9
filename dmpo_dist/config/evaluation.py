"""What ``dmpo evaluate`` and ``dmpo rank`` depend on."""

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from dmpo_dist.config.section import PathText, Section

Baseline = Literal["random", "popularity", "pop_fitted", "item_knn", "ease", "sasrec", "bert4rec"]
Rule = Literal["sum", "mean", "prior", "reference"]
SAME_USERS = " (same users)"
"""Ends the name of a baseline that was fitted on what the training groups hold, and not on the whole log."""
BASELINES: tuple[str, ...] = (*get_args(Baseline), *(name + SAME_USERS for name in get_args(Baseline)))
"""All names that baselines have in tables."""


class TransformerBaseline(Section):
    """SASRec and BERT4Rec as RecTools trains them, with a softmax over the whole catalogue."""

    factors: int = Field(64, ge=1)
    """Width of embeddings and layers."""
    blocks: int = Field(2, ge=1)
    """Number of transformer layers."""
    heads: int = Field(2, ge=1)
    """Attention heads of a layer; their number divides ``factors``."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Dropout rate in training."""
    learning_rate: float = Field(1e-3, gt=0)
    """Learning rate of Adam."""
    batch_size: int = Field(32, ge=1)
    """Users per step."""
    max_length: int = Field(50, ge=2)
    """Latest likes of a user to train on."""
    max_epochs: int = Field(100, ge=1)
    """Most epochs; how many is chosen by NDCG@10 on the validation requests."""
    epochs: int = Field(4, ge=1)
    """Epochs where there are no validation requests to choose by."""
    epochs_per_check: int = Field(2, ge=1)
    """Epochs between two looks at the validation requests."""
    patience: int = Field(3, ge=1)
    """Looks without a new best after which training stops."""

    @model_validator(mode="after")
    def _heads_divide_factors(self) -> "TransformerBaseline":
        if self.factors % self.heads:
            raise ValueError(f"factors={self.factors} must be a multiple of heads={self.heads}")
        return self


class EvaluationConfig(Section):
    bootstrap_samples: int = Field(1000, ge=100, le=1_000_000)
    """Resamples of the users for the 95 % intervals."""
    token_budget: int = Field(8192, ge=16)
    """Most tokens in one scoring row."""
    baselines: list[Baseline] = Field(["random", "popularity", "item_knn"])
    """Ranked beside the models. popularity counts before each request, pop_fitted in what the others are fitted on;
    ease, sasrec and bert4rec come from RecTools, in an environment of their own that is made on first use."""
    fit_on: list[Literal["log", "shots"]] = Field(["log"], min_length=1)
    """What baselines are fitted on: log, the likes of the whole log before a split; shots, only those in the histories
    and positives of the data.shots training groups, in rows named "(same users)"."""
    baseline_environment: Path | None = None
    """Folder of that environment; None is one in the user's cache. Make it first where nodes have no network."""
    knn_neighbours: int = Field(50, ge=1)
    """Neighbours kept per item by the item-kNN baseline."""
    ease_regularization: list[Annotated[float, Field(gt=0)]] = Field([1000.0, 300.0, 3000.0, 10_000.0], min_length=1)
    """L2 weights of EASE to choose from by NDCG@10 on the validation requests; without those the first counts."""
    transformer: TransformerBaseline = Field(default_factory=TransformerBaseline)
    """Of sasrec and bert4rec."""
    candidate_orders: int = Field(1, ge=1)
    """Orders of the candidates over which scores are averaged, for a model whose prompts list them."""
    generate: int = Field(0, ge=0)
    """Test requests after whose prompts each model also writes a title by itself (greedily), for HR@1 by generation and
    the share of texts that are a candidate; 0 leaves it out."""
    order_requests: int = Field(32, ge=0)
    """Test requests that each model scores again with candidates and requests in other orders, to see whether that
    moves anything; 0 leaves it out."""

    rule: Rule | Literal["auto"] = "sum"
    """What language models rank by: sum, the log-prob of a title; mean, the same per token; prior, minus a weight times
    the log-prob after an empty history; reference, minus that of ranking.reference or else of the start; auto, for each
    model the best of ``rules`` (or of all) on the validation requests."""
    rules: list[Rule] = Field([])
    """Rules to show beside each other in a table of their own."""
    prior_weights: list[Annotated[float, Field(ge=0)]] = Field([0.0, 0.25, 0.5, 0.75, 1.0], min_length=1)
    """Weights of the prior to choose from by NDCG@10 on the validation requests; a single one needs none."""

    catalogue_beams: list[Annotated[int, Field(ge=1)]] = Field([])
    """Widths of beam searches in the catalogue's trie, each a row beside the exact one in evaluate --catalogue: what
    models reach that are evaluated by the titles they generate."""
    catalogue_exact: bool = True
    """Rank the catalogue exactly as well; false leaves the rows of ``catalogue_beams`` alone, where the exact ranking
    takes too long."""

    @model_validator(mode="after")
    def _beams_search_by_sums(self) -> "EvaluationConfig":
        if not (self.catalogue_exact or self.catalogue_beams):
            raise ValueError("catalogue_exact=false leaves nothing to rank the catalogue by; set catalogue_beams")
        if self.catalogue_beams and self.rule != "sum":
            raise ValueError(
                f"catalogue_beams={self.catalogue_beams} search by the summed log-prob, not by rule={self.rule}; leave "
                "out one of the two"
            )
        return self

    @field_validator("baselines", "fit_on", "rules", "prior_weights", "catalogue_beams")
    @classmethod
    def _each_once(cls, value: list[Any], info: ValidationInfo) -> list[Any]:
        if len(set(value)) < len(value):
            raise ValueError("names a baseline twice" if info.field_name == "baselines" else "holds a value twice")
        return value


class RankingConfig(Section):
    """What titles are ranked by, and how users are divided among workers."""

    reference: PathText | None = None
    """Subtract this model's log-probs: "base" for an adapter's base, "start" for what training started from, or a model
    folder or hub id with the same tokenizer. None subtracts nothing."""
    length_normalize: bool = False
    """Divide log-probs by the number of response tokens."""
    prior_weight: float = Field(0.0, ge=0)
    """Subtract this times a title's log-prob after an empty history, which is how common the string is by itself."""
    popularity_weight: float = Field(0.0, ge=0)
    """Subtract this times log(1 + how often a title was liked before)."""
    exclude_history: bool = True
    """Leave titles of the history out of a ranking of the whole catalogue."""
    beams: int | None = Field(None, ge=1)
    """Find titles of a whole catalogue by a beam search of this width in their trie, as a model would generate them,
    which may lose some of the best. None ranks exactly."""
    users_per_part: int = Field(64, ge=1)
    """Users a worker ranks before they are kept; what a lost worker or driver loses at most for each worker."""

    @property
    def corrections(self) -> list[str]:
        """The settings by which titles are ranked by anything but their summed log-prob."""
        of_sums = {"reference": None, "length_normalize": False, "prior_weight": 0, "popularity_weight": 0}
        return [name for name, neutral in of_sums.items() if getattr(self, name) != neutral]

    @model_validator(mode="after")
    def _beams_search_by_sums(self) -> "RankingConfig":
        if self.beams is not None and self.corrections:
            raise ValueError(
                f"beams={self.beams} search by the summed log-prob, without {', '.join(self.corrections)}; leave out "
                "one of the two"
            )
        return self
