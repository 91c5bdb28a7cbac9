"""Reading and checking ``experiment.parquet``."""

from pathlib import Path

import pandas as pd

from dmpo_dist.errors import UserError
from dmpo_dist.parsing import parsing

STUDY_FILE = "experiment.parquet"
STUDY_COLUMNS = ("dataset", "evaluated_on", "model", "metric", "value")
STUDY_OPTIONAL = ("shots", "train_groups", "k", "objective", "free", "seed", "low", "high", "loss")
STUDY_LOSSES = ("loss", "final_preference_loss", "final_train_loss")


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
