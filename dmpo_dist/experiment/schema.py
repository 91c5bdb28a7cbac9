"""The schema of the grid that `dmpo experiment` reads, and all checks of it that need no data."""

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from dmpo_dist.config import RunConfig, load_config
from dmpo_dist.config.load import find_recipe
from dmpo_dist.config.section import Section, dotted
from dmpo_dist.errors import UserError

AXES = ("dataset", "shots", "seed", "k", "objective")
KEY_OF_AXIS = {"shots": "data.shots", "seed": "seed", "k": "train.negatives", "objective": "objective.name"}
NOT_TRAINING = ("output_dir", "version", "cluster", "submit", "serving", "tracking", "tune", "ranking", "evaluation")
ALL_SHOTS = "all"
START, STARTS = "start", ("sft", "zero_shot")
"""The axis that says what cells are trained from, and its values."""
SKIP = "data.shots_skip"
"""The one axis of the ``data`` section: groups of the SFT start that the stage after it leaves out."""
OTHER_SHOTS = "write draw_shots: per_seed beside grid, and each value of the axis seed draws its own shots"
Arm = Literal["untuned", "zero_shot", "sft", "sft_continued", "sft_continued_compute"]


class DatasetConfig(Section):
    """Prepared data, or how to prepare it."""

    path: Path | None = None
    """Folder that ``dmpo data prepare`` wrote."""
    prepare: dict[str, Any] | None = None
    """Keys of the ``data`` section, over those of ``config`` and ``settings``; prepared in output_dir/data."""
    seed: int = Field(0, ge=0)
    """Seed of that preparation. Cells of any seed share the data, so that they are measured on the same candidates."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Configuration of the cells on this dataset, over the grid's ``settings``."""

    @model_validator(mode="after")
    def _one_of_two(self) -> "DatasetConfig":
        if (self.path is None) == (self.prepare is None):
            raise ValueError("give either path (a prepared folder) or prepare (settings of the data section)")
        return self


