"""``evaluation.json``: what models and baselines reach on the same requests."""

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, FiniteFloat, model_validator

from dmpo_dist.artifacts.base import Artifact, Typed
from dmpo_dist.artifacts.digest import json_digest
from dmpo_dist.artifacts.stamp import ModelStamp
from dmpo_dist.config.evaluation import Rule
from dmpo_dist.errors import UserError

SCORES_FILE = "scores.parquet"
"""Beside it: a row per model, request and candidate."""


class Interval(Typed):
    """A figure and, where it was resampled, its 95 % interval; a bare number is a figure without one."""

    value: FiniteFloat
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, data: Any) -> Any:
        return {"value": data} if isinstance(data, int | float) else data


Metrics = Annotated[dict[str, Interval], Field(min_length=1)]


class Comparison(Typed):
    """The mean difference ``a - b`` of a metric over the same users, and over ``seeds`` where both have some."""

    a: str
    b: str
    metric: str
    difference: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat
    p: Annotated[FiniteFloat, Field(ge=0, le=1)] | None = None
    """Before any correction for many comparisons, which depends on what is shown together (``verdicts``)."""
    seeds: list[str] = Field(default_factory=list)


class Stratum(Typed):
    """Some of the requests, and all models on them."""

    requests: int
    models: dict[str, Metrics]


class CatalogueRanking(Typed):
    """Ranking among all items; coverage and gini are of all first tens of a model together, without intervals."""

    items: int | None = None
    without_taken: bool = True
    """Whether the items that a user had taken were left out, as ``ranking.exclude_history`` has it."""
    models: dict[str, Metrics]
    coverage: dict[str, FiniteFloat] = Field(default_factory=dict, alias="coverage@10")
    gini: dict[str, FiniteFloat] = Field(default_factory=dict, alias="gini@10")

    def all_metrics(self) -> dict[str, dict[str, Interval]]:
        """Model -> metric -> figure, coverage and gini among them."""
        models = {name: dict(metrics) for name, metrics in self.models.items()}
        for metric, of_model in (("coverage@10", self.coverage), ("gini@10", self.gini)):
            for name, figure in of_model.items():
                models.setdefault(name, {})[metric] = Interval(value=figure)
        return models


class ScoreSpread(Typed):
    """How far scores moved at most, in nats."""

    max_difference: FiniteFloat


class OrderCheck(Typed):
    """Requests scored again: by model, with ``candidates`` in other orders and with ``packing`` otherwise."""

    requests: int
    orders: int | None = None
    models: dict[str, dict[str, ScoreSpread]]


class GeneratedFigures(Typed):
    """What a model writes after its prompts."""

    hr: FiniteFloat = Field(alias="hr@1")
    """The share of texts that are the positive, letter by letter."""
    valid: FiniteFloat
    """The share of texts that are any candidate of their request."""
    by_log_prob: FiniteFloat = Field(alias="hr@1 by log-prob")
    """HR@1 of the same requests by log-prob."""


class Generation(Typed):
    """Greedy generation after the prompts of some requests, by model."""

    requests: int
    models: dict[str, GeneratedFigures]


class BaselineTraining(Typed):
    """What is known of the training of a classical baseline."""

    settings: dict[str, int | FiniteFloat] = Field(default_factory=dict)
    validation: dict[str, FiniteFloat] = Field(default_factory=dict)
    seconds: FiniteFloat | None = None
    requests_with_unknown_history: int = 0
    unknown_positives: int = 0


class RuleChoice(Typed):
    """The scoring rule by which a language model is ranked."""

    rule: Rule
    prior_weight: FiniteFloat | None = None
    """Of the rule prior, where that was looked at."""
    validation: dict[str, FiniteFloat] = Field(default_factory=dict)
    """NDCG@10 on the validation requests by rule, ``prior 0.5`` by weight, where something was chosen by it."""


class ScoringRules(Typed):
    """Language models on the same requests by several scoring rules."""

    models: dict[str, dict[Rule, Metrics]]
    """Model -> rule -> metric."""
    chosen: dict[str, RuleChoice]
    """Model, or name@seed of one -> the rule in use in all other figures."""


