"""`dmpo recommend`: the best titles for one user, at the terminal."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dmpo_dist.config import RunConfig
from dmpo_dist.data.candidates import require_given_candidates
from dmpo_dist.data.matching import matched, requests_of_data, with_taken_by_id
from dmpo_dist.data.place import require_prepared
from dmpo_dist.data.requests import RankingRequest, check_against, read_catalogue
from dmpo_dist.data.store import PreparedData
from dmpo_dist.data.tokenization import check_titles
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.inputs import given_texts, with_trained_data
from dmpo_dist.evaluation.ranking import Ranker, check_beams, ranking_notes
from dmpo_dist.modeling.backbone import enforce_template, find_model, load_tokenizer, with_length_of
from dmpo_dist.tables import Table, terminal, texts


def recommend(
    model: str,
    history: Sequence[str],
    user: str | None,
    catalogue_file: Path | None,
    top: int,
    config: RunConfig,
    console: Console,
) -> None:
    """Print the ``top`` titles of a catalogue for a history, or for a user of prepared data.

    Args:
        model: model folder or hub id.
        history: titles or item ids, oldest first; none for ``user``.
        user: of ``data.path``.
        catalogue_file: see ``read_catalogue``; None takes ``data.path``, or without that what the model was trained on.

    Raises:
        UserError: an unknown title or user (names the nearest), no catalogue, or a model that cannot be used.
    """
    if bool(history) == (user is not None):
        raise UserError("say for whom: --history TITLE TITLE ..., oldest first, or --user NAME of the prepared data")
    source = find_model(model)
    config = with_length_of([source], with_trained_data(config, Path(source.path)))
    template = enforce_template(source.stamp, config.template, model)
    require_given_candidates(template, model, "use dmpo rank with a column 'candidates'")
    catalogue = read_catalogue(catalogue_file or _data_path(config))
    check_beams(config.ranking, len(catalogue.titles), top)
    requests = [RankingRequest("you", tuple(history), None)]
    if user is not None:
        requests = with_taken_by_id(requests_of_data(PreparedData.load(_data_path(config)), [user]), catalogue)
    else:
        requests = matched(requests, catalogue, "--history", advice="correct them")
    (request,) = requests
    check_against([request], catalogue, Path("--history"), config.ranking.exclude_history)
    check_titles([*request.history, *catalogue.titles], load_tokenizer(source))
    for note in ranking_notes(model, config):
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    with console.status("ranking"):
        ranker = Ranker(model, config, catalogue, top, given_texts(template, catalogue_file, None))
        ranked = ranker(request)
    if ranker.note:
        console.print(f"note: {ranker.note}", highlight=False, markup=False, soft_wrap=True)
    ids = dict(zip(catalogue.titles, catalogue.ids or [""] * len(catalogue.titles), strict=True))
    pairs = zip(ranked.titles, ranked.scores, strict=True)
    rows = [[title, ids[title], place, f"{score:.3f}"] for place, (title, score) in enumerate(pairs, start=1)]
    console.print(f"after {', '.join(request.history)}:", highlight=False, markup=False, soft_wrap=True)
    console.print(terminal(Table("", ["title", "id", "rank", "score"], texts(rows), text_columns=2)))


def _data_path(config: RunConfig) -> Path:
    if config.data.path is None:
        raise UserError("say what to choose from: --catalogue FILE with a column title, or data.path=PREPARED_DATA")
    return require_prepared(config.data.path)