class GridConfig(Section):
    """What ``dmpo experiment`` reads."""

    output_dir: Path
    """Folder of the experiment; running again goes on there."""
    config: list[str] = Field(default_factory=list)
    """Recipes or YAML files below all cells, as ``-c``; later ones win."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Configuration of all cells, over ``config``."""
    datasets: dict[str, DatasetConfig] = Field(min_length=1)
    """Name -> a prepared folder (a text), or ``prepare`` and ``seed``."""
    grid: list[dict[str, list[Any]]] = Field(min_length=1)
    """Axis -> values, or a list of such blocks whose cells add up. Axes: dataset, shots (numbers or all), k, objective
    (names, or mappings of the objective section), seed, start (sft or zero_shot: what the preference stage is trained
    from), data.shots_skip (the stages after SFT learn from the shots after this many), and any dotted key of the
    configuration outside data."""
    arms: list[Arm] = Field(default_factory=lambda: ["sft"])
    """Evaluated beside the cells: zero_shot (or untuned), the model before training; sft, after SFT; sft_continued,
    after as many more SFT steps as the preference stage has; sft_continued_compute, after as many as cost the same."""
    baselines: bool = True
    """Evaluate those of ``evaluation.baselines`` (and a simulator's oracle) on every dataset."""
    memorization: int = Field(0, ge=0)
    """Probe each pretrained model on this many titles and users of each dataset, for what it knows without training;
    0 leaves it out."""
    evaluate_on: Literal["own", "all"] = "own"
    """own: the dataset trained on; all: every other one too, for the cross-domain matrix."""
    sft_shots: int | Literal["cell", "all"] = "cell"
    """Training groups of the SFT start: as the cell's shots, all, or a number."""
    draw_shots: Literal["once", "per_seed"] = "once"
    """once: cells of all seeds train on the same shots; per_seed: each seed draws its own by ``data.shots_seed``, and
    intervals over seeds cover which examples there are."""

    @field_validator("datasets", mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {str(name): {"path": v} if isinstance(v, str) else v for name, v in value.items()}

    @field_validator("grid", mode="before")
    @classmethod
    def _blocks(cls, value: Any) -> Any:
        """One block is a list of one, one value a list of one."""
        blocks = value if isinstance(value, list) else [value]
        return [
            {str(axis): v if isinstance(v, list) else [v] for axis, v in block.items()}
            if isinstance(block, dict)
            else block
            for block in blocks
        ]

    def check(self) -> None:
        """Raise UserError for dataset names that are no file names, settings that belong elsewhere, and wrong axes."""
        for name in self.datasets:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", name):
                raise UserError(
                    f"datasets.{name}: a name of letters, digits, dots and hyphens is needed for its folders"
                )
        given = {"settings": self.settings} | {f"datasets.{n}.settings": d.settings for n, d in self.datasets.items()}
        for where, settings in given.items():
            for key in dotted(settings):
                if key in ("output_dir", "data.path", "seed", "data.shots"):
                    raise UserError(
                        f"{where}.{key}: cannot be set there; use the grid's output_dir, datasets, seed and shots"
                    )
                if key == "data.shots_seed":
                    raise UserError(f"{where}.{key}: cannot be set there; {OTHER_SHOTS}")
                if key == SKIP:
                    raise UserError(f"{where}.{key}: cannot be set there; write it as an axis of the grid")
        load_config(layers_of(self), settings_of(self), "its settings or the command line")
        for number, block in enumerate(self.grid):
            where = "grid" if len(self.grid) == 1 else f"grid, block {number + 1}"
            for axis, values in block.items():
                self._check_axis(axis, values, f"{where}: {axis}")

    def _check_axis(self, axis: str, values: list[Any], where: str) -> None:
        if not values:
            raise UserError(f"{where} is an empty list; give it a value or leave the axis out")
        known = list(self.datasets)
        for value in values if axis == "dataset" else []:
            if value not in known:
                raise UserError(f"{where}: no dataset {value!r}; the nearest is {nearest(str(value), known)}")
        if axis == START and not all(value in STARTS for value in values):
            raise UserError(f"{where}: cells start from sft (the default) or zero_shot, the model before training")
        for value in values:
            _check_value(axis, value, where)
        if axis in ("dataset", START) or axis in KEY_OF_AXIS:
            return
        if axis in KEY_OF_AXIS.values():
            short = next(name for name, key in KEY_OF_AXIS.items() if key == axis)
            raise UserError(f"{where}: write it as the axis {short}")
        if axis == "data.shots_seed":
            raise UserError(f"{where}: {OTHER_SHOTS}")
        if axis.split(".")[0] == "data" and axis != SKIP:
            raise UserError(f"{where}: decided when data is prepared; give a dataset for each value under datasets")
        if axis.split(".")[0] in NOT_TRAINING:
            raise UserError(f"{where}: does not change a trained model, so it is no axis; write it under settings")
        keys = list(dotted(RunConfig().model_dump()))
        if "." not in axis and axis not in keys:
            raise UserError(f"{where}: unknown axis; the nearest is {nearest(axis, [*AXES, *keys])}")
        for value in values:
            needed = ["data.shots=1"] if axis == SKIP else []
            try:
                load_config(layers_of(self), [*settings_of(self), *needed, override(axis, value)])
            except UserError as error:
                raise UserError(f"{where}: {last_line(error)}") from None


def _check_value(axis: str, value: Any, where: str) -> None:
    """Raise UserError for a value of which no name of a cell can be made; the schema checks what it is worth."""
    number = isinstance(value, int) and not isinstance(value, bool)
    if axis in ("seed", "k") and not number:
        raise UserError(f"{where}: {value!r} is not a whole number; write it without quotation marks, as in 3")
    if axis == "shots" and not number and value not in (None, ALL_SHOTS):
        raise UserError(f"{where}: {value!r} is neither a whole number nor all; write it without quotation marks")
    named = [value[key] for key in ("name", "import_path") if key in value] if isinstance(value, dict) else [value]
    if axis == "objective" and not all(isinstance(name, str) for name in named):
        raise UserError(f"{where}: {value!r} is neither the name of an objective nor a mapping of its options")


def require_heard(grid: GridConfig, given: Mapping[str, Any]) -> None:
    """Whether every key that is ``given`` for all cells, and every setting of a dataset, has an effect.

    Args:
        given: dotted key -> value, of the command line.

    Raises:
        UserError: an axis of the grid or a dataset sets a given key for some cells, or an axis sets a dataset's key for
            all its cells; the message says where.
    """
    for key in dotted(given):
        for block in grid.grid:
            if axis := _axis_that_sets(key, block, any):
                raise UserError(
                    f"{key} on the command line has no effect where the axis {axis} of the grid sets it; change the "
                    "axis, or leave it out of the grid"
                )
        for name, dataset in grid.datasets.items():
            own = {f"settings.{there}": there for there in dotted(dataset.settings)}
            own |= {f"prepare.{there}": f"data.{there}" for there in dotted(dataset.prepare or {})}
            if where := next((where for where, there in own.items() if _overlap(key, there)), None):
                raise UserError(
                    f"{key} on the command line has no effect where datasets.{name}.{where} sets it; change it there, "
                    "or leave it out there"
                )
    for name, dataset in grid.datasets.items():
        blocks = [block for block in grid.grid if name in datasets_of(block, grid)]
        for key in dotted(dataset.settings):
            axes = [_axis_that_sets(key, block, all) for block in blocks]
            if axes and all(axes):
                raise UserError(
                    f"datasets.{name}.settings.{key} has no effect: the axis {axes[0]} of the grid sets it for every "
                    "cell of the dataset; leave one of them out, or give the dataset a block of its own"
                )


def datasets_of(block: Mapping[str, list[Any]], grid: GridConfig) -> list[str]:
    """Names of the datasets that a block of the grid has cells of."""
    return block.get("dataset", list(grid.datasets))


def _axis_that_sets(
    key: str, block: Mapping[str, list[Any]], of_values: Callable[[Iterable[bool]], bool]
) -> str | None:
    """The axis of ``block`` of which ``any`` or ``all`` values set ``key``, None if there is none."""
    return next(
        (
            axis
            for axis, values in block.items()
            if of_values(any(_overlap(key, there) for there in _keys_set_by(axis, value)) for value in values)
        ),
        None,
    )


def _keys_set_by(axis: str, value: Any) -> list[str]:
    """The dotted keys of the configuration that a cell with this ``value`` of ``axis`` sets."""
    if axis in ("dataset", START) or value == {}:
        return []
    if axis != "objective" or not isinstance(value, dict):
        return list(dotted({KEY_OF_AXIS.get(axis, axis): value}))
    named = [KEY_OF_AXIS[axis]] if "import_path" in value else []  # by its class
    return [*named, *dotted({axis: value})]


def _overlap(key: str, other: str) -> bool:
    """Whether two dotted keys are one, or one of them is a section that holds the other."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def layers_of(grid: GridConfig) -> list[Path]:
    """The configuration files of all cells."""
    return [find_recipe(name, "config") for name in grid.config]


def settings_of(grid: GridConfig, dataset: str | None = None) -> list[str]:
    """``settings`` as ``key=value``, and those of a dataset over them."""
    own = grid.datasets[dataset].settings if dataset else {}
    return [override(key, value) for key, value in (dotted(grid.settings) | dotted(own)).items()]


def override(key: str, value: Any) -> str:
    """``key=value`` for ``load_config``, which reads JSON as the same value."""
    return f"{key}={as_json(value)}"


def as_json(value: Any) -> str:
    """JSON in one line; dates, which YAML recognises, become text."""
    return json.dumps(value, ensure_ascii=False, default=str)


def nearest(name: str, known: Sequence[str]) -> str:
    """The most similar of ``known``, compared by the whole key or by its last part."""
    return max(known, key=lambda k: max(_similar(name, k), _similar(name, k.rsplit(".", 1)[-1])))


def _similar(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def last_line(error: UserError) -> str:
    return str(error).splitlines()[-1].strip()
