"""A language model by each scoring rule, and which is in use: weights and rules are chosen on validation alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from datasets import Dataset

from dmpo_dist.artifacts.evaluation import Metrics, RuleChoice, ScoringRules
from dmpo_dist.config import RunConfig
from dmpo_dist.config.evaluation import EvaluationConfig, Rule
from dmpo_dist.data.store import PreparedData
from dmpo_dist.data.template import Template
from dmpo_dist.data.tokenization import tokenize_rows
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.metrics import METRICS, ranking_metrics
from dmpo_dist.evaluation.ranking import reference_of
from dmpo_dist.evaluation.seeds import stacked
from dmpo_dist.evaluation.strata import cells
from dmpo_dist.modeling.backbone import ModelSource
from dmpo_dist.modeling.ranking_model import RankingModel
from dmpo_dist.modeling.scoring_rule import adjusted, require_prior, scored_lengths

RULES: tuple[Rule, ...] = get_args(Rule)
CHOSEN_BY = "ndcg@10"
Scores = list[np.ndarray]
"""Per request a float64 array (1 + K,), the positive first."""
Split = Literal["test", "validation"]
Score = Callable[[Split, str | None], Scores]
"""Scores a split by the model, or by its reference of this path."""


@dataclass(frozen=True)
class RuledScores:
    """One model's test scores by each rule that it can be ranked by, and which of them counts."""

    by_rule: dict[Rule, Scores]
    choice: RuleChoice

    @property
    def scores(self) -> Scores:
        """By the rule in use."""
        return self.by_rule[self.choice.rule]


@dataclass(frozen=True)
class _Parts:
    """What the rules are made of, for each request (1 + K,) of its candidates; None where no rule asks for it."""

    log_probs: Scores
    lengths: Scores
    prior: Scores | None
    reference: Scores | None

    def scores(self, rule: Rule, prior_weight: float = 0.0) -> Scores:
        empty = [None] * len(self.log_probs)
        priors = self.prior if rule == "prior" and self.prior is not None else empty
        references = self.reference if rule == "reference" and self.reference is not None else empty
        parts = zip(self.log_probs, self.lengths, references, priors, strict=True)
        return [
            adjusted(own, lengths, other, None, rule == "mean", 0.0, prior, prior_weight)
            for own, lengths, other, prior in parts
        ]


def asks_for_rules(settings: EvaluationConfig) -> bool:
    """Whether models are to be ranked by anything but their summed log-probs."""
    return bool(settings.rules) or settings.rule != "sum"


def rules_of(source: ModelSource, config: RunConfig, data: PreparedData) -> list[Rule]:
    """The rules to rank a model by, in the order of ``RULES``.

    A model that says of no start and has no reference named cannot be ranked by ``reference``, unless that is the rule
    in use. Where ``auto`` chooses among all rules, finished prompts leave out ``prior``.
    """
    settings = config.evaluation
    asked = set(settings.rules) | ({settings.rule} if settings.rule != "auto" else set())
    if settings.rule == "auto" and not settings.rules:
        asked = set(RULES) - ({"prior"} if _finished_prompts(data) else set())
    if not (config.ranking.reference or source.stamp.start) and settings.rule != "reference":
        asked.discard("reference")
    return [rule for rule in RULES if rule in asked]


def check_rules(models: Mapping[str, tuple[ModelSource, Template]], config: RunConfig, data: PreparedData) -> None:
    """Check what the rules need before weights are loaded.

    Args:
        models: what each is called -> where it is, and its template.

    Raises:
        UserError: a rule that a model or the data cannot be ranked by, or a choice without validation requests.
    """
    settings = config.evaluation
    if not asks_for_rules(settings):
        return
    for name, (source, template) in models.items():
        rules = rules_of(source, config, data)
        if not rules:
            raise UserError(f"--model {name}={source.path}: does not say what it was started from, so that none of "
                            "evaluation.rules applies; add sum, or name ranking.reference")  # fmt: skip
        if "reference" in rules:
            reference_of(source, _reference(config), "ranking.reference=")
        if "prior" in rules:
            require_prior(template, source.path)
            if _finished_prompts(data):
                raise UserError(
                    f"evaluation.rules: prior asks for a prompt without history, but {data.path} holds finished "
                    "prompts; leave prior out"
                )
        if _is_tuned(rules, settings) and not len(data.validation):
            raise UserError(
                f"evaluation.rule={settings.rule}, evaluation.prior_weights={settings.prior_weights}: rules and weights "
                f"are chosen on validation requests, and {data.path} holds none; name one rule and one weight"
            )


