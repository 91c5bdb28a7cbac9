"""The grid of an experiment: a YAML file, checked, and every combination in it as a cell."""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from dmpo_dist.config import RunConfig, load_config
from dmpo_dist.config_section import Section, dotted
from dmpo_dist.errors import UserError

AXES = ("dataset", "shots", "seed", "k", "objective")
KEY_OF_AXIS = {"shots": "data.shots", "seed": "seed", "k": "train.negatives", "objective": "objective.name"}
NOT_TRAINING = ("output_dir", "version", "cluster", "submit", "tracking", "ranking", "evaluation")
ALL_SHOTS = "all"
LONGEST_VALUE = 40  # of a free axis in a cell's name


class DatasetConfig(Section):
    """Prepared data, or how to prepare it."""

    path: Path | None = None
    """Folder that ``dmpo data prepare`` wrote."""
    prepare: dict[str, Any] | None = None
    """Keys of the ``data`` section to prepare it by, over those of ``config`` and ``settings``; goes to output_dir/data."""
    seed: int = Field(0, ge=0)
    """Seed of that preparation. Cells of any seed share the data, so that they are measured on the same candidates."""

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
    """Axis -> values, or a list of such blocks whose cells add up. Axes: dataset, shots (numbers or all), k, objective (names,
    or mappings of the objective section), seed, and any dotted key of the configuration."""
    arms: list[Literal["untuned", "sft", "sft_continued"]] = Field(default_factory=lambda: ["sft"])
    """Evaluated beside the cells: the model before training, after SFT, and after as many further SFT steps as the cell's."""
    baselines: bool = True
    """Evaluate random, popularity and item-kNN (and a simulator's oracle) on every dataset."""
    evaluate_on: Literal["own", "all"] = "own"
    """own: the dataset trained on; all: every other one too, for the cross-domain matrix."""
    sft_shots: int | Literal["cell", "all"] = "cell"
    """Training groups of the SFT start: as the cell's shots, all, or a number."""

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
            {str(axis): v if isinstance(v, list) else [v] for axis, v in block.items()} if isinstance(block, dict) else block
            for block in blocks
        ]  # fmt: skip

    def check(self) -> None:
        """Raise UserError for what only the values show: names that are no file names, axes, empty lists."""
        for name in self.datasets:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", name):
                raise UserError(
                    f"datasets.{name}: a name of letters, digits, dots and hyphens is needed for its folders"
                )
        for key in dotted(self.settings):
            if key in ("output_dir", "data.path", "seed", "data.shots"):
                raise UserError(f"settings.{key}: not here; the grid's own output_dir, datasets, seed and shots say it")
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
        if axis == "dataset" or axis in KEY_OF_AXIS:
            return
        if axis in KEY_OF_AXIS.values():
            short = next(name for name, key in KEY_OF_AXIS.items() if key == axis)
            raise UserError(f"{where}: write it as the axis {short}")
        if axis.split(".")[0] == "data":
            raise UserError(f"{where}: decided when data is prepared; give a dataset for each value under datasets")
        if axis.split(".")[0] in NOT_TRAINING:
            raise UserError(f"{where}: does not change a trained model, so it is no axis; write it under settings")
        keys = list(dotted(RunConfig().model_dump()))
        if "." not in axis and axis not in keys:
            raise UserError(f"{where}: unknown axis; the nearest is {nearest(axis, [*AXES, *keys])}")
        for value in values:
            try:
                load_config(layers_of(self), [*settings_of(self), override(axis, value)])
            except UserError as error:
                raise UserError(f"{where}: {_last_line(error)}") from None


@dataclass(frozen=True)
class Cell:
    """One combination of the grid.

    Attributes:
        name: its folder, readable and made of its own values alone, so that a grown grid keeps the names it had.
        shots: None is all.
        objective: the objective's name and what else its entry sets, such as ``dmpo-boundary``.
        free: the free axes, key -> value.
        config: all its settings; data.path, model.path and output_dir are still to be set.
    """

    name: str
    dataset: str
    shots: int | None
    k: int
    objective: str
    seed: int
    free: tuple[tuple[str, Any], ...]
    config: RunConfig


def read_grid(file: Path, overrides: Sequence[str] = ()) -> GridConfig:
    """The grid in a YAML file, or in the recipe of that name.

    Args:
        overrides: ``output_dir=...``, or ``key=value`` of the configuration, for all cells.

    Raises:
        UserError: it cannot be read, or a key or value is wrong; the message names the file.
    """
    path = find_recipe(str(file), "GRID")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())}); correct it") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a mapping with datasets and grid, not a {type(content).__name__}")
    for text in overrides:
        key, _, value = text.partition("=")
        if key == "output_dir" and value:
            content["output_dir"] = value
    try:
        grid = GridConfig.model_validate(content)
        more = [text for text in overrides if not text.startswith("output_dir=")]
        grid = grid.model_copy(update={"settings": _with_overrides(grid.settings, more)})
        load_config(layers_of(grid), settings_of(grid))
        grid.check()
    except ValidationError as error:
        raise UserError(f"{path}:\n" + "\n".join(map(_explain, error.errors()))) from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return grid


def find_recipe(name: str, what: str) -> Path:
    """The file, or the recipe, of this name."""
    folder = resources.files("dmpo_dist.recipes")
    recipe = folder / f"{name}.yaml"
    if Path(name).is_file() or recipe.is_file():
        return Path(name) if Path(name).is_file() else Path(str(recipe))
    known = sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
    if what == "GRID":
        known = [name for name in known if name.startswith("experiment")]
    raise UserError(f"{what} {name}: no such file, and no recipe of that name; recipes are {', '.join(known)}")


