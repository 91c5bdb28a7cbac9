"""The sections of a page about single users: one model against another user by user, and a few ranked lists."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dmpo_dist.artifacts.evaluation import Evaluation
from dmpo_dist.config.evaluation import BASELINES
from dmpo_dist.data.store import PreparedData
from dmpo_dist.errors import UserError
from dmpo_dist.figures.style import GREY
from dmpo_dist.figures.users import rank_changes_drawing
from dmpo_dist.formats import joined
from dmpo_dist.report.blocks import Block, heading
from dmpo_dist.report.colours import page_looks
from dmpo_dist.report.gather import Material
from dmpo_dist.report.scores import (
    RankedRequest,
    compared_models,
    ranked_requests,
    scored_models,
    spread_over,
    target_ranks,
)
from dmpo_dist.tables import Cell, Table

USERS, SHOWN = 6, 2  # lists of so many users, of which so many are open
TOP = 10
CHANGES_NOTE = "Each user's target among the same candidates; ties count as the middle of their ranks."

Histories = Mapping[tuple[str, int], list[str]]
"""User and timestamp of a request -> titles, oldest first."""


def user_by_user(material: Material) -> Iterator[Block]:
    """For whom the model that the page is about is better than SFT continued and SFT, and for whom it is worse."""
    looks = page_looks(material).models
    for name, (_, folder, models) in _scored(material).items():
        subject, *others = models
        others = [other for other in others if other not in BASELINES]
        ranks = {model: target_ranks(folder, models[model]) for model in [subject, *others]} if others else {}
        colours = {model: looks[model].colour if model in looks else GREY for model in ranks}
        drawings = [
            rank_changes_drawing(
                (models[subject], models[other]), (ranks[subject], ranks[other]), (colours[subject], colours[other])
            )
            for other in others
        ]
        if drawings:
            yield from heading(name, material.evaluations)
            yield Block("figures", drawings)
            yield Block("note", CHANGES_NOTE)


def ranked_lists(material: Material) -> Iterator[Block]:
    """The lists of a few users by several models, the target marked; nothing where single users are not to be shown."""
    if not material.single_users:
        return
    for name, (evaluation, folder, models) in _scored(material).items():
        requests = spread_over(target_ranks(folder, next(iter(models.values()))), USERS)
        lists = ranked_requests(folder, models, requests)
        histories, missing = _histories(evaluation)
        yield from heading(name, material.evaluations)
        yield Block(
            "note",
            f"{len(lists)} users, from the one whose target stands best by {next(iter(models))} to the one whose "
            f"stands worst, at equal distances; their first {TOP} candidates by each model. {missing}".strip(),
        )
        blocks = [block for request in lists for block in _of_user(request, histories)]
        per_user = len(blocks) // max(1, len(lists))
        yield from blocks[: SHOWN * per_user]
        if blocks[SHOWN * per_user :]:
            yield Block("folded", blocks[SHOWN * per_user :], f"{len(lists) - SHOWN} more users")


def _scored(material: Material) -> dict[str, tuple[Evaluation, Path, dict[str, str]]]:
    """Name of an evaluation that has scores -> the evaluation, its folder and the models to look at."""
    found = {}
    for name, evaluation in material.evaluations.items():
        folder = material.evaluation_folders[name]
        models = compared_models(evaluation, scored_models(folder))
        if models:
            found[name] = (evaluation, folder, models)
    return found


def _of_user(request: RankedRequest, histories: Histories) -> list[Block]:
    """A heading with the user, where the target stands, and the lists side by side."""
    first = next(iter(request.lists.values()))
    ranks = joined([f"{of_model.target + 1} by {model}" for model, of_model in request.lists.items()])
    lines = [f"Took {first.titles[first.target]}: of {len(first.titles)} candidates at rank {ranks}."]
    history = histories.get((request.user, request.timestamp))
    if history:
        lines.append(f"History, oldest first: {'; '.join(history)}")
    rows = [
        [Cell(str(rank + 1)), *(_title(of_model.titles, rank, of_model.target) for of_model in request.lists.values())]
        for rank in range(min(TOP, len(first.titles)))
    ]
    caption = f"The first {len(rows)} of user {request.user}"
    table = Table(caption, ["rank", *request.lists], rows, text_columns=1 + len(request.lists))
    return [Block("heading", f"User {request.user}"), Block("lines", lines), Block("table", table)]


def _title(titles: Sequence[str], rank: int, target: int) -> Cell:
    return Cell(titles[rank], "the target" if rank == target else "", "target" if rank == target else "title")


def _histories(evaluation: Evaluation) -> tuple[Histories, str]:
    """The histories of the test requests where the data is still there, and else a sentence that they are missing."""
    path, fingerprint = evaluation.data.get("path"), evaluation.data.get("fingerprint")
    if path is None or not Path(str(path)).is_dir():
        return {}, "Their histories are in the prepared data, which is not where it was."
    try:
        data = PreparedData.load(Path(str(path)))
    except UserError:
        return {}, "Their histories are missing: the prepared data cannot be read."
    if data.fingerprint != fingerprint:
        return {}, "Their histories are missing: the prepared data is another one by now."
    rows = data.test
    return dict(zip(zip(rows["user"][:], rows["timestamp"][:], strict=True), rows["history"][:], strict=True)), ""