def ruled_scores(
    model: RankingModel,
    log_probs: Scores,
    data: PreparedData,
    config: RunConfig,
    score: Score | None = None,
) -> RuledScores:
    """The test requests by each rule of ``model``, whose summed log-probs are ``log_probs``.

    Args:
        score: scores a split of ``data`` by ``model`` or its reference, as ``score_rows`` does; it may show progress.

    Raises:
        UserError: a reference that cannot be used.
    """
    score = score or (lambda split, path: _scorer(model, path).score_rows(rows_of(data, split)))
    settings = config.evaluation
    rules = rules_of(model.source, config, data)
    reference = reference_of(model.source, _reference(config)) if "reference" in rules else None
    tuned = _is_tuned(rules, settings)
    if "prior" in rules:
        splits = (data.test, data.validation) if tuned else (data.test,)
        if not model.template.lists_candidates and not model.encode.texts.user_fields:  # else it is its request's own
            model.prior([title for rows in splits for titles in _titles(rows) for title in titles])  # in one trie
    weight = settings.prior_weights[0] if "prior" in rules else None
    rule = rules[0] if settings.rule == "auto" else settings.rule
    by_label: dict[str, float] = {}
    if tuned:
        found = _parts(model, reference, rules, data, "validation", score)
        values = {(r, w): _mean(found.scores(r, w)) for r in rules for w in _weights(r, settings)}
        weight = max(settings.prior_weights, key=lambda w: values["prior", w]) if "prior" in rules else None
        if settings.rule == "auto":
            rule = max(rules, key=lambda r: values[r, (weight or 0.0) if r == "prior" else 0.0])
        by_label = {f"prior {w:g}" if r == "prior" else r: value for (r, w), value in values.items()}
    parts = _parts(model, reference, rules, data, "test", score, log_probs)
    return RuledScores(
        {r: parts.scores(r, weight or 0.0) for r in rules},
        RuleChoice(rule=rule, prior_weight=weight, validation=by_label),
    )


def with_rule(config: RunConfig, choice: RuleChoice | None) -> RunConfig:
    """``config`` whose ``ranking`` section ranks a catalogue by ``choice`` and nothing else."""
    if choice is None:
        return config
    ranking = {
        "length_normalize": choice.rule == "mean",
        "prior_weight": choice.prior_weight if choice.rule == "prior" else 0.0,
        "reference": _reference(config) if choice.rule == "reference" else None,
        "popularity_weight": 0.0,
    }
    return config.model_copy(update={"ranking": config.ranking.model_copy(update=ranking)})


def rules_figures(ruled: Mapping[str, RuledScores], samples: int, seed: int) -> ScoringRules:
    """Figures of all models, whose seeds are one model each, by each rule.

    Args:
        ruled: name or name@seed -> its scores.
        samples, seed: of the bootstrap.
    """
    models: dict[str, dict[Rule, Metrics]] = {}
    for rule in RULES:
        values = {}
        for name, of_model in ruled.items():
            if rule in of_model.by_rule:
                metrics = ranking_metrics(of_model.by_rule[rule])
                values[name] = np.stack([metrics[metric] for metric in METRICS], axis=1)
        for name, of_model in stacked(values).items():
            models.setdefault(name, {})[rule] = cells(METRICS, of_model.interval(samples, seed))
    return ScoringRules(models=models, chosen={name: of_model.choice for name, of_model in ruled.items()})


def rows_of(data: PreparedData, split: Split) -> Dataset:
    """The requests of a split."""
    return data.test if split == "test" else data.validation


def _scorer(model: RankingModel, reference: str | None) -> RankingModel:
    return model if reference is None else model.reference(reference)


def _parts(
    model: RankingModel,
    reference: str | None,
    rules: Sequence[Rule],
    data: PreparedData,
    split: Split,
    score: Score,
    log_probs: Scores | None = None,
) -> _Parts:
    rows = rows_of(data, split)
    requests = zip(_titles(rows), rows["user"][:], rows["timestamp"][:], strict=True)
    return _Parts(
        log_probs=score(split, None) if log_probs is None else log_probs,
        lengths=[scored_lengths(group) for group in tokenize_rows(rows, model.encode)],
        prior=[model.prior(*request) for request in requests] if "prior" in rules else None,
        reference=None if reference is None else score(split, reference),
    )


def _titles(rows: Dataset) -> list[list[str]]:
    return [[positive, *others] for positive, others in zip(rows["positive"][:], rows["negatives"][:], strict=True)]


def _weights(rule: Rule, settings: EvaluationConfig) -> Sequence[float]:
    return settings.prior_weights if rule == "prior" else (0.0,)


def _is_tuned(rules: Sequence[Rule], settings: EvaluationConfig) -> bool:
    return (settings.rule == "auto" and len(rules) > 1) or ("prior" in rules and len(settings.prior_weights) > 1)


def _mean(scores: Scores) -> float:
    return float(ranking_metrics(scores)[CHOSEN_BY].mean())


def _reference(config: RunConfig) -> str:
    return config.ranking.reference or "start"


def _finished_prompts(data: PreparedData) -> bool:
    return any(prompt is not None for prompt in data.test["prompt"][:])
