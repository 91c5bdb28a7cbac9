"""SASRec, BERT4Rec and EASE on the same candidates: writes files for ``rectools_runner.py`` and reads its scores.

The models are trained on ``fitting_log`` and see the history of a request. Candidates are written in the
order of their names, so that nothing reveals the positive. The number of epochs and the regularization are chosen on
the validation requests, by models trained on a log that ends before these requests. The chosen model is then trained
again on the log that ends before the test requests.
"""

import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from datasets import Dataset

from dmpo_dist.config.evaluation import EvaluationConfig
from dmpo_dist.data.store import PreparedData
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.classical_environment import baseline_python, run_environment
from dmpo_dist.evaluation.fitting_log import fitting_log
from dmpo_dist.evaluation.whole_catalogue import Ranked, WholeCatalogue

CLASSICAL = ("sasrec", "bert4rec", "ease")
RUNNER = Path(__file__).with_name("rectools_runner.py")
END_WITH_STDIN = "--end-with-stdin"
PARTS = ("test", "validation")
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass(frozen=True)
class ClassicalScores:
    """The results of the runner.

    Attributes:
        candidates: model -> for each request a float64 array (1 + K,) of scores, the positive first.
        catalogue: model -> its ranking of the whole catalogue; empty unless asked for.
        details: model -> chosen settings, validation NDCG@10 of all settings tried, seconds, and the numbers of
            requests with a history, and of positives, that the model did not know.
    """

    candidates: dict[str, list[np.ndarray]]
    catalogue: dict[str, Ranked]
    details: dict[str, dict[str, Any]]


def classical_scores(
    names: Sequence[str],
    data: PreparedData,
    config: EvaluationConfig,
    seed: int,
    whole: WholeCatalogue | None,
    echo: Callable[[str], None],
) -> ClassicalScores:
    """Train the models ``names`` in their own environment and score the test requests.

    Args:
        whole: the whole catalogue for the requests of ``data``, to score all items and rank the positives among them.

    Raises:
        UserError: no environment (see ``baseline_python``), or the runner failed.
    """
    with _finished(names, data, config, seed, echo, PARTS, whole is not None) as folder:
        return _read_scores(folder, names, data, whole)


def classical_validation(
    name: str, data: PreparedData, config: EvaluationConfig, seed: int, echo: Callable[[str], None]
) -> dict[str, float]:
    """Setting -> NDCG@10 on the validation requests, of each number of epochs or regularization that was tried.

    Nothing is trained or scored for the test requests.

    Raises:
        UserError: as ``classical_scores``.
    """
    with _finished([name], data, config, seed, echo, ("validation",)) as folder:
        return json.loads((folder / "result.json").read_text(encoding="utf-8"))[name]["validation"]


@contextmanager
def _finished(
    names: Sequence[str], data: PreparedData, config: EvaluationConfig, seed: int, echo: Callable[[str], None],
    parts: Sequence[str], catalogue: bool = False,
) -> Iterator[Path]:  # fmt: skip
    """A temporary folder in which the runner has done its work on ``parts`` of the data."""
    python = baseline_python(config.baseline_environment, echo)
    job = {"seed": seed, "threads": 1, "models": {name: _settings(name, config) for name in names}}
    with tempfile.TemporaryDirectory(prefix="dmpo-baselines-") as temporary:
        folder = Path(temporary)
        _write_inputs(folder, data, catalogue, parts)
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        _run(python, folder, echo)
        yield folder


def _read_scores(
    folder: Path, names: Sequence[str], data: PreparedData, whole: WholeCatalogue | None
) -> ClassicalScores:
    """The scores that the runner wrote to ``folder``; read in blocks, as requests x items may not fit in memory."""
    groups, columns = _groups(data.test), _catalogue(data)
    counts = fitting_log(data, "test")["item"].value_counts().reindex(columns, fill_value=0).to_numpy(float)
    # Candidates were written sorted and are scored in that order, or the whole catalogue is. ``of_group`` holds for
    # each request the (1 + K,) indices of its candidates in the scores, the positive first.
    item_columns = [columns.get_indexer(pd.Index(group)) for group in groups]
    of_group = item_columns if whole else [np.searchsorted(sorted(group), group) for group in groups]
    found = ClassicalScores({}, {}, json.loads((folder / "result.json").read_text(encoding="utf-8")))
    for name in names:
        file = folder / f"scores_{name}.parquet"
        rows = (row for block in _blocks(file) for row in block)
        own = [row[indices] for row, indices in zip(rows, of_group, strict=True)]
        found.candidates[name] = [
            with_unknown(row, counts[indices]) for row, indices in zip(own, item_columns, strict=True)
        ]
        found.details[name] |= _unknown(own)
        if whole is not None:
            known = (np.stack([with_unknown(row, counts) for row in block]) for block in _blocks(file))
            found.catalogue[name] = whole.scored(known)
    return found


