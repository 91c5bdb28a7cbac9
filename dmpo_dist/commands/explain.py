"""`dmpo explain`: why a title is at its rank for a user, and whether such explanations hold."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from dmpo_dist.artifacts.explanations import Explanations
from dmpo_dist.artifacts.files import write_json
from dmpo_dist.config import RunConfig
from dmpo_dist.data.candidates import require_given_candidates
from dmpo_dist.data.matching import TAKEN_AS_TITLES, matched
from dmpo_dist.data.requests import Catalogue, RankingRequest, check_against, read_catalogue, read_requests
from dmpo_dist.data.store import PreparedData
from dmpo_dist.data.tokenization import check_titles
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.inputs import given_texts
from dmpo_dist.evaluation.ranking import ranking_notes, require_no_beams
from dmpo_dist.evaluation.whole_catalogue import catalogue_at_test
from dmpo_dist.explanation.contributions import Method, leave_one_out
from dmpo_dist.explanation.counterfactual import CUTOFFS
from dmpo_dist.explanation.explainer import USUAL_RIVALS, Explainer, Subject
from dmpo_dist.explanation.faithfulness import delete, summarise
from dmpo_dist.explanation.questions import (
    Question,
    asked,
    indices_of_user,
    questions_of_data,
    questions_of_requests,
    sampled,
)
from dmpo_dist.explanation.references import choose_reference
from dmpo_dist.explanation.view import show, show_faithfulness, to_json
from dmpo_dist.modeling.backbone import (
    ModelSource,
    enforce_template,
    find_model,
    load_tokenizer,
    with_length_of,
)
from dmpo_dist.records.progress import UserProgress

FAITHFULNESS_FILE = "explain_faithfulness.json"
FAITHFULNESS_PLOT = "explain_faithfulness.png"
RANDOM_ORDERS = 5
"""Random orders of each history that the order of contributions is held against."""
VALUE_NAMES = {"margin": "margin over the other candidates", "log_prob": "log-probability"}


@dataclass(frozen=True)
class Order:
    """What to explain, as the command line says it.

    Attributes:
        model: model folder or hub id.
        user, item: one user, and a title or item id; None for the test positive, or in a file for the title ranked
            first.
        users: instead, a sample of so many.
        requests: file of users as ``dmpo rank`` takes it; None for the test requests of ``data.path``.
        catalogue: rank among its titles; None for each request's own candidates.
        reference: ``base``, ``start``, ``none``, a model folder or hub id; None takes what the model says of itself.
        method: see ``title_values``.
        rivals: see ``Explainer``.
        top, budget: see ``Explainer.answer``.
        faithfulness: of how many users to measure it; 0 for none.
        output: folder for the files; None for the terminal alone.
    """

    model: str
    user: str | None
    item: str | None
    users: int | None
    requests: Path | None
    catalogue: Path | None
    reference: str | None
    method: Method
    rivals: int | None
    top: int | None
    budget: int | None
    faithfulness: int
    output: Path | None


def explain(order: Order, config: RunConfig, console: Console) -> Explanations:
    """Explain what ``order`` asks for on ``console`` and, where it names a folder, in files.

    Raises:
        UserError: a contradiction in the order, unknown users or items, a model or reference that cannot be used.
    """
    _check(order)
    require_no_beams(config.ranking, "dmpo explain")
    source = find_model(order.model)
    config = with_length_of([source], config)
    template = enforce_template(source.stamp, config.template, order.model)
    if order.catalogue is not None:
        require_given_candidates(template, order.model, "leave --catalogue out")
    reference, note = choose_reference(source, order.reference, config)
    chosen, measured, catalogue = _questions(order, config, source, console)
    _check_top(order.top, chosen)
    given = given_texts(template, order.catalogue, order.requests)
    explainer = Explainer(order.model, config, reference, catalogue, order.method, order.rivals, given)
    with console.status("loading the model"):
        explainer.load([*chosen, *measured])
    _check_rivals(order, explainer.whole_catalogue)
    for note in ranking_notes(order.model, config):
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    if note:
        console.print(note, highlight=False, markup=False)
    requests = _explained(order, explainer, chosen, console)
    for entry in requests:
        show(entry, reference, order.method, console)
    faithfulness = _measured(order, explainer, measured, config, console) if measured else None
    found = Explanations(
        model=order.model, reference=reference, method=order.method, requests=requests, faithfulness=faithfulness
    )
    if order.output is not None:
        _write(order.output, found, console)
    return found


def _check(order: Order) -> None:
    if order.user is not None and order.users is not None:
        raise UserError(f"--user {order.user} and --users {order.users}: give one user by name, or how many to sample")
    if order.item is not None and order.user is None:
        raise UserError(f"--item {order.item!r}: say for whom with --user")
    if order.user is None and order.users is None and not order.faithfulness:
        raise UserError("say whom to explain: --user NAME, --users N for a sample, or --faithfulness to measure alone")
    if order.faithfulness and order.output is None:
        raise UserError("--faithfulness writes a table and a picture: give --output a folder for them")
    if order.output is None:
        return
    if order.output.exists() and not order.output.is_dir():
        raise UserError(f"--output {order.output}: is a file; give a folder")
    if (order.output / Explanations.FILE).exists():  # written last
        raise UserError(
            f"--output {order.output}: holds {Explanations.FILE} already, which is kept; choose another folder"
        )


def _questions(
    order: Order, config: RunConfig, source: ModelSource, console: Console
) -> tuple[list[Question], list[Question], Catalogue | None]:
    """What is answered one by one, what faithfulness is measured on, and the catalogue if one is in use."""
    if order.requests is not None:
        return _questions_of_file(order, order.requests, config, source, console)
    if config.data.path is None:
        raise UserError("say what to explain: data.path=FOLDER of `dmpo data prepare`, or --requests FILE")
    data = PreparedData.load(config.data.path)
    catalogue = _catalogue_beside(data, order.catalogue) if order.catalogue else None
    chosen, measured = _indices(order, data.test["user"][:], f"the test requests in {data.path}", config.seed)
    exclude = config.ranking.exclude_history
    answered = questions_of_data(data, chosen, catalogue, exclude)
    if order.item is not None and data.items is not None:
        titles = dict(zip(data.items["item"], data.items["title"], strict=True))
        answered = [asked(question, order.item, titles) for question in answered]
    if catalogue is None and config.ranking.popularity_weight:
        return answered, questions_of_data(data, measured, None), catalogue_at_test(data)
    return answered, questions_of_data(data, measured, catalogue, exclude), catalogue


def _catalogue_beside(data: PreparedData, path: Path) -> Catalogue:
    """The catalogue in ``path``; where that is ``data``, whose test is explained, popularity ends before the test."""
    return catalogue_at_test(data) if path.resolve() == data.path.resolve() else read_catalogue(path)


def _questions_of_file(
    order: Order, file: Path, config: RunConfig, source: ModelSource, console: Console
) -> tuple[list[Question], list[Question], Catalogue | None]:
    """The same for requests as `dmpo rank` takes them, with its checks."""
    requests = read_requests(file)
    whole, weight = requests[0].candidates is None, config.ranking.popularity_weight
    if whole:
        template = enforce_template(source.stamp, config.template, order.model)
        require_given_candidates(template, order.model, f"give each user of {file} a column 'candidates'")
    if order.catalogue and not whole and not weight:
        raise UserError(f"--catalogue {order.catalogue}: {file} has candidates of its own; leave out one of the two")
    beside = order.catalogue or config.data.path
    catalogue = None
    if beside and (whole or weight or order.catalogue or PreparedData.load(beside).items is not None):
        catalogue = read_catalogue(beside)
    exclude = config.ranking.exclude_history
    names = {}
    if catalogue is not None:
        requests = matched(requests, catalogue, str(file), keep_unknown=True)
        check_against(requests, catalogue, file, exclude, keep_unknown=not (whole or weight))
        names = dict(zip(catalogue.ids or (), catalogue.titles, strict=False))
    _note_unknown(requests, catalogue, console)
    known = set(catalogue.titles if catalogue else ())
    known = known.union(*(request.history + (request.candidates or ()) for request in requests))
    check_titles(sorted(known), load_tokenizer(source))
    chosen, measured = _indices(order, [request.user for request in requests], str(file), config.seed)
    answered = questions_of_requests([requests[i] for i in chosen], catalogue, exclude)
    if order.item is not None:
        answered = [asked(question, order.item, {title: title for title in known} | names) for question in answered]
    return answered, questions_of_requests([requests[i] for i in measured], catalogue, exclude), catalogue


def _note_unknown(requests: Sequence[RankingRequest], catalogue: Catalogue | None, console: Console) -> None:
    """Say which names are taken as titles because no catalogue knows them."""
    if catalogue is None:
        note = f"{TAKEN_AS_TITLES}; give --catalogue or data.path to look ids up"
    else:
        held = set(catalogue.titles)
        named = [title for request in requests for title in (*request.history, *(request.candidates or ()))]
        unknown = list(dict.fromkeys(title for title in named if title not in held))
        few = ", ".join(repr(title) for title in unknown[:5])
        what = f"{len(unknown)} names are not in the catalogue, such as {few}, and are taken as titles as they stand"
        note = f"{what}; correct those that are mistyped" if unknown else ""
    if note:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)


def _indices(order: Order, users: list[str], where: str, seed: int) -> tuple[list[int], list[int]]:
    """Which of the requests, one for each of ``users``, are answered and which are measured."""
    if not users:
        raise UserError(f"{where}: there are none to explain; see its card.md, or give --requests")
    if order.user is not None:
        chosen = indices_of_user(order.user, users, where)
    else:
        chosen = sampled(order.users or 0, len(users), seed)
    return chosen, sampled(order.faithfulness, len(users), seed)


def _check_top(top: int | None, questions: list[Question]) -> None:
    for question in questions:
        if top is not None and top >= len(question.candidates):
            raise UserError(
                f"--top {top}: user {question.user!r} has {len(question.candidates)} candidates, so every title is "
                "always among the first; give a smaller one"
            )


def _check_rivals(order: Order, whole_catalogue: bool) -> None:
    """Rivals are of a whole catalogue alone, and must be enough for a title to be seen to leave the top n."""
    if not whole_catalogue:
        if order.rivals:
            raise UserError(
                f"--rivals {order.rivals}: has no effect here, as all candidates fit in a row of "
                "evaluation.token_budget and are compared; leave it out"
            )
        return
    rivals, top = USUAL_RIVALS if order.rivals is None else order.rivals, order.top or max(CUTOFFS)
    if 0 < rivals < top:
        raise UserError(
            f"--rivals {rivals}: with so few a title may not be seen to leave the top {top}; give {top} or more, 0 for "
            "all, or a smaller --top"
        )


def _explained(order: Order, explainer: Explainer, questions: list[Question], console: Console) -> list[dict[str, Any]]:
    subjects = _subjects(explainer, questions, console)
    pairs = list(zip(subjects, explainer.words(subjects), strict=True))
    answers = (explainer.answer(subject, words, order.top, order.budget) for subject, words in pairs)
    return [to_json(answer) for answer in _with_bar(answers, "explaining", len(pairs), console)]


def _subjects(explainer: Explainer, questions: list[Question], console: Console) -> list[Subject]:
    """Each question about its title; of a whole catalogue this ranks all titles, which takes a while."""
    made = map(explainer.subject, questions)
    return list(_with_bar(made, "ranking", len(questions), console) if explainer.whole_catalogue else made)


def _measured(
    order: Order, explainer: Explainer, questions: list[Question], config: RunConfig, console: Console
) -> dict[str, Any]:
    """Deletion curves over ``questions``, shown and ready for JSON."""
    subjects = _subjects(explainer, questions, console)
    enough = [subject for subject in subjects if len(subject.history) > 1]
    if len(enough) < 2:
        raise UserError(
            f"--faithfulness: {len(enough)} of {len(subjects)} requests have a history of two items or more, and an "
            "interval needs several users; give more requests, and leave --user out"
        )

    def deletion(index: int, subject: Subject) -> Any:
        values = subject.outcomes.values
        rng = np.random.default_rng([config.seed, index])
        contributions = leave_one_out(values, len(subject.history))
        return delete(subject.question.user, values, contributions, RANDOM_ORDERS, rng)

    curves = (deletion(index, subject) for index, subject in enumerate(enough))
    deletions = list(_with_bar(curves, "taking history items away", len(enough), console))
    result = {
        "value": VALUE_NAMES[order.method],
        "left_out": len(subjects) - len(enough),
        **summarise(deletions, config.evaluation.bootstrap_samples, config.seed),
    }
    show_faithfulness(result, console)
    return result


def _with_bar(work: Iterable[Any], title: str, total: int, console: Console) -> Iterator[Any]:
    """``work`` with a bar on a terminal, elsewhere with a line now and then."""
    if not total:
        return
    with UserProgress(title, total, 0, console, f"{total} request{'s' * (total > 1)}") as progress:
        for one in work:
            progress.advance(1)
            yield one


def _write(folder: Path, found: Explanations, console: Console) -> None:
    from dmpo_dist.figures.explanations import plot_faithfulness

    folder.mkdir(parents=True, exist_ok=True)
    written = [Explanations.FILE]
    if found.faithfulness is not None:
        measured = found.faithfulness.content()
        write_json(folder / FAITHFULNESS_FILE, measured)
        plot_faithfulness(measured, folder / FAITHFULNESS_PLOT)
        written += [FAITHFULNESS_FILE, FAITHFULNESS_PLOT]
    found.write(folder)
    console.print(f"written to {folder}: {', '.join(written)}", highlight=False)
