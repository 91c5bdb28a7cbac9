"""Classical recommenders by RecTools, run by another interpreter: ``python -I rectools_runner.py FOLDER``.

With ``--end-with-stdin`` before the folder it ends as soon as its standard input does.

RecTools needs an older numpy than dmpo_dist, so this file imports nothing of dmpo_dist, and dmpo_dist imports nothing
of RecTools. ``FOLDER`` holds

- ``job.json``: ``seed``, ``threads``, and ``models``: ease -> ``regularization`` (a list to choose from), sasrec and
  bert4rec -> the fields of ``TransformerBaseline`` in ``config/evaluation.py``;
- ``test_log.parquet`` (user, item, timestamp, in the order of time) and ``test_requests.parquet`` (history: list of
  items, oldest first; candidates: list of items, or null for all of ``items.parquet``);
- ``validation_log.parquet`` and ``validation_requests.parquet``, the same for earlier requests, whose first candidate
  is the positive. Without them the first regularization and the setting ``epochs`` are used.

Without the two files of test requests, settings are compared on the validation requests alone.

It writes ``scores_NAME.parquet`` (``scores``: list of float64 as long as the candidates, NaN where the model does not
know the item or knows nothing of the history) and ``result.json`` (name -> chosen settings, validation NDCG@10 by
setting, seconds).
"""

import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pytorch_lightning import Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset, IdMap, Interactions
from rectools.models import BERT4RecModel, EASEModel, SASRecModel
from scipy import sparse

SCORES_AT_ONCE = 5_000_000
NETWORKS = {"sasrec": SASRecModel, "bert4rec": BERT4RecModel}

Scores = np.ndarray
"""(n_requests, n_items) float64, items in the order of ``items.parquet``; NaN where the model has no score."""


class Fitted(Protocol):
    """A trained model: histories -> scores of all items."""

    def __call__(self, histories: Sequence[Sequence[str]]) -> Scores: ...


