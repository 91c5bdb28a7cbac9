"""Models and baselines on the same candidates of the test requests."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from rich.console import Console

from dmpo_dist.artifacts.evaluation import (
    SCORES_FILE,
    BaselineTraining,
    Evaluation,
    Generation,
    OrderCheck,
    weights_digest,
)
from dmpo_dist.commands.catalogue_parts import rank_catalogue
from dmpo_dist.commands.kept_baselines import kept_baseline_scores
from dmpo_dist.commands.model_scores import model_scores
from dmpo_dist.commands.scored_parts import on_actors, remove_parts
from dmpo_dist.commands.train import template_of
from dmpo_dist.config import RunConfig
from dmpo_dist.config.evaluation import BASELINES, SAME_USERS, EvaluationConfig
from dmpo_dist.data.candidates import require_given_candidates, require_no_finished_prompts
from dmpo_dist.data.place import require_prepared
from dmpo_dist.data.store import PreparedData, unlike_preparation
from dmpo_dist.data.template import make_template
from dmpo_dist.data.tokenization import tokenize_rows
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.baseline_scores import (
    names_of,
    notes_of,
    rows_of_baselines,
)
from dmpo_dist.evaluation.baselines import oracle_scores
from dmpo_dist.evaluation.classical import CLASSICAL
from dmpo_dist.evaluation.classical_environment import baseline_python
from dmpo_dist.evaluation.comparisons import below_start_lines, show_comparisons
from dmpo_dist.evaluation.fitting_log import fitting_log, of_same_users
from dmpo_dist.evaluation.metrics import FEWEST_USERS
from dmpo_dist.evaluation.order import ORDERS, lists_note
from dmpo_dist.evaluation.ranking import load_ranking_model, require_no_beams
from dmpo_dist.evaluation.report import evaluate_scores, write_evaluation
from dmpo_dist.evaluation.rules import (
    asks_for_rules,
    check_rules,
    rules_figures,
    with_rule,
)
from dmpo_dist.evaluation.seeds import by_name
from dmpo_dist.evaluation.sentences import generation_lines, order_line
from dmpo_dist.evaluation.starts import starts_of
from dmpo_dist.evaluation.strata import strata_of
from dmpo_dist.evaluation.tables import catalogue_table, evaluation_table, rules_table
from dmpo_dist.evaluation.whole_catalogue import Ranked, WholeCatalogue, beams_row, require_catalogue, summary
from dmpo_dist.modeling.backbone import enforce_template, find_model, load_tokenizer
from dmpo_dist.modeling.model_files import require_as_written
from dmpo_dist.tables import terminal


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
        if name in (*BASELINES, "oracle"):
            entry = next(iter(entries.values()))
            raise UserError(f"--model {entry}={models[entry]}: {name} is the name of a baseline; choose another name")
    known = [*rows_of_baselines(data, config), *names, *(["oracle"] if oracle_scores(data.test) else [])]
    for name in against:
        if name not in known:
            raise UserError(f"--against {name}: is not evaluated here; choose from {', '.join(known)}")
    _check_beams(config, data, catalogue)
    templates = {path: template_of(path, config) for path in models.values()}
    for path in templates:
        require_as_written(find_model(path))
    for path, template in templates.items():
        require_no_finished_prompts(template, data.test["prompt"], str(config.data.path))
        if catalogue:
            require_given_candidates(template, path, "leave --catalogue out")
        if template.lists_candidates:
            tokenize_rows(data.test, load_ranking_model(path, config).encode)  # raises now where a list does not fit
    if asks_for_rules(config.evaluation):
        sources = {name: find_model(path) for name, path in models.items()}
        made = {name: make_template(templates[models[name]], load_tokenizer(at)) for name, at in sources.items()}
        check_rules({name: (sources[name], made[name]) for name in models}, config, data)
    check_classical(names_of(data, config), config, console)
    return data


def _check_beams(config: RunConfig, data: PreparedData, catalogue: bool) -> None:
    """Raise UserError for beams that could not search the catalogue of ``data``, or are asked for without one."""
    widths = config.evaluation.catalogue_beams
    key = f"evaluation.catalogue_beams={widths}"
    if catalogue:
        instead = "; evaluation.catalogue_beams adds rows of beam searches"
        require_no_beams(config.ranking, "evaluate --catalogue", instead)
    if not widths:
        return
    if not catalogue:
        raise UserError(f"{key}: searches the whole catalogue; add --catalogue, or leave it out")
    corrections = [f"ranking.{name}" for name in config.ranking.corrections]
    if corrections:
        raise UserError(f"{key}: search by the summed log-prob; leave out it or {', '.join(corrections)}")
    titles = len(require_catalogue(data)[0])
    if max(widths) > titles:
        raise UserError(f"{key}: the catalogue has {titles} titles; lower it, as the exact ranking needs no beams")


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
    unused = _unused_corrections(config, catalogue) + _unused_settings(config, models)
    for note in unused + unlike_preparation(config.data, data.card):
        console.print(f"note: {note}", highlight=False)
    baselines = kept_baseline_scores(data, config, catalogue, folder, lambda line: console.print(line, highlight=False))
    scores = dict(baselines.scores)
    spreads, ruled, generated = {}, {}, {}
    with _one_ray(models, config):
        for name, path in models.items():
            found = model_scores(name, path, data, config, folder, console)
            scores[name] = found.scores
            spreads |= {name: found.spread} if found.spread else {}
            ruled |= {name: found.ruled} if found.ruled else {}
            generated |= {name: found.generated} if found.generated else {}
        oracle = oracle_scores(data.test)
        if oracle is not None:
            scores["oracle"] = oracle
        strata = strata_of(data.test, None if data.interactions is None else fitting_log(data, "test"))
        evaluation = evaluate_scores(
            scores, data.test, settings.bootstrap_samples, seed, strata, against, starts_of(models)
        )
        evaluation.data = data.about()
        evaluation.folders = models
        evaluation.weights = {n: digest for n, path in models.items() if (digest := weights_digest(Path(path)))}
        notes = _notes_of_lists(models, data, config) + _notes_of_few(data)
        evaluation.baselines = {n: BaselineTraining.model_validate(known) for n, known in baselines.details.items()}
        if spreads:
            again = min(settings.order_requests, len(data.test))
            evaluation.order = OrderCheck(requests=again, orders=ORDERS, models=spreads)
        if generated:
            evaluation.generation = Generation(requests=min(settings.generate, len(data.test)), models=generated)
        if ruled:
            evaluation.rules = rules_figures(ruled, settings.bootstrap_samples, seed)
        if catalogue:
            whole = WholeCatalogue(data, config.ranking.exclude_history)
            notes += _notes_of_repeats(whole, config)
            configs = {name: with_rule(config, ruled[name].choice if name in ruled else None) for name in models}
            ranked = {**_catalogue_baselines(whole, data, config), **baselines.catalogue}
            widths = [*([None] if settings.catalogue_exact else []), *settings.catalogue_beams]
            for name, path in models.items():
                by_width = rank_catalogue(name, path, whole, data, configs[name], widths, folder, console)
                ranked |= {name if beams is None else beams_row(name, beams): by_width[beams] for beams in widths}
            evaluation.catalogue = summary(
                ranked, len(whole.items), settings.bootstrap_samples, seed, config.ranking.exclude_history
            )
    evaluation.notes = notes_of(data, config) + notes
    write_evaluation(folder, evaluation, scores, data.test)
    remove_parts(folder)
    _show(evaluation, folder, console)
    for note in notes:
        console.print(f"note: {note}", highlight=False)
    return evaluation


def _one_ray(models: Mapping[str, str], config: RunConfig) -> AbstractContextManager[None]:
    """Ray for all ``models``, where its actors score them: each would start one of its own."""
    if not models or not on_actors(config):
        return nullcontext()
    from dmpo_dist.cluster.train import ray_session

    return ray_session(config.cluster)


def _catalogue_baselines(whole: WholeCatalogue, data: PreparedData, config: RunConfig) -> dict[str, Ranked]:
    """The baselines that need no environment of their own, fitted on all that ``evaluation.fit_on`` names."""
    names, ranked = config.evaluation.baselines, {}
    if "log" in config.evaluation.fit_on:
        ranked |= whole.baselines(names, config, data)
    if "shots" in config.evaluation.fit_on:
        fitted = [name for name in names if name != "random"]
        few = whole.baselines(fitted, config, of_same_users(data, config.data))
        ranked |= {name + SAME_USERS: of_few for name, of_few in few.items()}
    return ranked


def _unused_corrections(config: RunConfig, catalogue: bool) -> list[str]:
    """What the ``ranking`` section changes elsewhere and not here, where candidates are ranked by a rule."""
    by_rule = asks_for_rules(config.evaluation)
    names = [f"ranking.{name}" for name in config.ranking.corrections if not (name == "reference" and by_rule)]
    if not names:
        return []
    rule = f"test candidates are ranked by evaluation.rule={config.evaluation.rule}"
    only = "for the whole catalogue alone" if catalogue and not by_rule else "by other commands, not here"
    return [f"{', '.join(names)}: used {only}; {rule}"]


def _unused_settings(config: RunConfig, models: dict[str, str]) -> list[str]:
    """The keys of ``evaluation`` that differ from their defaults and that nothing in this evaluation reads."""
    settings, neutral = config.evaluation, EvaluationConfig()
    asked = set(settings.baselines)
    from_rectools = " or ".join(CLASSICAL)
    prior = "prior" in settings.rules or settings.rule == "prior" or (settings.rule == "auto" and not settings.rules)
    needs = {
        "fit_on": (bool(asked - {"random"}), "a baseline that is fitted in evaluation.baselines"),
        "knn_neighbours": ("item_knn" in asked, "item_knn in evaluation.baselines"),
        "ease_regularization": ("ease" in asked, "ease in evaluation.baselines"),
        "transformer": (bool(asked & {"sasrec", "bert4rec"}), "sasrec or bert4rec in evaluation.baselines"),
        "baseline_environment": (bool(asked & set(CLASSICAL)), f"{from_rectools} in evaluation.baselines"),
        "prior_weights": (prior, "prior in evaluation.rules"),
        "candidate_orders": (bool(_listing(models, config)), "a model whose prompts list the candidates"),
    }
    return [
        f"evaluation.{key}={getattr(settings, key)} has no effect without {what}"
        for key, (read, what) in needs.items()
        if not read and getattr(settings, key) != getattr(neutral, key)
    ]


def _listing(models: dict[str, str], config: RunConfig) -> list[str]:
    """The models whose prompts list the candidates."""
    templates = {name: enforce_template(find_model(path).stamp, config.template, path) for name, path in models.items()}
    return [name for name, template in templates.items() if template.lists_candidates]


def _notes_of_lists(models: dict[str, str], data: PreparedData, config: RunConfig) -> list[str]:
    """Where the positives stand in the prompts of models that list the candidates; nothing where none does."""
    listing = _listing(models, config)
    return [lists_note(listing, data.test, config.seed, config.evaluation.candidate_orders)] if listing else []


def _notes_of_few(data: PreparedData) -> list[str]:
    if len(data.test) >= FEWEST_USERS:
        return []
    return [
        f"{len(data.test)} test requests: their intervals say nothing, and no difference can be clear with fewer than "
        f"{FEWEST_USERS}; prepare data with more users to test on"
    ]


def _notes_of_repeats(whole: WholeCatalogue, config: RunConfig) -> list[str]:
    if not whole.repeated or not config.ranking.exclude_history:
        return []
    return [
        f"whole catalogue: the users of {whole.repeated} of {whole.requests} test requests took the positive before, "
        "while all else that they took is left out, so a model that only repeats does well; "
        "ranking.exclude_history=false ranks among all titles"
    ]


def _show(evaluation: Evaluation, folder: Path, console: Console) -> None:
    content = evaluation.content()
    console.print(evaluation_table(content))
    for part in show_comparisons(content):
        console.print(part, highlight=False)
    if evaluation.rules is not None:
        console.print(terminal(rules_table(content)))
    for line in generation_lines(content):
        console.print(line, highlight=False)
    for line in below_start_lines(content):
        console.print(f"warning: {line}", highlight=False)
    moved = order_line(content)
    if moved:
        console.print(moved, highlight=False)
    if evaluation.catalogue is not None:
        console.print(catalogue_table(content["catalogue"], evaluation.requests))
    console.print(f"written to {folder}/{Evaluation.FILE}, evaluation.md and {SCORES_FILE}", highlight=False)
