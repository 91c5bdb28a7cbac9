"""Requests scored in parts, here or by Ray actors, so that an interrupted evaluation goes on where it stopped.

The rows that a forward pass takes are packed once for all requests, and a part is some of these rows: scores do not
depend on how many parts there are, on who scores them, or on an interruption.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from rich.console import Console

from dmpo_dist import __version__
from dmpo_dist.artifacts.digest import json_digest
from dmpo_dist.artifacts.parts import PartFolder
from dmpo_dist.config import RunConfig
from dmpo_dist.data.store import PreparedData
from dmpo_dist.data.tokenization import TokenGroup, tokenize_rows
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.inputs import absolute_model, for_workers
from dmpo_dist.evaluation.ranking import load_ranking_model, require_finite
from dmpo_dist.evaluation.rules import Split, rows_of
from dmpo_dist.modeling.model_files import weights_key
from dmpo_dist.modeling.ranking_model import RankingModel
from dmpo_dist.records.progress import UserProgress

PARTS = "scores.parts"
"""Below output_dir, until the evaluation is written: a folder for each model and split."""
SCHEMA = pa.schema([("request", pa.int64()), ("scores", pa.list_(pa.float64()))])
Task = tuple[int, int, int, int]
"""Number of the part, the draw (of the order in which prompts list candidates), the share of its rows, of how many."""
Rows = list[dict[str, Any]]
Worker = tuple[RunConfig, Path, Split, str | None]
"""What an actor needs beside the model's path: the configuration, the data's path, the split and the reference."""


@dataclass(frozen=True)
class PartScorer:
    """Scores the splits of prepared data by a model, or by its reference, part by part.

    A part is found again by the weights, tokens and settings that its scores come from. So an interruption costs one
    part, and weights that several models of an evaluation ask for, such as their common reference, run once.

    Attributes:
        title: what progress is shown for.
        called: the model, as an error names it.
        path: of the model.
        folder: parts lie below ``PARTS`` there.
        here: score in this process, even if the configuration has several workers.
    """

    title: str
    called: str
    path: str
    model: RankingModel
    data: PreparedData
    config: RunConfig
    folder: Path
    console: Console
    here: bool = False

    def __call__(self, split: Split = "test", reference: str | None = None) -> list[np.ndarray]:
        """For each request of ``split`` (1 + K,) float64, the positive first, as ``score_rows`` gives it.

        Args:
            reference: score the model of this path on the tokens of the model instead.

        Raises:
            UserError: a prompt that does not fit, a model that cannot be used, a score that is not finite, workers that
                keep dying, or parts that do not hold each request once.
        """
        scorer = self.model if reference is None else self.model.reference(reference)
        rows = rows_of(self.data, split)
        groups = [tokenize_rows(rows, self.model.encode, draw=draw) for draw in range(self.model.orders)]
        shares = -(-len(rows) // self.config.ranking.users_per_part)
        draws = range(len(groups))
        tasks = [(draw * shares + share, draw, share, shares) for draw in draws for share in range(shares)]
        parts = self._parts(scorer, groups)
        missing = [task for task in tasks if not parts.has(task[0])]
        done = sum(len(_part(parts, task)) for task in tasks if task not in missing)
        what = "" if split == "test" else f", {split}"
        title = f"{self.title}{what}" if reference is None else f"{self.title}{what}, its reference"
        with UserProgress(title, len(groups) * len(rows), done, self.console, "loading the model") as progress:
            if self.here or not on_actors(self.config):
                found = _here(scorer, groups, missing, progress.advance)
            else:
                path, config = for_workers(self.path, self.config)
                subtracted = None if reference is None else absolute_model(reference)
                worker = (config, self.data.path.absolute(), split, subtracted)
                found = _by_actors(path, worker, missing, progress.advance, self.console)
            try:
                for number, scored in found:
                    require_finite(self.called, [row["scores"] for row in scored], self.config.model.dtype)
                    parts.write(number, scored)
            except UserError:
                if not any(parts.has(number) for number, *_ in tasks):
                    parts.remove()  # nothing to go on with
                    _remove_if_empty(parts.folder.parent)
                raise
        of_draws = [_joined(parts, tasks, draw, len(rows)) for draw in draws]
        return [np.mean(of_request, axis=0) for of_request in zip(*of_draws, strict=True)]

    def _parts(self, scorer: RankingModel, groups: Sequence[Sequence[TokenGroup]]) -> PartFolder:
        key = _key(scorer, groups, self.config)
        folder = self.folder / PARTS / json_digest(key)[:16]
        folder.parent.mkdir(parents=True, exist_ok=True)
        return PartFolder(folder, key, SCHEMA, "choose another output_dir")


def on_actors(config: RunConfig) -> bool:
    """Whether requests are scored by Ray actors: for one worker on this machine, this process does it sooner."""
    return config.cluster.workers > 1 or config.cluster.address is not None


def remove_parts(folder: Path) -> None:
    """Remove all parts below ``folder``, when what they were kept for is written."""
    shutil.rmtree(folder / PARTS, ignore_errors=True)


class ShareScorer:
    """What an actor does: scores shares of a split of the data in ``data``; see ``PartScorer`` for more."""

    def __init__(self, path: str, config: RunConfig, data: Path, split: Split, reference: str | None) -> None:
        self._model = load_ranking_model(path, config)
        self._scorer = self._model if reference is None else self._model.reference(reference)
        self._rows = rows_of(PreparedData.load(data), split)
        self._groups: dict[int, Sequence[TokenGroup]] = {}

    def __call__(self, task: Task) -> tuple[int, Rows, str | None]:
        """(number of the part, its rows, what to tell the user of how they were scored)."""
        number, draw, share, shares = task
        if draw not in self._groups:
            self._groups[draw] = tokenize_rows(self._rows, self._model.encode, draw=draw)
        rows = list(_share_rows(self._scorer, self._groups[draw], share, shares))
        return number, rows, self._scorer.load_weights().fallback


def _share_rows(model: RankingModel, groups: Sequence[TokenGroup], share: int, shares: int) -> Iterator[dict[str, Any]]:
    for request, scores in model.score_share(groups, share, shares):
        yield {"request": request, "scores": scores.tolist()}


def _here(
    model: RankingModel, groups: Sequence[Sequence[TokenGroup]], tasks: Sequence[Task], advance: Callable[[int], None]
) -> Iterator[tuple[int, Rows]]:
    """(number, rows) of each part, scored in this process."""
    for number, draw, share, shares in tasks:
        rows: Rows = []
        for row in _share_rows(model, groups[draw], share, shares):
            rows.append(row)
            advance(1)
        yield number, rows


def _by_actors(
    path: str, worker: Worker, tasks: Sequence[Task], advance: Callable[[int], None], console: Console
) -> Iterator[tuple[int, Rows]]:
    """(number, rows) of each part, in the order in which ``cluster.workers`` actors finish them."""
    from dmpo_dist.cluster.actors import map_over_actors
    from dmpo_dist.cluster.train import ray_session

    if not tasks:
        return
    arguments, config = (path, *worker), worker[0]
    notes: set[str] = set()
    with ray_session(config.cluster):
        for number, rows, note in map_over_actors(config.cluster, ShareScorer, arguments, tasks):
            if note and note not in notes:
                notes.add(note)
                console.print(f"note: {note}", highlight=False, markup=False)
            advance(len(rows))
            yield number, rows


def _key(scorer: RankingModel, groups: Sequence[Sequence[TokenGroup]], config: RunConfig) -> dict[str, Any]:
    """What scores depend on, and how they are dealt to parts."""
    model = config.model.model_dump(
        mode="json", include={"dtype", "quantization", "double_quantization", "attention", "max_length"}
    )
    return {
        "dmpo": __version__,
        "weights": weights_key(scorer.scored_source),
        "tokens": _tokens_digest(groups),
        **{f"model.{name}": value for name, value in model.items()},
        "evaluation.token_budget": config.evaluation.token_budget,
        "ranking.users_per_part": config.ranking.users_per_part,
    }


def _tokens_digest(groups: Sequence[Sequence[TokenGroup]]) -> str:
    """Of the ids of all prompts and responses, where each of them ends, and from where they are scored."""
    digest = xxhash.xxh3_128()
    for of_draw in groups:
        for group in of_draw:
            lengths = [len(group.prefix), *map(len, group.branches)]
            for numbers in ([len(lengths), *lengths], group.prefix, *group.branches, group.scored_from):
                digest.update(np.asarray(numbers, dtype=np.int64).tobytes())
    return digest.hexdigest()


def _remove_if_empty(folder: Path) -> None:
    if not any(folder.iterdir()):
        folder.rmdir()


def _part(parts: PartFolder, task: Task) -> Rows:
    table = parts.read(task[0])
    assert table is not None
    return table.to_pylist()


def _joined(parts: PartFolder, tasks: Sequence[Task], draw: int, requests: int) -> list[np.ndarray]:
    """Per request (1 + K,) of one draw.

    Raises:
        UserError: the parts do not hold each request once.
    """
    rows = [row for task in tasks if task[1] == draw for row in _part(parts, task)]
    scores = {row["request"]: np.array(row["scores"]) for row in rows}
    if len(rows) != requests or scores.keys() != {*range(requests)}:
        raise UserError(f"{parts.folder}: its parts do not hold each request once; remove the folder and run again")
    return [scores[request] for request in range(requests)]