def main(folder: Path) -> None:
    """Train the models of ``job.json`` on the tables beside it; write their scores and ``result.json``."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    items = pd.Index(pd.read_parquet(folder / "items.parquet")["item"])
    test, validation = (
        _read(folder, part) if (folder / f"{part}_requests.parquet").exists() else None
        for part in ("test", "validation")
    )
    results = {}
    for name, settings in job["models"].items():
        start = time.perf_counter()
        choose = choose_regularization if name == "ease" else choose_epochs
        chosen, tried = choose(name, settings, items, validation, job["seed"])
        if test is not None:
            model = fit(name, settings | chosen, test[0], items, job["seed"])
            write_scores(folder / f"scores_{name}.parquet", model, test[1], items)
        results[name] = {"settings": settings | chosen, "validation": tried, "seconds": time.perf_counter() - start}
        said = ", ".join(f"{key} {value:g}" for key, value in chosen.items())
        print(f"{name}: trained with {said}; {results[name]['seconds']:.0f} s in all", flush=True)
    (folder / "result.json").write_text(json.dumps(results, indent=2), encoding="utf-8")


def _end_with_stdin() -> None:
    """End this process once standard input does: a caller that holds its other end does not leave this one behind."""
    while os.read(0, 4096):  # not sys.stdin: its lock, held by a thread, is a fatal error when the interpreter ends
        pass
    os._exit(1)


def choose_regularization(
    name: str,
    settings: dict[str, Any],
    items: pd.Index,
    validation: tuple[pd.DataFrame, pd.DataFrame] | None,
    seed: int,
) -> tuple[dict[str, Any], dict[str, float]]:
    """The regularization with the best validation NDCG@10, and the NDCG@10 of every one tried."""
    if validation is None:
        return {"regularization": settings["regularization"][0]}, {}
    log, requests = validation
    tried = {}
    for value in settings["regularization"]:
        model = fit(name, settings | {"regularization": value}, log, items, seed)
        tried[value] = validation_ndcg(model, requests, items)
        print(f"{name}: regularization {value:g}, validation NDCG@10 {tried[value]:.3f}", flush=True)
    return {"regularization": max(tried, key=tried.__getitem__)}, {str(value): ndcg for value, ndcg in tried.items()}


def choose_epochs(
    name: str,
    settings: dict[str, Any],
    items: pd.Index,
    validation: tuple[pd.DataFrame, pd.DataFrame] | None,
    seed: int,
) -> tuple[dict[str, Any], dict[str, float]]:
    """The number of epochs with the best validation NDCG@10, and the NDCG@10 at every check.

    Training stops after ``patience`` checks without an improvement.
    """
    if validation is None:
        return {"epochs": settings["epochs"]}, {}
    log, requests = validation
    tried: dict[int, float] = {}
    for epochs, model in train_network(name, settings, log, items, seed):
        tried[epochs] = validation_ndcg(model, requests, items)
        print(f"{name}: {epochs} epochs, validation NDCG@10 {tried[epochs]:.3f}", flush=True)
        best = max(tried, key=tried.__getitem__)
        if epochs - best >= settings["patience"] * settings["epochs_per_check"]:
            break
    return {"epochs": best}, {str(epochs): ndcg for epochs, ndcg in tried.items()}


def fit(name: str, settings: dict[str, Any], log: pd.DataFrame, items: pd.Index, seed: int) -> Fitted:
    """Train ``name`` on ``log`` with chosen settings."""
    if name == "ease":
        return fit_ease(settings["regularization"], log, items)
    for epochs, model in train_network(name, settings | {"max_epochs": settings["epochs"]}, log, items, seed):
        if epochs == settings["epochs"]:
            return model
    raise AssertionError("training ended early")


def fit_ease(regularization: float, log: pd.DataFrame, items: pd.Index) -> Fitted:
    """Train EASE (Steck 2019) on ``log``."""
    dataset = _dataset(log)
    model = EASEModel(regularization=regularization, recommend_n_threads=1).fit(dataset)
    known = pd.Index(dataset.item_id_map.external_ids)
    columns = items.get_indexer(known)

    def scores(histories: Sequence[Sequence[str]]) -> Scores:
        """EASE's score is a user's row of interactions times the item weights, so it needs the history alone."""
        codes = [known.get_indexer(pd.Index(history, dtype=object)) for history in histories]
        row = np.repeat(np.arange(len(codes)), [len(code) for code in codes])
        column = np.concatenate(codes)
        row, column = row[column >= 0], column[column >= 0]
        taken = sparse.csr_matrix((np.ones(len(row), np.float32), (row, column)), (len(codes), len(known)))
        out = np.full((len(codes), len(items)), np.nan)
        some = np.unique(row)
        out[np.ix_(some, columns)] = taken[some] @ model.weight
        return out

    return scores


def train_network(
    name: str, settings: dict[str, Any], log: pd.DataFrame, items: pd.Index, seed: int
) -> Iterator[tuple[int, Fitted]]:
    """Train SASRec or BERT4Rec; yields (epochs so far, the model) every ``epochs_per_check`` epochs and at the end."""
    seed_everything(seed, workers=True, verbose=False)
    dataset = _dataset(log)
    model = NETWORKS[name](
        n_factors=settings["factors"], n_blocks=settings["blocks"], n_heads=settings["heads"],
        dropout_rate=settings["dropout"], lr=settings["learning_rate"], batch_size=settings["batch_size"],
        session_max_len=settings["max_length"], epochs=settings["max_epochs"], deterministic=True,
        recommend_n_threads=1, recommend_torch_device="cpu", get_trainer_func=_cpu_trainer,
    )  # fmt: skip

    def scores(histories: Sequence[Sequence[str]]) -> Scores:
        out = np.full((len(histories), len(items)), np.nan)
        known = set(model.data_preparator.get_known_item_ids())
        some = [number for number, history in enumerate(histories) if known.intersection(history)]
        if some:
            # RecTools returns scores only with a ranking, so all known items are ranked; each request is its own user.
            events = pd.DataFrame(
                [(number, item) for number in some for item in histories[number]], columns=["user", "item"]
            )
            ranked = model.recommend(some, _dataset(events, dataset.item_id_map), k=len(known), filter_viewed=False)
            out[ranked[Columns.User], items.get_indexer(ranked[Columns.Item])] = ranked[Columns.Score]
        return out

    done = 0
    while done < settings["max_epochs"]:
        more = min(settings["epochs_per_check"], settings["max_epochs"] - done)
        model.fit_partial(dataset, min_epochs=more, max_epochs=more)
        done += more
        yield done, scores


def _cpu_trainer() -> Trainer:
    """RecTools' default trainer restricted to the CPU, so that a seed gives the same result on every host."""
    return Trainer(
        accelerator="cpu",
        devices=1,
        deterministic=True,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )


