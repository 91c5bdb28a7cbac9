"""Reading and checking what ``dmpo experiment`` writes: ``experiment.parquet``, and the summary of its cells."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dmpo_dist.errors import UserError
from dmpo_dist.parsing import parsing

STUDY_FILE = "experiment.parquet"
STUDY_COLUMNS = ("dataset", "evaluated_on", "model", "metric", "value")
STUDY_OPTIONAL = ("shots", "train_groups", "k", "objective", "free", "seed", "low", "high", "loss")
STUDY_LOSSES = ("loss", "final_preference_loss", "final_train_loss")
MEANS_FILE, DIFFERENCES_FILE = "means.parquet", "differences.parquet"
POINT = ("dataset", "evaluated_on", "shots", "train_groups", "k", "model", "free")
SUMMARY_COLUMNS = (*POINT, "metric", "value", "low", "high", "seeds")


@dataclass(frozen=True)
class Summary:
    """A study's figures over seeds, as ``experiment.results`` makes them.

    Attributes:
        means: a row for each model, dataset and metric: ``POINT``, metric, value, low, high, seeds.
        differences: the same for cells minus other models, paired, with the columns against and p.
    """

    means: pd.DataFrame
    differences: pd.DataFrame


def read_study(file: Path) -> pd.DataFrame:
    """The rows of ``experiment.parquet``, one for each cell, model and metric.

    Columns of ``STUDY_OPTIONAL`` that the file lacks are added with missing values. The column ``loss`` is the first of
    ``STUDY_LOSSES`` that the file has.

    Raises:
        UserError: it cannot be read, has no rows, or lacks one of ``STUDY_COLUMNS``.
    """
    with parsing(file, "run `dmpo experiment` again"):
        table = pd.read_parquet(file)
    missing = [name for name in STUDY_COLUMNS if name not in table]
    if missing:
        raise UserError(f"{file}: has no column {', '.join(missing)}; made by another version? run it again")
    if table.empty:
        raise UserError(f"{file}: holds no rows; no cell of the experiment is finished yet")
    loss = next((table[name] for name in STUDY_LOSSES if name in table), None)
    table = table.reindex(columns=[*STUDY_COLUMNS, *STUDY_OPTIONAL]).assign(loss=loss)
    numbers = [name for name in ("value", *STUDY_OPTIONAL) if name not in ("objective", "free")]
    return table.assign(**{name: pd.to_numeric(table[name], errors="coerce").astype(float) for name in numbers})


def read_summary(folder: Path) -> Summary | None:
    """The summary in a study's folder; None where an earlier version made the study and wrote none.

    Raises:
        UserError: a file cannot be read, or lacks a column.
    """
    if not ((folder / MEANS_FILE).exists() and (folder / DIFFERENCES_FILE).exists()):
        return None
    means = _summary_table(folder / MEANS_FILE, SUMMARY_COLUMNS)
    return Summary(means, _summary_table(folder / DIFFERENCES_FILE, (*SUMMARY_COLUMNS, "against", "p")))


def _summary_table(file: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    with parsing(file, "run `dmpo experiment` again"):
        table = pd.read_parquet(file)
    missing = [name for name in columns if name not in table]
    if missing:
        raise UserError(f"{file}: has no column {', '.join(missing)}; made by another version? run it again")
    numbers = [name for name in columns if name in ("shots", "train_groups", "k", "value", "low", "high", "p", "seeds")]
    return table.assign(**{name: pd.to_numeric(table[name], errors="coerce").astype(float) for name in numbers})
