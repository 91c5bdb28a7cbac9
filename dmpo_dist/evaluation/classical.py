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
    assert data.items is not None, "these baselines need a log, and a log has items"
    items = data.items["item"].to_numpy(dtype=object)
    threshold = data.card["config"]["rating_threshold"]
    groups = [[p, *n] for p, n in zip(data.test["positive_item"][:], data.test["negative_items"][:], strict=True)]
    with tempfile.TemporaryDirectory(prefix="dmpo-baselines-") as temporary:
        folder = Path(temporary)
        pd.DataFrame({"item": items}).to_parquet(folder / "items.parquet", index=False)
        _write_log(folder, "test", likes(fitting_log(data, "test"), threshold))
        asked = [None] * len(groups) if catalogue else [sorted(group) for group in groups]
        _write_requests(folder, "test", data.test, asked)
        if len(data.validation):
            _write_log(folder, "validation", likes(fitting_log(data, "validation"), threshold))
            validation = zip(data.validation["positive_item"][:], data.validation["negative_items"][:], strict=True)
            _write_requests(folder, "validation", data.validation, [[p, *n] for p, n in validation])
        job = {"seed": seed, "threads": 1, "models": {name: _settings(name, config) for name in names}}
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        _run(python, folder, echo)
        found = {name: pd.read_parquet(folder / f"scores_{name}.parquet")["scores"].tolist() for name in names}
        facts = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    counts = likes(fitting_log(data, "test"), threshold)["item"].value_counts()
    columns = pd.Index(items)
    wholes: dict[str, np.ndarray] = {}
    candidates: dict[str, list[np.ndarray]] = {}
    for name, scores in found.items():
        if catalogue:
            own = [row[columns.get_indexer(pd.Index(group))] for row, group in zip(scores, groups, strict=True)]
            popularity = columns.map(counts).fillna(0).to_numpy(float)
            wholes[name] = np.stack([with_unknown(row, popularity) for row in scores])
        else:
            order = [np.searchsorted(sorted(group), group) for group in groups]
            own = [row[at] for row, at in zip(scores, order, strict=True)]
        taken = [np.array([counts.get(item, 0) for item in group], dtype=float) for group in groups]
        candidates[name] = [with_unknown(row, popularity) for row, popularity in zip(own, taken, strict=True)]
        unknown = [np.isnan(row) for row in own]
        facts[name]["requests_with_unknown_history"] = int(sum(row.all() for row in unknown))
        facts[name]["unknown_positives"] = int(sum(row[0] and not row.all() for row in unknown))
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


def _write_log(folder: Path, part: str, log: pd.DataFrame) -> None:
    log = log.sort_values(["timestamp", "user", "item"])
    log[["user", "item", "timestamp"]].to_parquet(folder / f"{part}_log.parquet", index=False)


def _write_requests(folder: Path, part: str, rows: Dataset, candidates: Sequence[list[str] | None]) -> None:
    frame = pd.DataFrame({"history": rows["history_items"][:], "candidates": list(candidates)})
    frame.to_parquet(folder / f"{part}_requests.parquet", index=False)


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
