"""The test requests ranked among the whole catalogue by a model: in parts, here or by Ray actors.

As in ``scored_parts.py`` an interruption costs one part, and what is found does not depend on who finds it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

from dmpo_dist import __version__
from dmpo_dist.artifacts.digest import json_digest
from dmpo_dist.artifacts.parts import PartFolder
from dmpo_dist.commands.scored_parts import PARTS, on_actors
from dmpo_dist.config import RunConfig
from dmpo_dist.data.store import PreparedData
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.inputs import for_workers
from dmpo_dist.evaluation.ranking import Ranker, reference_of
from dmpo_dist.evaluation.whole_catalogue import BEST, Ranked, WholeCatalogue, catalogue_at_test
from dmpo_dist.modeling.backbone import enforce_template, find_model
from dmpo_dist.modeling.model_files import weights_key
from dmpo_dist.modeling.trie_search import Beam
from dmpo_dist.records.progress import UserProgress

SCHEMA = pa.schema([("request", pa.int64()), ("titles", pa.list_(pa.int64())), ("scores", pa.list_(pa.float64()))])
PER_PART = 8
"""Requests of a part at most: an exact ranking of a large catalogue may take minutes each."""
Width = int | None
"""Of a beam search; None for the exact ranking."""
Task = tuple[Width, int, range]
"""Width, number of the part, and its requests."""
Rows = list[dict[str, Any]]


class CatalogueRanker:
    """What ranks parts: a model under ``config.ranking``, and the catalogue of the data in the folder ``data``."""

    def __init__(self, path: str, config: RunConfig, data: Path) -> None:
        prepared = PreparedData.load(data)
        self._whole = WholeCatalogue(prepared, config.ranking.exclude_history)
        self._ranker = Ranker(path, config, catalogue_at_test(prepared), top=1)

    def __call__(self, task: Task) -> tuple[Task, Rows, str | None]:
        """The task, its rows, and what to tell the user of how they were scored."""
        rows = list(self.rows(task))
        return task, rows, self._ranker.note

    def rows(self, task: Task) -> Iterator[dict[str, Any]]:
        """The best titles of each request of ``task``."""
        width, _, requests = task
        for index in requests:
            found = self._ranker.best(*self._whole.request(index), BEST, width)
            scores = [float(beam.log_prob) for beam in found]
            yield {"request": index, "titles": [int(beam.title) for beam in found], "scores": scores}


def rank_catalogue(
    name: str, path: str, whole: WholeCatalogue, data: PreparedData, config: RunConfig, widths: Sequence[Width],
    folder: Path, console: Console,
) -> dict[Width, Ranked]:  # fmt: skip
    """The ranking of each of ``widths`` by the model in ``path``, called ``name``, under ``config.ranking``.

    Args:
        whole: of ``data``.
        folder: parts lie below ``PARTS`` there; those that are there are not ranked again.

    Raises:
        UserError: a model that cannot be used, a score that is not finite, workers that keep dying, or parts that do
            not hold each request once.
    """
    stores = {width: _store(path, data, config, width, folder) for width in widths}
    size = min(PER_PART, config.ranking.users_per_part)
    shares = [range(start, min(start + size, whole.requests)) for start in range(0, whole.requests, size)]
    tasks: list[Task] = [(width, number, share) for width in widths for number, share in enumerate(shares)]
    missing = [task for task in tasks if not stores[task[0]].has(task[1])]
    done = sum(len(requests) for *_, requests in tasks) - sum(len(requests) for *_, requests in missing)
    title = f"whole catalogue by {name}"
    with UserProgress(title, whole.requests * len(widths), done, console, "loading the model") as progress:
        for (width, number, _), rows in _ranked(path, data, config, missing, progress.advance, console):
            stores[width].write(number, rows)
    return {width: whole.ranked(_joined(stores[width], len(shares), whole.requests)) for width in widths}


def _ranked(
    path: str, data: PreparedData, config: RunConfig, tasks: Sequence[Task], advance: Callable[[int], None],
    console: Console,
) -> Iterator[tuple[Task, Rows]]:  # fmt: skip
    """Each task with its rows, in the order in which they are finished."""
    from dmpo_dist.cluster.actors import map_over_actors
    from dmpo_dist.cluster.train import ray_session

    if not tasks:
        return
    arguments = (*for_workers(path, config), data.path.absolute())
    here = not on_actors(config)
    notes: set[str] = set()
    with nullcontext() if here else ray_session(config.cluster):
        if here:
            ranker = CatalogueRanker(*arguments)
            found = ((task, _advancing(ranker.rows(task), advance), None) for task in tasks)
        else:
            found = map_over_actors(config.cluster, CatalogueRanker, arguments, tasks)
        for task, rows, note in found:
            if note and note not in notes:
                notes.add(note)
                console.print(f"note: {note}", highlight=False, markup=False)
            if not here:
                advance(len(rows))
            yield task, rows


def _advancing(rows: Iterator[dict[str, Any]], advance: Callable[[int], None]) -> Rows:
    out = []
    for row in rows:
        out.append(row)
        advance(1)
    return out


def _store(path: str, data: PreparedData, config: RunConfig, width: Width, folder: Path) -> PartFolder:
    """The folder of the parts of one ranking, named by all that it depends on."""
    source = find_model(path)
    reference = reference_of(source, config.ranking.reference)
    model = {"dtype", "quantization", "double_quantization", "attention", "max_length"}
    key = {
        "dmpo": __version__,
        "weights": weights_key(source),
        "reference": weights_key(find_model(reference)) if reference else None,
        "data": data.fingerprint,
        "log": data.log_digest,
        "width": width,
        "template": enforce_template(source.stamp, config.template, path).model_dump(mode="json"),
        "model": config.model.model_dump(mode="json", include=model),
        "ranking": config.ranking.model_dump(mode="json", exclude={"reference"}),
        "evaluation.token_budget": config.evaluation.token_budget,
    }
    own = folder / PARTS / json_digest(key)[:16]
    own.parent.mkdir(parents=True, exist_ok=True)
    return PartFolder(own, key, SCHEMA, "choose another output_dir")


def _joined(parts: PartFolder, count: int, requests: int) -> list[list[Beam]]:
    """The best titles of each request.

    Raises:
        UserError: the parts do not hold each request once.
    """
    rows: Rows = []
    for number in range(count):
        table = parts.read(number)
        assert table is not None
        rows += table.to_pylist()
    found = {row["request"]: [Beam(*pair) for pair in zip(row["titles"], row["scores"], strict=True)] for row in rows}
    if len(rows) != requests or found.keys() != {*range(requests)}:
        raise UserError(f"{parts.folder}: its parts do not hold each request once; remove the folder and run again")
    return [found[request] for request in range(requests)]
