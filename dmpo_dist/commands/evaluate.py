"""Models and baselines on the same candidates of the test requests."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from rich.console import Console

from dmpo_dist.artifacts.evaluation import (
    SCORES_FILE,
    BaselineTraining,
    Evaluation,
    GeneratedFigures,
    Generation,
    OrderCheck,
)
from dmpo_dist.commands.train import template_of
from dmpo_dist.config import RunConfig
from dmpo_dist.config.evaluation import Baseline
from dmpo_dist.data.candidates import require_given_candidates, require_no_finished_prompts
from dmpo_dist.data.place import require_prepared
from dmpo_dist.data.store import PreparedData
from dmpo_dist.data.tokenization import tokenize_rows
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.baselines import (
    fitted_popularity_scores,
    item_knn_scores,
    oracle_scores,
    popularity_scores,
    random_scores,
)
from dmpo_dist.evaluation.classical import CLASSICAL, ClassicalScores, classical_scores
from dmpo_dist.evaluation.classical_environment import baseline_python
from dmpo_dist.evaluation.fitting_log import fitting_log, knows_the_future
from dmpo_dist.evaluation.generated import generated_figures
from dmpo_dist.evaluation.order import ORDERS, lists_note, order_spread
from dmpo_dist.evaluation.ranking import load_ranking_model
from dmpo_dist.evaluation.report import evaluate_scores, write_evaluation
from dmpo_dist.evaluation.seeds import by_name
from dmpo_dist.evaluation.strata import strata_of
from dmpo_dist.evaluation.tables import (
    catalogue_table,
    evaluation_table,
    generation_lines,
    order_line,
    show_comparisons,
)
from dmpo_dist.evaluation.whole_catalogue import Ranked, WholeCatalogue, require_catalogue, summary
from dmpo_dist.modeling.backbone import enforce_template, find_model
from dmpo_dist.records.progress import UserProgress

BASELINES = (*get_args(Baseline), "oracle")
Scores = dict[str, list[np.ndarray]]
"""Model -> per request a float64 array (1 + K,), the positive first."""


def preflight(
    models: dict[str, str],
    config: RunConfig,
    console: Console,
    against: Sequence[str] = (),
    catalogue: bool = False,
) -> PreparedData:
    """Check data and models in every way that needs no weights, and make the baselines' environment; returns the data.

    Raises:
        UserError: no prepared data, no test requests, a model named like a baseline, a name in ``against`` that nothing
            has, prompts that should list candidates and cannot, or not so many; see also ``template_of`` and ``baseline_python``.
    """
    data = PreparedData.load(require_prepared(config.data.path))
    if not len(data.test):
        raise UserError(f"{config.data.path} holds no test requests to evaluate on; see its card.md")
    names = by_name(models)
    for name, entries in names.items():
        if name in BASELINES:
            entry = next(iter(entries.values()))
            raise UserError(f"--model {entry}={models[entry]}: {name} is the name of a baseline; choose another name")
    known = [*_baselines(data, config), *names, *(["oracle"] if oracle_scores(data.test) else [])]
    for name in against:
        if name not in known:
            raise UserError(f"--against {name}: is not evaluated here; choose from {', '.join(known)}")
    for path in models.values():
        template = template_of(path, config)
        require_no_finished_prompts(template, data.test["prompt"], str(config.data.path))
        if catalogue:
            require_given_candidates(template, path, "leave --catalogue out")
        if template.lists_candidates:
            tokenize_rows(data.test, load_ranking_model(path, config).encode)  # raises now where a list does not fit
    check_classical(_baselines(data, config), config, console)
    return data


def check_classical(names: Sequence[str], config: RunConfig, console: Console) -> None:
    """Where one of the baselines ``names`` needs an environment of its own, look at it, or make it; raises as
    ``baseline_python`` does."""
    if set(CLASSICAL).intersection(names):
        baseline_python(config.evaluation.baseline_environment, console.print)


def evaluate(
    models: dict[str, str],
    config: RunConfig,
    folder: Path,
    console: Console,
    catalogue: bool = False,
    against: Sequence[str] = (),
) -> Evaluation:
    """Rank the test requests by every model and baseline, write the figures to ``folder`` and show the table.

    Args:
        models: name in the table, or name@seed, -> model folder or hub id.
        config: ``data.path`` says which requests.
        folder: gets evaluation.json, evaluation.md and scores.parquet.
        catalogue: also rank among the whole catalogue, under the key ``catalogue`` of evaluation.json.
        against: names that all others are compared with; none compares dmpo with all others.

    Raises:
        UserError: see ``preflight``, a model that cannot be loaded or whose scores are not finite, or baselines that
            cannot be run.
    """
    data = preflight(models, config, console, against, catalogue)
    if catalogue:
        require_catalogue(data)
    settings, seed = config.evaluation, config.seed
    scores = baseline_scores(data, config, console)
    classical = classical_baselines(data, config, catalogue, console)
    scores |= classical.candidates if classical else {}
    torch.set_num_threads(os.cpu_count() or 1)
    spreads, generated = {}, {}
    for name, path in models.items():
        found = _model_scores(name, path, data, config, console)
        scores[name] = found.scores
        spreads |= {name: found.spread} if found.spread else {}
        generated |= {name: found.generated} if found.generated else {}
    oracle = oracle_scores(data.test)
    if oracle is not None:
        scores["oracle"] = oracle
    strata = strata_of(data.test, None if data.interactions is None else fitting_log(data, "test"))
    evaluation = evaluate_scores(scores, data.test, settings.bootstrap_samples, seed, strata, against)
    evaluation.data = {"path": str(config.data.path), "fingerprint": data.fingerprint}
    evaluation.folders = models
    of_lists = _notes_of_lists(models, data, config)
    evaluation.notes = notes_of(data, config) + of_lists
    facts = classical.facts if classical else {}
    evaluation.baselines = {name: BaselineTraining.model_validate(known) for name, known in facts.items()}
    if spreads:
        again = min(settings.order_requests, len(data.test))
        evaluation.order = OrderCheck(requests=again, orders=ORDERS, models=spreads)
    if generated:
        evaluation.generation = Generation(requests=min(settings.generate, len(data.test)), models=generated)
    if catalogue:
        whole = WholeCatalogue(data)
        ranked = _rank_catalogue(whole, models, classical, config, console)
        evaluation.catalogue = summary(ranked, len(whole.items), settings.bootstrap_samples, seed)
    write_evaluation(folder, evaluation, scores, data.test)
    _show(evaluation, folder, console)
    for note in of_lists:
        console.print(f"note: {note}", highlight=False)
    return evaluation


def baseline_scores(data: PreparedData, config: RunConfig, console: Console) -> Scores:
    """The asked baselines that need no environment of their own and that the data allows; says what to know of them."""
    for note in notes_of(data, config):
        console.print(f"note: {note}", highlight=False)
    test, log = data.test, data.interactions
    names = _baselines(data, config)
    scores: Scores = {}
    if "random" in names:
        scores["random"] = random_scores(test, config.seed)
    if log is None:
        return scores
    if "popularity" in names:
        scores["popularity"] = popularity_scores(test, log)
    known = fitting_log(data, "test")
    if "pop_fitted" in names:
        scores["pop_fitted"] = fitted_popularity_scores(test, known)
    if "item_knn" in names:
        scores["item_knn"] = item_knn_scores(test, known, config.evaluation.knn_neighbours)
    return scores


def _baselines(data: PreparedData, config: RunConfig) -> list[str]:
    """The asked baselines that the data allows."""
    return [name for name in config.evaluation.baselines if name == "random" or data.interactions is not None]


def notes_of(data: PreparedData, config: RunConfig) -> list[str]:
    """What a reader of the figures must know of the baselines."""
    asked = set(config.evaluation.baselines)
    if data.interactions is None:
        left = ", ".join(name for name in config.evaluation.baselines if name != "random")
        return [f"no {left}: the data came as ready preferences, without a log"] if left else []
    fitted = [name for name in BASELINES if name in asked - {"random", "popularity"}]
    if fitted and knows_the_future(data):
        return [
            f"leave-one-out: what is fitted ({', '.join(fitted)}) knows what other users did after a request, and of its own "
            "user nothing from it on; popularity counts what came before it. Not comparable with figures of a time split"
        ]
    return []


def _notes_of_lists(models: dict[str, str], data: PreparedData, config: RunConfig) -> list[str]:
    """Where the positives stand in the prompts of models that list the candidates; nothing where none does."""
    templates = {name: enforce_template(find_model(path).stamp, config.template, path) for name, path in models.items()}
    listing = [name for name, template in templates.items() if template.lists_candidates]
    return [lists_note(listing, data.test, config.seed, config.evaluation.candidate_orders)] if listing else []


def classical_baselines(
    data: PreparedData, config: RunConfig, catalogue: bool, console: Console
) -> ClassicalScores | None:
    """The asked baselines that run in an environment of their own; None where there are none."""
    names = [name for name in _baselines(data, config) if name in CLASSICAL]
    if not names:
        return None
    return classical_scores(
        names, data, config.evaluation, config.seed, catalogue, lambda line: console.print(line, highlight=False)
    )


class _Found(NamedTuple):
    """What a model makes of the test requests.

    Attributes:
        scores: for each (1+K,); spread: how far they move with other orders, if that is asked for.
        generated: what it writes by itself, likewise.
    """

    scores: list[np.ndarray]
    spread: dict[str, Any]
    generated: GeneratedFigures | None


def _model_scores(name: str, path: str, data: PreparedData, config: RunConfig, console: Console) -> _Found:
    """Score the test requests by a model, and whatever else is asked of it while it is loaded.

    The model is gone when this returns: the next one, or the ranking of the whole catalogue, has the memory to itself.
    """
    _note_quantization(name, path, config, console)
    again, write, seed = config.evaluation.order_requests, config.evaluation.generate, config.seed
    with console.status(f"scoring {name}"):
        model = load_ranking_model(path, config)
        scores = model.score_rows(data.test)
        _require_finite(f"--model {name}={path}", scores, config.model.dtype)
        spread = order_spread(model.score_rows, data.test, scores, again, seed) if again else {}
        return _Found(scores, spread, generated_figures(model, data.test, scores, write, seed) if write else None)


def _rank_catalogue(
    whole: WholeCatalogue,
    models: dict[str, str],
    classical: ClassicalScores | None,
    config: RunConfig,
    console: Console,
) -> dict[str, Ranked]:
    ranked = whole.baselines(config.evaluation.baselines, config) | (classical.catalogue if classical else {})
    for name, path in models.items():
        with UserProgress(f"whole catalogue by {name}", whole.requests, 0, console, "loading the model") as progress:
            ranked[name] = whole.model(path, config, progress.advance)
    return ranked


def _show(evaluation: Evaluation, folder: Path, console: Console) -> None:
    content = evaluation.content()
    console.print(evaluation_table(content))
    for part in show_comparisons(content):
        console.print(part, highlight=False)
    for line in generation_lines(content):
        console.print(line, highlight=False)
    moved = order_line(content)
    if moved:
        console.print(moved, highlight=False)
    if evaluation.catalogue is not None:
        console.print(catalogue_table(content["catalogue"], evaluation.requests))
    console.print(f"written to {folder}/{Evaluation.FILE}, evaluation.md and {SCORES_FILE}", highlight=False)


def _note_quantization(name: str, path: str, config: RunConfig, console: Console) -> None:
    """Say so where a model is ranked on another base than it was trained on."""
    trained, now = find_model(path).stamp.quantization, config.model.quantization
    if trained != now:
        console.print(
            f"note: {name} was trained with model.quantization={trained} and is scored with {now}", highlight=False
        )


def _require_finite(model: str, scores: list[np.ndarray], dtype: str) -> None:
    flat = np.concatenate(scores)
    bad = ~np.isfinite(flat)
    if bad.any():
        raise UserError(
            f"{model}: {int(bad.sum())} of {len(flat)} scores are not finite, the first is {flat[bad][0]}; its training "
            f"diverged or its weights are damaged, or model.dtype={dtype} is too narrow for it: try model.dtype=float32"
        )
