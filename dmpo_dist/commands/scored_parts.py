"""The test requests scored in parts, here or by Ray actors, so that an interrupted evaluation goes on where it stopped.

The rows that a forward pass takes are packed once for all requests, and a part is some of these rows: scores do not
depend on how many parts there are, on who scores them, or on an interruption.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console

from dmpo_dist import __version__
from dmpo_dist.artifacts.parts import PartFolder
from dmpo_dist.config import RunConfig
from dmpo_dist.data.store import PreparedData
from dmpo_dist.data.tokenization import TokenGroup, tokenize_rows
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.ranking import load_ranking_model
from dmpo_dist.modeling.backbone import find_model
from dmpo_dist.modeling.model_files import start_digests
from dmpo_dist.modeling.ranking_model import RankingModel
from dmpo_dist.records.progress import UserProgress

PARTS = "scores.parts"
"""Below output_dir, until the evaluation is written: a folder for each model."""
SCHEMA = pa.schema([("request", pa.int64()), ("scores", pa.list_(pa.float64()))])
Task = tuple[int, int, int, int]
"""Number of the part, the draw (of the order in which prompts list candidates), the share of its rows, of how many."""
Rows = list[dict[str, Any]]


def score_in_parts(
    name: str, path: str, model: RankingModel, data: PreparedData, config: RunConfig, folder: Path, console: Console
) -> list[np.ndarray]:
    """``model.score_rows(data.test)``, part by part: by ``cluster.workers`` actors where there are several, else here.

    Args:
        name: what the model at ``path`` is called.
        folder: parts lie below ``PARTS`` there; those that are there are not scored again.

    Raises:
        UserError: a prompt that does not fit, a model that cannot be used, workers that keep dying, or parts of
            something else in ``folder``.
    """
    groups = [tokenize_rows(data.test, model.encode, draw=draw) for draw in range(model.orders)]
    shares = -(-len(data.test) // config.ranking.users_per_part)
    tasks = [(draw * shares + share, draw, share, shares) for draw in range(model.orders) for share in range(shares)]
    own = folder / PARTS / hashlib.sha256(name.encode()).hexdigest()[:16]
    own.parent.mkdir(parents=True, exist_ok=True)
    parts = PartFolder(own, _key(path, data, config), SCHEMA, "choose another output_dir")
    missing = [task for task in tasks if not parts.has(task[0])]
    done = sum(len(_part(parts, task)) for task in tasks if task not in missing)
    with UserProgress(f"scoring {name}", len(groups) * len(data.test), done, console, "loading the model") as progress:
        if on_actors(config):
            found = _by_actors(path, data, config, missing, progress.advance, console)
        else:
            found = _here(model, groups, missing, progress.advance)
        try:
            for number, rows in found:
                _require_finite(name, path, rows, config.model.dtype)
                parts.write(number, rows)
        except UserError:
            if not any(parts.has(number) for number, *_ in tasks):
                remove_parts(folder)  # nothing to go on with
            raise
    draws = [_joined(parts, tasks, draw, len(data.test)) for draw in range(model.orders)]
    return [np.mean(of_request, axis=0) for of_request in zip(*draws, strict=True)]


def on_actors(config: RunConfig) -> bool:
    """Whether requests are scored by Ray actors: for one worker on this machine, this process does it sooner."""
    return config.cluster.workers > 1 or config.cluster.address is not None


def remove_parts(folder: Path) -> None:
    """Remove all parts below ``folder``, when what they were kept for is written."""
    shutil.rmtree(folder / PARTS, ignore_errors=True)


class ShareScorer:
    """What an actor does: scores shares of the test requests of the data in ``data``; see ``RankingModel`` for more."""

    def __init__(self, path: str, config: RunConfig, data: Path) -> None:
        self._model = load_ranking_model(path, config)
        self._rows = PreparedData.load(data).test
        self._groups: dict[int, Sequence[TokenGroup]] = {}

    def __call__(self, task: Task) -> tuple[int, Rows, str | None]:
        """(number of the part, its rows, what to tell the user of how they were scored)."""
        number, draw, share, shares = task
        if draw not in self._groups:
            self._groups[draw] = tokenize_rows(self._rows, self._model.encode, draw=draw)
        rows = list(_share_rows(self._model, self._groups[draw], share, shares))
        return number, rows, self._model.load_weights().fallback


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
    path: str, data: PreparedData, config: RunConfig, tasks: Sequence[Task], advance: Callable[[int], None],
    console: Console,
) -> Iterator[tuple[int, Rows]]:  # fmt: skip
    """(number, rows) of each part, in the order in which ``cluster.workers`` actors finish them."""
    from dmpo_dist.cluster.actors import map_over_actors
    from dmpo_dist.cluster.train import ray_session

    if not tasks:
        return
    folder = Path(path).absolute()
    arguments = (str(folder) if folder.exists() else path, config, data.path.absolute())
    notes: set[str] = set()
    with ray_session(config.cluster):
        for number, rows, note in map_over_actors(config.cluster, ShareScorer, arguments, tasks):
            if note and note not in notes:
                notes.add(note)
                console.print(f"note: {note}", highlight=False, markup=False)
            advance(len(rows))
            yield number, rows


def _require_finite(name: str, path: str, rows: Rows, dtype: str) -> None:
    scores = np.concatenate([[], *(row["scores"] for row in rows)])  # there may be more parts than packed rows
    bad = ~np.isfinite(scores)
    if bad.any():
        raise UserError(
            f"--model {name}={path}: {int(bad.sum())} of {len(scores)} scores are not finite, the first is "
            f"{scores[bad][0]}; its training diverged or its weights are damaged, or model.dtype={dtype} is too narrow "
            "for it: try model.dtype=float32"
        )


def _key(path: str, data: PreparedData, config: RunConfig) -> dict[str, Any]:
    """What scores depend on, by the keys that a user knows."""
    settings = {
        "template": config.template.model_dump(mode="json"),
        "model": config.model.model_dump(
            mode="json", include={"dtype", "quantization", "double_quantization", "attention", "max_length"}
        ),
        "evaluation": config.evaluation.model_dump(mode="json", include={"token_budget", "candidate_orders"}),
        "ranking": config.ranking.model_dump(mode="json", include={"users_per_part"}),
    }
    keys = {f"{section}.{name}": value for section, values in settings.items() for name, value in values.items()}
    model = start_digests(find_model(path))
    return {"dmpo": __version__, "--model": model, "data": data.fingerprint, "seed": config.seed, **keys}


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
