"""What a model is used with where an order does not say it all: its training data, and fields from an order's files."""

from pathlib import Path

import pandas as pd

from dmpo_dist.artifacts.base import read_config
from dmpo_dist.artifacts.run_folder import CONFIG_FILE
from dmpo_dist.config import RunConfig, TemplateConfig
from dmpo_dist.data.requests import read_items
from dmpo_dist.data.store import PreparedData
from dmpo_dist.data.tables import read_table
from dmpo_dist.evaluation.ranking import GivenTexts


def given_texts(template: TemplateConfig, catalogue: Path | None, requests: Path | None) -> GivenTexts | None:
    """Fields of items and users in the files of an order; None where ``template`` shows none.

    Args:
        catalogue: a file, or a folder of prepared data; see ``read_catalogue``.
        requests: see ``read_requests``.
    """
    if not template.item_fields and not template.user_fields:
        return None
    return GivenTexts(items_of(catalogue) if catalogue else None, read_table(requests) if requests else None)


def items_of(catalogue: Path) -> pd.DataFrame | None:
    """The rows of a catalogue with the fields of its items; None where it has none."""
    return PreparedData.load(catalogue).items if catalogue.is_dir() else read_items(catalogue)


def with_trained_data(config: RunConfig, model: Path) -> RunConfig:
    """``config`` with the data that ``model`` was trained on where it names none and the run's folder says so."""
    path = read_config(model.parent / CONFIG_FILE).get("data", {}).get("path")
    if config.data.path is not None or path is None or not Path(path).is_dir():
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"path": Path(path)})})


def for_workers(model: str, config: RunConfig) -> tuple[str, RunConfig]:
    """``model`` and ``config`` with the paths that scoring reads made absolute: a cluster's workers were started in
    some other folder. Hub ids and names stay."""
    data, ranking = config.data, config.ranking
    if data.path is not None:
        data = data.model_copy(update={"path": data.path.absolute()})
    if ranking.reference not in (None, "base", "start"):
        ranking = ranking.model_copy(update={"reference": absolute_model(ranking.reference)})
    return absolute_model(model), config.model_copy(update={"data": data, "ranking": ranking})


def absolute_model(path: str) -> str:
    """``path`` made absolute where that is a folder or file; a hub id or the name of a fetched model as it is."""
    return str(Path(path).absolute()) if Path(path).exists() else path