def weights_digest(model: Path) -> str | None:
    """A digest of the files that training wrote to the folder ``model``, as its stamp has them; None for none."""
    try:
        stamp = ModelStamp.read_if_there(model)
    except UserError:
        return None
    return json_digest(stamp.digests) if stamp and stamp.digests else None


class EvaluationOrder(Artifact):
    """What an evaluation was asked for beside its configuration, so that its folder is enough to go on with it."""

    FILE: ClassVar[str] = "evaluate.json"
    ADVICE: ClassVar[str] = "remove it, and name the models again by -m"

    models: dict[str, str]
    """Name, or name@seed, -> model folder or hub id."""
    against: list[str]
    catalogue: bool


class Evaluation(Artifact):
    """Figures of all models, and models against each other."""

    FILE: ClassVar[str] = "evaluation.json"
    ADVICE: ClassVar[str] = "made by another version? run `dmpo evaluate` again, or leave this folder out"

    requests: int
    negatives: Annotated[dict[str, int], Field(min_length=1)]
    """The fewest and the most of a request."""
    bootstrap: dict[str, int] = Field(default_factory=dict)
    """Samples and seed."""
    models: Annotated[dict[str, Metrics], Field(min_length=1)]
    seeds: dict[str, dict[str, dict[str, FiniteFloat]]] = Field(default_factory=dict)
    """Of models trained with several seeds: name -> seed -> metric."""
    strata: dict[str, dict[str, Stratum]] = Field(default_factory=dict)
    """Kind -> stratum."""
    comparisons: list[Comparison] = Field(default_factory=list)
    against_start: list[Comparison] = Field(default_factory=list)
    """Each model against the one that its stage started from, where that is evaluated too."""
    data: dict[str, Any] = Field(default_factory=dict)
    """Path and fingerprint of the prepared data, and the digest of its log: see ``PreparedData.about``."""
    folders: dict[str, str] = Field(default_factory=dict)
    """Language model, or name@seed of one -> its model folder or hub id."""
    weights: dict[str, str] = Field(default_factory=dict)
    """The same names -> ``weights_digest`` of that folder, where it has one."""
    settings: dict[str, Any] | None = None
    """Of an experiment: what the figures depend on."""
    notes: list[str] = Field(default_factory=list)
    """What a reader must know of the figures."""
    baselines: dict[str, BaselineTraining] = Field(default_factory=dict)
    order: OrderCheck | None = None
    generation: Generation | None = None
    rules: ScoringRules | None = None
    catalogue: CatalogueRanking | None = None

    @property
    def most_negatives(self) -> int:
        """Of any request."""
        return self.negatives.get("most", max(self.negatives.values()))

    @property
    def trained(self) -> dict[str, str]:
        """Language model -> its folder, of one of its seeds where ``folders`` has them as ``name@seed``."""
        of_first_seed = {name.rpartition("@")[0] or name: folder for name, folder in reversed(self.folders.items())}
        by_name = of_first_seed | self.folders
        return {name: by_name[name] for name in self.models if name in by_name}

    def name_of(self, model: Path, same_weights: bool = True) -> str | None:
        """What the model in the folder ``model`` is called, name@seed for one of several seeds; None: none.

        Args:
            same_weights: a model that was trained again in that folder since is none.
        """
        model = model.resolve()
        for name, folder in self.folders.items():
            # a relative path was relative to wherever `dmpo evaluate` ran
            if model == Path(folder).resolve() or (
                not Path(folder).is_absolute() and str(model).endswith(f"/{folder}")
            ):
                now = weights_digest(model)
                return name if not same_weights or now is None or self.weights.get(name, now) == now else None
        return None

    def figures_of(self, name: str) -> dict[str, Interval]:
        """Metric -> figure of a model or, without intervals, of one of its seeds by its name@seed."""
        if name in self.models:
            return self.models[name]
        model, _, seed = name.rpartition("@")
        return {metric: Interval(value=value) for metric, value in self.seeds[model][seed].items()}
