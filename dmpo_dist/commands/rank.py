"""`dmpo rank`: titles ranked for a file of users, in parallel over Ray actors, in parts that survive an interruption.

Beside the output lies a folder ``OUTPUT.parts`` while the work goes on: ``key.json`` says what the ranking depends on,
and each finished part of the users is a Parquet file that appears whole. Ray starts a lost actor again and repeats the
part it was at; a rerun of the command after the driver was lost goes on with the parts that are missing.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

from dmpo_dist import __version__
from dmpo_dist.artifacts.files import whole_file
from dmpo_dist.artifacts.parts import PartFolder
from dmpo_dist.commands.ranked_files import SCHEMA, WRITERS, with_ids
from dmpo_dist.commands.scored_parts import on_actors
from dmpo_dist.config import RunConfig
from dmpo_dist.data.candidates import require_given_candidates
from dmpo_dist.data.matching import TAKEN_AS_TITLES, matched, requests_of_data, with_taken_by_id
from dmpo_dist.data.place import require_prepared
from dmpo_dist.data.requests import Catalogue, RankingRequest, check_against, read_catalogue, read_requests
from dmpo_dist.data.store import PreparedData
from dmpo_dist.data.template import make_template
from dmpo_dist.data.tokenization import check_titles
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.inputs import for_workers, given_texts
from dmpo_dist.evaluation.ranking import (
    GivenTexts,
    Ranker,
    check_beams,
    load_ranking_model,
    ranking_notes,
    reference_of,
    require_no_beams,
)
from dmpo_dist.modeling.backbone import (
    ModelSource,
    enforce_template,
    find_model,
    load_tokenizer,
    read_model_config,
    with_length_of,
)
from dmpo_dist.modeling.model_files import start_digests
from dmpo_dist.modeling.scoring_rule import require_prior
from dmpo_dist.records.progress import UserProgress


@dataclass(frozen=True)
class RankJob:
    """A checked order: what every worker needs, and where the result goes."""

    model: str
    config: RunConfig
    requests: list[RankingRequest]
    catalogue: Catalogue | None
    top: int
    output: Path
    key: dict[str, Any]
    given: GivenTexts | None = None

    @property
    def parts(self) -> list[list[RankingRequest]]:
        size = self.config.ranking.users_per_part
        return [self.requests[start : start + size] for start in range(0, len(self.requests), size)]


ALL_USERS = "all"


@dataclass(frozen=True)
class Asked:
    """For whom to rank, and among what.

    Attributes:
        requests: see ``data.requests.read_requests``; None for ``users``.
        users: of the prepared data in ``data.path``, with commas between, or ``all``.
        catalogue: see ``data.requests.read_catalogue``; None takes ``data.path``.
        keep_unknown: histories and candidates may hold titles that the catalogue does not have.
    """

    requests: Path | None
    users: str | None
    catalogue: Path | None
    keep_unknown: bool = False


def rank(model: str, asked: Asked, top: int, output: Path, config: RunConfig, console: Console) -> None:
    """Rank titles for users and write a row for each to ``output``, in their order.

    Args:
        model: model folder or hub id.
        top: how many titles to keep for each user.
        output: Parquet or JSON lines with user, titles (best first), scores and, where the catalogue has them, item
            ids; or CSV with a row for each title. It must not exist yet.
        config: gives template, model, evaluation, ranking and cluster settings.
        console: where to show progress.

    Raises:
        UserError: anything about files, model or options, or workers that keep failing; finished parts stay.
    """
    source = find_model(model)
    job = preflight(model, asked, top, output, with_length_of([source], config))
    for note in ranking_notes(model, job.config):
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    store = PartFolder(output.with_name(output.name + ".parts"), job.key, SCHEMA, "choose another --output")
    missing = [number for number in range(len(job.parts)) if not store.has(number)]
    if len(missing) < len(job.parts):
        console.print(f"{len(job.parts) - len(missing)} of {len(job.parts)} parts are done already", highlight=False)
    if job.catalogue is None:
        console.print(
            f"note: {TAKEN_AS_TITLES}; give --catalogue or data.path to look ids up and to have unknown titles refused",
            highlight=False,
            soft_wrap=True,
        )
    if missing:
        _rank_parts(job, store, missing, console)
    _join(store, len(job.parts), [request.user for request in job.requests], job.catalogue, output)
    console.print(f"written: {output}, {len(job.requests)} users", highlight=False)


def _rank_parts(job: RankJob, store: PartFolder, missing: list[int], console: Console) -> None:
    """Rank the parts ``missing``, on actors or here, and store each as it is finished."""
    from dmpo_dist.cluster.actors import map_over_actors
    from dmpo_dist.cluster.train import ray_session

    here = not on_actors(job.config)
    cluster, parts = job.config.cluster, job.parts
    arguments = (*for_workers(job.model, job.config), job.catalogue, job.top, job.given)
    done = len(job.requests) - sum(len(parts[number]) for number in missing)
    notes: set[str] = set()
    tasks = [(number, parts[number]) for number in missing]
    session = nullcontext() if here else ray_session(cluster)
    with session, UserProgress("rank", len(job.requests), done, console) as progress:
        ranked = map(PartRanker(*arguments), tasks) if here else map_over_actors(cluster, PartRanker, arguments, tasks)
        for number, rows, note in ranked:
            if note and note not in notes:
                notes.add(note)
                console.print(f"note: {note}", highlight=False, markup=False)
            store.write(number, rows)
            progress.advance(len(rows))


def preflight(model: str, asked: Asked, top: int, output: Path, config: RunConfig) -> RankJob:
    """Check everything that needs no weights, and digest what the result depends on.

    Raises:
        UserError: see ``rank``.
    """
    if output.exists():
        raise UserError(f"--output {output}: exists already and is kept; remove it or choose another name")
    if output.suffix.lower() not in WRITERS:
        raise UserError(f"--output {output}: end its name with {', '.join(WRITERS)}, which says how it is written")
    if not output.resolve().parent.is_dir():
        raise UserError(f"--output {output}: its folder does not exist; make it first")
    source = find_model(model)
    read_model_config(source.base, config.model.max_length)
    template = enforce_template(source.stamp, config.template, model)
    reference = reference_of(source, config.ranking.reference)
    requests, where = _requests(asked, config)
    if requests[0].candidates is None:
        require_given_candidates(template, model, f"give each user of {where} a column 'candidates'")
    else:
        require_no_beams(config.ranking, f"{where} gives candidates, which dmpo rank")
    catalogue = _catalogue(requests, where, asked.catalogue, config)
    if catalogue is not None:
        check_beams(config.ranking, len(catalogue.titles), top)
        if asked.users is None:
            requests = matched(requests, catalogue, str(where), asked.keep_unknown)
        else:
            requests = with_taken_by_id(requests, catalogue)
        check_against(requests, catalogue, where, config.ranking.exclude_history, asked.keep_unknown)
    given = given_texts(template, asked.catalogue, asked.requests)
    tokenizer = load_tokenizer(source)
    if config.ranking.prior_weight:
        require_prior(make_template(template, tokenizer), model)
    titles = {title for request in requests for title in (*request.history, *(request.candidates or ()))}
    check_titles(sorted(titles.union(catalogue.titles if catalogue else ())), tokenizer)
    if template.lists_candidates:
        listing = load_ranking_model(model, config, given)
        for request in requests:  # raises now, rather than in a worker, where a list does not fit
            listing.token_group(request.history, request.candidates or (), request.user)
    key = {
        "dmpo": __version__,
        "--model": model_digest(source),
        "ranking.reference": model_digest(find_model(reference)) if reference else None,
        "--requests": _sha256(requests),
        "--catalogue": _sha256(
            (catalogue.titles, None if catalogue.counts is None else catalogue.counts.tolist(), catalogue.ids)
        )
        if catalogue
        else None,
        "--top": top,
        **_options(config, template.lists_candidates),
    }
    if template.item_fields or template.user_fields:
        texts = load_ranking_model(model, config, given).encode.texts
        for request in requests:  # names a missing field now, rather than in a worker
            texts.of_items(request.history)
            texts.of_user(request.user)
        key["texts"] = _sha256([texts.items, texts.users])
    return RankJob(model, config, requests, catalogue, top, output, key, given)


def _requests(asked: Asked, config: RunConfig) -> tuple[list[RankingRequest], Path]:
    """For whom to rank, and the file or folder that says so."""
    if (asked.requests is None) == (asked.users is None):
        raise UserError("say for whom to rank: a file by --requests, or --users of the prepared data in data.path")
    if asked.requests is not None:
        return read_requests(asked.requests), asked.requests
    path = require_prepared(config.data.path)
    users = None if asked.users == ALL_USERS else [name.strip() for name in (asked.users or "").split(",")]
    return requests_of_data(PreparedData.load(path), users), path


def _catalogue(
    requests: Sequence[RankingRequest], requests_file: Path, catalogue_file: Path | None, config: RunConfig
) -> Catalogue | None:
    whole = requests[0].candidates is None
    weight = config.ranking.popularity_weight
    path = catalogue_file or config.data.path
    if path is None or (path == config.data.path and not (whole or weight) and PreparedData.load(path).items is None):
        if whole:
            raise UserError(
                f"{requests_file} has no column 'candidates', so the whole catalogue would be ranked: give --catalogue "
                "a file with a column title, or the folder of the prepared data"
            )
        if weight:
            raise UserError(f"ranking.popularity_weight={weight:g} needs --catalogue with a column popularity")
        return None
    catalogue = read_catalogue(path)
    if weight and catalogue.counts is None:
        raise UserError(
            f"ranking.popularity_weight={weight:g}: {path} does not say how often titles were taken; add a column "
            "popularity"
        )
    return catalogue


def _options(config: RunConfig, lists_candidates: bool) -> dict[str, Any]:
    """Every setting that could change a figure or the parts, by its key."""
    sections = {
        "ranking": config.ranking.model_dump(mode="json", exclude={"reference"}),
        "template": config.template.model_dump(mode="json", exclude=None if lists_candidates else {"candidate"}),
        "model": config.model.model_dump(
            mode="json", include={"dtype", "quantization", "double_quantization", "attention", "max_length"}
        ),
        "evaluation": {"token_budget": config.evaluation.token_budget},
    }
    options = {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}
    if lists_candidates:
        options |= {"seed": config.seed, "evaluation.candidate_orders": config.evaluation.candidate_orders}
    return options


def model_digest(source: ModelSource) -> str:
    """sha256 over the digests of a model's files and its base's, and its ``dmpo.json``.

    Raises:
        UserError: they are not here, or not what training wrote.
    """
    files = start_digests(source)
    if not any(name.startswith("base/") for name in files):
        raise UserError(
            f"{source.path}: its files are not on this machine; download it and give the folder, so that a rerun can "
            "tell whether it is the same model"
        )
    return _sha256([files, source.stamp.content()])


def _sha256(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=vars)
    return hashlib.sha256(text.encode()).hexdigest()


def _join(parts: PartFolder, count: int, users: list[str], catalogue: Catalogue | None, output: Path) -> None:
    """Make ``output`` out of ``count`` parts, with the item ids of ``catalogue``, and remove them.

    Raises:
        UserError: the parts do not hold each of ``users`` once, in order.
    """
    written: list[str] = []

    def tables() -> Iterator[pa.Table]:
        for number in range(count):
            table = parts.read(number)
            assert table is not None
            written.extend(table["user"].to_pylist())
            yield with_ids(table, catalogue)

    with whole_file(output) as whole:
        WRITERS[output.suffix.lower()](whole, tables())
        if written != users:
            raise UserError(f"{parts.folder}: its parts do not hold each user once; remove the folder and run again")
    parts.remove()


class PartRanker:
    """What an actor does, or this process for one worker: ranks the users of one part after the other.

    Args:
        model, config, catalogue, top, given: see ``Ranker``.
    """

    def __init__(
        self, model: str, config: RunConfig, catalogue: Catalogue | None, top: int, given: GivenTexts | None
    ) -> None:
        self._ranker = Ranker(model, config, catalogue, top, given)

    def __call__(self, part: tuple[int, list[RankingRequest]]) -> tuple[int, list[dict[str, Any]], str | None]:
        """(part, its rows, what to tell the user of how they were scored)."""
        number, requests = part
        rows = [vars(self._ranker(request)) for request in requests]
        return number, rows, self._ranker.note
