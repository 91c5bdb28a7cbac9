"""SASRec, BERT4Rec and EASE on the same candidates: files out to ``rectools_runner.py``, scores back.

The models see the likes of ``fitting_log`` and, at a request, its history; the candidates go out in the order of their
names, so that nothing tells the positive. Numbers of epochs and the regularization are chosen on the validation requests, with
a log that ends before those, and the model is then trained again on all that ends before the test.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from dmpo_dist.config_ranking import EvaluationConfig
from dmpo_dist.data.splits import likes
from dmpo_dist.data.store import PreparedData
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.classical_environment import baseline_python
from dmpo_dist.evaluation.fitting_log import fitting_log

CLASSICAL = ("sasrec", "bert4rec", "ease")
RUNNER = Path(__file__).with_name("rectools_runner.py")
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass(frozen=True)
class ClassicalScores:
    """What the runner found.

    Attributes:
        candidates: model -> per request a float64 array (1 + K,), the positive first.
        catalogue: model -> (n_requests, n_items) float64 in the order of ``data.items``; None unless asked for.
        facts: model -> chosen settings, validation NDCG@10 of those tried, seconds, and how many requests and candidates it
            knew nothing of.
    """

    candidates: dict[str, list[np.ndarray]]
    catalogue: dict[str, np.ndarray] | None
    facts: dict[str, dict[str, Any]]


def classical_scores(
    names: Sequence[str],
    data: PreparedData,
    config: EvaluationConfig,
    seed: int,
    catalogue: bool,
    echo: Callable[[str], None],
) -> ClassicalScores:
    """Train the models ``names`` in their own environment and score the test requests.

    Args:
        catalogue: score every item, not the candidates alone.

    Raises:
        UserError: no environment (see ``baseline_python``), or the runner failed.
    """
    python = baseline_python(config.baseline_environment, echo)
    job = {"seed": seed, "threads": 1, "models": {name: _settings(name, config) for name in names}}
    with tempfile.TemporaryDirectory(prefix="dmpo-baselines-") as temporary:
        folder = Path(temporary)
        _write_inputs(folder, data, catalogue)
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        _run(python, folder, echo)
        found = {name: pd.read_parquet(folder / f"scores_{name}.parquet")["scores"].tolist() for name in names}
        facts = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    groups, columns = _groups(data.test), _catalogue(data)
    counts = _likes(data, "test")["item"].value_counts().reindex(columns, fill_value=0).to_numpy(float)
    candidates: dict[str, list[np.ndarray]] = {}
    wholes: dict[str, np.ndarray] = {}
    for name, scores in found.items():
        places = [columns.get_indexer(pd.Index(group)) for group in groups]
        if catalogue:
            own = [row[place] for row, place in zip(scores, places, strict=True)]
            wholes[name] = np.stack([with_unknown(row, counts) for row in scores])
        else:
            own = [row[np.searchsorted(sorted(group), group)] for row, group in zip(scores, groups, strict=True)]
        candidates[name] = [with_unknown(row, counts[place]) for row, place in zip(own, places, strict=True)]
        facts[name] |= _unknown(own)
    return ClassicalScores(candidates, wholes if catalogue else None, facts)


def with_unknown(scores: np.ndarray, popularity: np.ndarray) -> np.ndarray:
    """Scores without NaN: items the model does not know come last, all alike; without any score popularity ranks.

    Args:
        scores: (n,) of one request.
        popularity: (n,) how often each was taken in what the model was trained on.
    """
    unknown = np.isnan(scores)
    if unknown.all():
        return popularity.astype(np.float64)
    return np.where(unknown, scores[~unknown].min() - 1, scores)


def _settings(name: str, config: EvaluationConfig) -> dict[str, Any]:
    if name == "ease":
        return {"regularization": config.ease_regularization}
    return config.transformer.model_dump()


def _write_inputs(folder: Path, data: PreparedData, catalogue: bool) -> None:
    """The files that ``rectools_runner.py`` reads, but the job."""
    pd.DataFrame({"item": _catalogue(data)}).to_parquet(folder / "items.parquet", index=False)
    for part, rows in (("test", data.test), ("validation", data.validation)):
        if not len(rows):
            continue
        asked: Sequence[list[str] | None] = _groups(rows)  # validation's positives come first
        if part == "test":
            asked = [None if catalogue else sorted(group) for group in _groups(rows)]
        log = _likes(data, part).sort_values(["timestamp", "user", "item"])
        log[["user", "item", "timestamp"]].to_parquet(folder / f"{part}_log.parquet", index=False)
        requests = pd.DataFrame({"history": rows["history_items"][:], "candidates": asked})
        requests.to_parquet(folder / f"{part}_requests.parquet", index=False)


def _likes(data: PreparedData, part: str) -> pd.DataFrame:
    return likes(fitting_log(data, part), data.card["config"]["rating_threshold"])


def _groups(rows: Dataset) -> list[list[str]]:
    """The candidates of each request, the positive first."""
    return [[p, *n] for p, n in zip(rows["positive_item"][:], rows["negative_items"][:], strict=True)]


def _catalogue(data: PreparedData) -> pd.Index:
    assert data.items is not None, "these baselines need a log, and a log has items"
    return pd.Index(data.items["item"].to_numpy(dtype=object))


def _unknown(scores: Sequence[np.ndarray]) -> dict[str, int]:
    """How many requests the model could say nothing of, and of how many others it did not know the positive."""
    nothing = np.array([np.isnan(row).all() for row in scores])
    positive = np.array([np.isnan(row[0]) for row in scores])
    return {
        "requests_with_unknown_history": int(nothing.sum()),
        "unknown_positives": int((positive & ~nothing).sum()),
    }


def _run(python: Path, folder: Path, echo: Callable[[str], None]) -> None:
    """Run the runner and pass on what it says."""
    errors = folder / "errors.txt"
    with (
        errors.open("w") as file,
        subprocess.Popen([python, RUNNER, folder], stdout=subprocess.PIPE, stderr=file, text=True, bufsize=1,
                         env=os.environ | ONE_THREAD, cwd=folder) as process,
    ):  # fmt: skip
        for line in process.stdout or ():
            if line.split(":")[0] in CLASSICAL:  # not what libraries print
                echo(line.rstrip())
    if process.returncode:
        end = "\n".join(errors.read_text(errors="replace").strip().splitlines()[-8:])
        raise UserError(
            f"the classical baselines failed in {python.parents[1]} (exit {process.returncode}):\n{end}\n"
            "leave them out of evaluation.baselines, or set evaluation.baseline_environment to a working environment"
        )
