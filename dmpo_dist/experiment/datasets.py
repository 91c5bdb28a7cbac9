"""The datasets of an experiment: folders that are prepared already, or that the experiment prepares once."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dmpo_dist.config import DataConfig, RunConfig, load_config
from dmpo_dist.config.section import dotted
from dmpo_dist.data.prepare import prepare
from dmpo_dist.data.store import NOT_PREPARED_BY, PreparedData
from dmpo_dist.errors import UserError
from dmpo_dist.experiment.schema import GridConfig, layers_of, override, settings_of

DATA = "data"
NOT_IN_THE_ROWS = ("path", "shots", "shots_seed", "shots_skip", "stream_memory")
COLUMNS = ("columns", "items_columns", "users_columns")
"""Keys of ``data.source`` that hold mappings."""


def open_datasets(grid: GridConfig, make: Callable[[str], None] | None) -> dict[str, PreparedData]:
    """name -> dataset, for all datasets of the grid that exist.

    Args:
        make: gets a line for each dataset that is prepared now; with None unprepared datasets are left out.

    Raises:
        UserError: a folder holds no prepared data or no test requests, was prepared by other settings than the grid's,
            or cannot be prepared.
    """
    found: dict[str, PreparedData] = {}
    for name, dataset in grid.datasets.items():
        path = named_path(found, name, grid)
        settings = _preparation(grid, name) if dataset.prepare is not None else None
        if settings is not None and not (path / "dataset.json").exists():
            if make is None:
                continue
            make(f"preparing the dataset {name}")
            prepare(settings.data, dataset.seed, path, echo=make)
        try:
            found[name] = PreparedData.load(path)
        except UserError as error:
            raise UserError(f"datasets.{name}: {error}") from None
        if settings is not None:
            _require_as_prepared(name, found[name], settings, dataset.seed)
        if not len(found[name].test):
            raise UserError(f"datasets.{name}: {path} holds no test requests to evaluate on; see its card.md")
    return found


def named_path(data: Mapping[str, PreparedData], name: str, grid: GridConfig) -> Path:
    """The folder of a dataset, which may not exist yet."""
    return data[name].path if name in data else (grid.datasets[name].path or grid.output_dir / DATA / name).absolute()


def prepared_by(grid: GridConfig, name: str) -> dict[str, Any]:
    """Keys of the data section that decide what the experiment's own preparation of a dataset makes; none where the
    grid names a folder."""
    if grid.datasets[name].prepare is None:
        return {}
    asked = _preparation(grid, name).data
    return {key: getattr(asked, key) for key in DataConfig.model_fields if key not in NOT_PREPARED_BY}


def _preparation(grid: GridConfig, name: str) -> RunConfig:
    keys = [override(f"data.{key}", value) for key, value in dotted(grid.datasets[name].prepare or {}).items()]
    try:
        return load_config(layers_of(grid), [*settings_of(grid, name), *keys])
    except UserError as error:
        raise UserError(f"datasets.{name}.prepare: {str(error).splitlines()[-1].strip()}") from None


def _require_as_prepared(name: str, data: PreparedData, settings: RunConfig, seed: int) -> None:
    asked = settings.data.model_dump(mode="json", exclude=set(NOT_IN_THE_ROWS))
    wanted = _by_field({"seed": seed, "data": asked})
    used = {key: value for key, value in data.card.config.items() if key not in NOT_IN_THE_ROWS}
    there = _by_field({"seed": data.card.seed, "data": used})
    for key, value in wanted.items():
        inferred = key == "data.source.kind" and value is None
        if key in there and there[key] != value and not inferred:
            raise UserError(
                f"datasets.{name}: {data.path} was prepared with {key}={there[key]}, the grid now says {value}; give "
                "the dataset another name, or write to another output_dir"
            )


def _by_field(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``settings`` by dotted key, with mappings of columns as one value each, as their keys are the user's."""
    source = settings["data"].get("source", {})
    columns = {f"data.source.{name}": source[name] for name in COLUMNS if name in source}
    rest = {name: value for name, value in source.items() if name not in COLUMNS}
    return dotted({**settings, "data": {**settings["data"], "source": rest}}) | columns