def _blocks(file: Path) -> Iterator[list[np.ndarray]]:
    """Rows of scores, a row group at a time."""
    with pq.ParquetFile(file) as opened:
        for group in range(opened.num_row_groups):
            yield opened.read_row_group(group).to_pandas()["scores"].tolist()


def with_unknown(scores: np.ndarray, popularity: np.ndarray) -> np.ndarray:
    """Scores without NaN: unknown items share a last score; a request without any score is ranked by popularity.

    Args:
        scores: (n,) of one request.
        popularity: (n,) how often each item was taken in the log that the model was trained on.
    """
    unknown = np.isnan(scores)
    if unknown.all():
        return popularity.astype(np.float64)
    return np.where(unknown, scores[~unknown].min() - 1, scores)


def _settings(name: str, config: EvaluationConfig) -> dict[str, Any]:
    if name == "ease":
        return {"regularization": config.ease_regularization}
    return config.transformer.model_dump()


def _write_inputs(folder: Path, data: PreparedData, catalogue: bool, parts: Sequence[str]) -> None:
    """Write all files that ``rectools_runner.py`` reads except ``job.json``, of ``parts`` that have requests."""
    pd.DataFrame({"item": _catalogue(data)}).to_parquet(folder / "items.parquet", index=False)
    for part, rows in (("test", data.test), ("validation", data.validation)):
        if part not in parts or not len(rows):
            continue
        asked: Sequence[list[str] | None] = _groups(rows)  # validation's positives come first
        if part == "test":
            asked = [None if catalogue else sorted(group) for group in _groups(rows)]
        log = fitting_log(data, part).sort_values(["timestamp", "user", "item"])
        log[["user", "item", "timestamp"]].to_parquet(folder / f"{part}_log.parquet", index=False)
        requests = pd.DataFrame({"history": rows["history_items"][:], "candidates": asked})
        requests.to_parquet(folder / f"{part}_requests.parquet", index=False)


def _groups(rows: Dataset) -> list[list[str]]:
    """The candidates of each request, the positive first."""
    return [[p, *n] for p, n in zip(rows["positive_item"][:], rows["negative_items"][:], strict=True)]


def _catalogue(data: PreparedData) -> pd.Index:
    assert data.items is not None, "these baselines need a log, and a log has items"
    return pd.Index(data.items["item"].to_numpy(dtype=object))


def _unknown(scores: Sequence[np.ndarray]) -> dict[str, int]:
    """How many requests have no score at all, and how many of the others have none for the positive."""
    nothing = np.array([np.isnan(row).all() for row in scores])
    positive = np.array([np.isnan(row[0]) for row in scores])
    return {
        "requests_with_unknown_history": int(nothing.sum()),
        "unknown_positives": int((positive & ~nothing).sum()),
    }


def _run(python: Path, folder: Path, echo: Callable[[str], None]) -> None:
    """Run the runner and pass its progress on; isolated (-I), so that it sees neither our modules nor our packages.

    The runner ends when its standard input does, so it does not outlive this process, however that ends.
    """
    errors = folder / "errors.txt"
    with (
        errors.open("w") as file,
        subprocess.Popen([python, "-I", RUNNER, END_WITH_STDIN, folder],
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, bufsize=1,
                         env=run_environment() | ONE_THREAD, cwd=folder) as process,
    ):  # fmt: skip
        for line in process.stdout or ():
            if line.split(":")[0] in CLASSICAL:  # a line of the runner's own, not one that a library prints
                echo(line.rstrip())
    if process.returncode:
        end = "\n".join(errors.read_text(errors="replace").strip().splitlines()[-8:])
        raise UserError(
            f"the classical baselines failed in {python.parents[1]} (exit {process.returncode}):\n{end}\n"
            "leave them out of evaluation.baselines, or set evaluation.baseline_environment to a working environment"
        )