def validation_ndcg(model: Fitted, requests: pd.DataFrame, items: pd.Index) -> float:
    """Mean NDCG@10 of the first candidate; items without a score rank last."""
    gains = []
    for start, scores in _in_blocks(model, requests, items):
        for candidates, row in zip(requests["candidates"].iloc[start : start + len(scores)], scores, strict=True):
            own = np.nan_to_num(row[items.get_indexer(pd.Index(candidates))], nan=-np.inf)
            rank = 1 + (own[1:] > own[0]).sum() + (own[1:] == own[0]).sum() / 2  # a tie counts half
            gains.append(1 / np.log2(1 + rank) if rank <= 10 else 0.0)
    return float(np.mean(gains))


def write_scores(file: Path, model: Fitted, requests: pd.DataFrame, items: pd.Index) -> None:
    """Write a row group for each block of requests, so that no process needs all of requests x items in memory."""
    kind = pa.list_(pa.float64())
    with pq.ParquetWriter(file, pa.schema([("scores", kind)])) as writer:
        for start, scores in _in_blocks(model, requests, items):
            asked = requests["candidates"].iloc[start : start + len(scores)]
            rows = [
                row if candidates is None else row[items.get_indexer(pd.Index(candidates))]
                for candidates, row in zip(asked, scores, strict=True)
            ]
            writer.write_table(pa.table({"scores": pa.array(rows, kind)}))


def _in_blocks(model: Fitted, requests: pd.DataFrame, items: pd.Index) -> Iterator[tuple[int, Scores]]:
    """(number of the first request, scores) of one block of requests after the other."""
    step = max(1, SCORES_AT_ONCE // len(items))
    for start in range(0, len(requests), step):
        yield start, model([list(history) for history in requests["history"].iloc[start : start + step]])


def _read(folder: Path, part: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    return pd.read_parquet(folder / f"{part}_log.parquet"), pd.read_parquet(folder / f"{part}_requests.parquet")


def _dataset(log: pd.DataFrame, item_ids: IdMap | None = None) -> Dataset:
    """A log in the order of time as RecTools' dataset; a time is the index in the log, as only the order matters."""
    raw = pd.DataFrame(
        {
            Columns.User: log["user"].to_numpy(),
            Columns.Item: log["item"].to_numpy(),
            Columns.Weight: 1.0,
            Columns.Datetime: pd.to_datetime(np.arange(len(log)), unit="s"),
        }
    )
    if item_ids is None:
        return Dataset.construct(raw)
    raw = raw[raw[Columns.Item].isin(item_ids.external_ids)]
    user_ids = IdMap.from_values(raw[Columns.User].to_numpy())
    return Dataset(user_ids, item_ids, Interactions.from_raw(raw, user_ids, item_ids))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if "--end-with-stdin" in sys.argv:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    main(Path(sys.argv[-1]))