def layers_of(grid: GridConfig) -> list[Path]:
    """The files below all cells."""
    return [find_recipe(name, "config") for name in grid.config]


def settings_of(grid: GridConfig) -> list[str]:
    """``settings`` as ``key=value``."""
    return [override(key, value) for key, value in dotted(grid.settings).items()]


def override(key: str, value: Any) -> str:
    """``key=value`` for ``load_config``, which reads JSON as the same value."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def expand(grid: GridConfig) -> list[Cell]:
    """Every combination of every block once; those of equal dataset, shots and seed follow each other.

    Raises:
        UserError: a combination comes up twice, or a cell's configuration is not valid.
    """
    base = load_config(layers_of(grid), settings_of(grid))
    cells: dict[str, Cell] = {}
    for block in grid.grid:
        mine: set[str] = set()
        for cell in _expand_block(block, grid, base):
            if cell.name in mine:
                raise UserError(f"the cell {cell.name} comes up twice in the grid; remove the repeated value")
            mine.add(cell.name)
            cells.setdefault(cell.name, cell)
    _require_different(cells.values())
    return sorted(cells.values(), key=lambda c: (list(grid.datasets).index(c.dataset), c.shots or 10**12, c.seed))


def nearest(name: str, known: Sequence[str]) -> str:
    """The most similar of ``known``, a whole key or its last part."""
    return max(known, key=lambda k: max(_similar(name, k), _similar(name, k.rsplit(".", 1)[-1])))


def _similar(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def _with_overrides(settings: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    flat = dotted(settings)
    for text in overrides:
        key, sep, raw = text.partition("=")
        if not sep or not key:
            raise UserError(f"{text!r} is not of the form key=value, for example train.learning_rate=1e-4")
        flat[key] = yaml.safe_load(raw) if raw else ""
    return flat


def _expand_block(block: dict[str, list[Any]], grid: GridConfig, base: RunConfig) -> Iterable[Cell]:
    defaults = {
        "dataset": list(grid.datasets),
        "shots": [ALL_SHOTS],
        "seed": [base.seed],
        "k": [base.train.negatives],
        "objective": [base.objective.name],
    }
    free = [axis for axis in block if axis not in AXES]
    values = [block.get(axis, defaults[axis]) for axis in AXES]
    for dataset, shots, seed, *others in product(*values[:3], *(block[axis] for axis in free), *values[3:]):
        k, objective = others[-2:]
        options = {"name": base.objective.name} | (objective if isinstance(objective, dict) else {"name": objective})
        yield _make_cell(grid, dataset, shots, seed, k, options, tuple(zip(free, others[:-2], strict=True)))


def _make_cell(
    grid: GridConfig, dataset: str, shots: Any, seed: Any, k: Any, options: dict[str, Any],
    free: tuple[tuple[str, Any], ...],
) -> Cell:  # fmt: skip
    label = "-".join(map(str, [options["name"], *(_option(*o) for o in options.items() if o[0] != "name")]))
    few = None if shots in (None, ALL_SHOTS) else shots
    name = f"{dataset}_shots-{few or ALL_SHOTS}_k-{k}_{_as_file_name(label)}"
    name = f"{name}_seed-{seed}{free_part(free)}"
    set_twice = sorted({f"objective.{key}" for key in options} & {key for key, _ in free})
    if set_twice:
        raise UserError(f"{set_twice[0]} is set by the axis objective and by an axis of its own; remove one of them")
    overrides = [override("data.shots", few), override("seed", seed), override("train.negatives", k)]
    overrides += [override(f"objective.{key}", value) for key, value in options.items()]
    overrides += [override(key, value) for key, value in free]
    try:
        config = load_config(layers_of(grid), [*settings_of(grid), *overrides])
    except UserError as error:
        raise UserError(f"the cell {name}: {_last_line(error)}") from None
    return Cell(name, dataset, few, k, label, seed, free, config)


def free_part(free: Iterable[tuple[str, Any]]) -> str:
    """What free axes add to a name."""
    return "".join(f"_{key}-{_as_file_name(v if isinstance(v, str) else json.dumps(v))}" for key, v in free)


def _option(key: str, value: Any) -> str:
    return value if isinstance(value, str) else key if value is True else f"{key}{value}"


def _as_file_name(text: str) -> str:
    """``text`` where it can stand in a file name, else what can, and a few digits that tell it from others."""
    plain = re.sub(r"[^A-Za-z0-9.+-]+", "-", text)[:LONGEST_VALUE]
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def _require_different(cells: Iterable[Cell]) -> None:
    """No two cells train the same."""
    seen: dict[str, str] = {}
    for cell in cells:
        content = f"{cell.dataset} {cell.config.model_dump_json()}"
        if content in seen:
            raise UserError(f"the cells {seen[content]} and {cell.name} have equal settings; remove one of them")
        seen[content] = cell.name


def _explain(error: Any) -> str:
    path = [str(part) for part in error["loc"]]
    if error["type"] == "extra_forbidden":
        fields = DatasetConfig.model_fields if path[0] == "datasets" else GridConfig.model_fields
        return f"  {'.'.join(path)}: unknown key; the nearest known key is {nearest(path[-1], list(fields))}"
    if error["type"] == "missing":
        return f"  {'.'.join(path)} is missing; it must be given"
    return f"  {'.'.join(path)}: {error['msg'].removeprefix('Value error, ')} (got {error['input']!r})"


def _last_line(error: UserError) -> str:
    return str(error).splitlines()[-1].strip()
