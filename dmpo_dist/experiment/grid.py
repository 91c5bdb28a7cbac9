"""Reading a grid and expanding it into cells, one for each combination of values."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dmpo_dist.artifacts.files import write_whole
from dmpo_dist.config import RunConfig, load_config
from dmpo_dist.config.load import find_recipe, parse_value
from dmpo_dist.config.objective import PreferenceOptions
from dmpo_dist.config.section import dotted
from dmpo_dist.errors import UserError
from dmpo_dist.experiment.schema import (
    ALL_SHOTS,
    AXES,
    START,
    DatasetConfig,
    GridConfig,
    as_json,
    datasets_of,
    last_line,
    layers_of,
    nearest,
    override,
    require_heard,
    settings_of,
)
from dmpo_dist.parsing import parse_yaml, read_text

GRID_FILE = "grid.yaml"
LONGEST_VALUE = 40  # letters of a free axis's value in a cell's name
Free = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class GridCell:
    """One combination of the grid.

    Attributes:
        name: of its folder; made of the cell's own values alone, so that names stay the same when the grid grows.
        shots: number of training groups, None for all.
        objective: the objective's name and the options of its entry, such as ``dmpo-boundary``.
        own_shots: whether its seed draws them.
        free: the free axes, key -> value, ``start`` among them.
        config: all its settings except data.path, model.path and output_dir, which are set later.
    """

    name: str
    dataset: str
    shots: int | None
    k: int
    objective: str
    seed: int
    own_shots: bool
    free: Free
    config: RunConfig

    @property
    def from_zero_shot(self) -> bool:
        """Whether it is trained from the model before training, and not from its SFT start."""
        return dict(self.free).get(START) == "zero_shot"


def keep_grid(grid: GridConfig) -> None:
    """Write ``grid`` to its output_dir, from where ``read_grid`` reads it; files that it names get absolute paths."""
    content = grid.model_dump(mode="json", exclude_unset=True)
    content["config"] = [str(Path(name).absolute()) if Path(name).is_file() else name for name in grid.config]
    for name, dataset in grid.datasets.items():
        if dataset.path is not None:
            content["datasets"][name]["path"] = str(dataset.path.absolute())
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    write_whole(grid.output_dir / GRID_FILE, text)


def read_grid(file: Path, overrides: Sequence[str] = ()) -> GridConfig:
    """Read the grid in a YAML file, in the recipe of that name, or in the folder of a study that has begun.

    Args:
        file: of a folder, ``output_dir`` is that folder, wherever it was before.
        overrides: ``output_dir=...``, and ``key=value`` of the configuration for all cells.

    Raises:
        UserError: it cannot be read, a key or value is wrong, or the grid overrules a setting; the message names the
            file.
    """
    overrides = [*overrides, f"output_dir={file}"] if file.is_dir() else overrides
    path = _grid_of_study(file) if file.is_dir() else find_recipe(str(file), "GRID", prefix="experiment")
    text = read_text(path, "correct the path, or give another grid")
    try:
        content = parse_yaml(text)
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as YAML ({error}); correct it") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a mapping with datasets and grid, not a {type(content).__name__}")
    for text in overrides:
        key, _, value = text.partition("=")
        if key == "output_dir" and value:
            content["output_dir"] = value
    try:
        grid = GridConfig.model_validate(content)
        more = [text for text in overrides if not text.startswith("output_dir=")]
        given = _values_of(more)
        grid = grid.model_copy(update={"settings": dotted(grid.settings) | given})
        grid.check()
        require_heard(grid, given)
    except ValidationError as error:
        raise UserError(f"{path}:\n" + "\n".join(map(_explain, error.errors()))) from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return grid


def expand(grid: GridConfig) -> list[GridCell]:
    """Every combination of every block once, sorted so that cells of equal dataset, shots and seed are neighbours.

    Raises:
        UserError: a combination occurs twice in a block, or a cell's configuration is not valid.
    """
    bases = {name: load_config(layers_of(grid), settings_of(grid, name)) for name in grid.datasets}
    cells: dict[str, GridCell] = {}
    for block in grid.grid:
        names: set[str] = set()
        for cell in _expand_block(block, grid, bases):
            if cell.name in names:
                raise UserError(f"the cell {cell.name} comes up twice in the grid; remove the repeated value")
            names.add(cell.name)
            cells.setdefault(cell.name, cell)
    _require_different(cells.values())
    return sorted(cells.values(), key=lambda c: (list(grid.datasets).index(c.dataset), c.shots or 10**12, c.seed))


def _grid_of_study(folder: Path) -> Path:
    if not (folder / GRID_FILE).is_file():
        raise UserError(f"{folder}: holds no study to go on with (no {GRID_FILE}); name its grid")
    return folder / GRID_FILE


def _values_of(overrides: Iterable[str]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for text in overrides:
        key, sep, raw = text.partition("=")
        if not sep or not key:
            raise UserError(f"{text!r} is not of the form key=value, for example train.learning_rate=1e-4")
        flat[key] = parse_value(raw)
    return flat


def _expand_block(block: dict[str, list[Any]], grid: GridConfig, bases: Mapping[str, RunConfig]) -> Iterable[GridCell]:
    # Sorted, so that a cell has one name in whichever order a block lists its axes.
    free = sorted(axis for axis in block if axis not in AXES)
    for dataset in datasets_of(block, grid):
        base = bases[dataset]  # an axis that the block leaves out has the dataset's own value
        defaults = {
            "shots": [base.data.shots or ALL_SHOTS],
            "seed": [base.seed],
            "k": [base.train.negatives],
            "objective": [base.objective.name],
        }
        values = [block.get(axis, default) for axis, default in defaults.items()]
        for shots, seed, *others in product(*values[:2], *(block[axis] for axis in free), *values[2:]):
            k, objective = others[-2:]
            options = objective if isinstance(objective, dict) else {"name": objective}
            name = options["import_path"].rpartition(":")[2] if "import_path" in options else base.objective.name
            options = {"name": name} | options
            yield _make_cell(grid, dataset, (shots, seed, k), options, tuple(zip(free, others[:-2], strict=True)))


def _make_cell(grid: GridConfig, dataset: str, values: Sequence[Any], options: dict[str, Any], free: Free) -> GridCell:
    shots, seed, k = values
    few = None if shots in (None, ALL_SHOTS) else shots
    name = f"{dataset}_shots-{few or ALL_SHOTS}_k-{k}_{_as_file_name(_label(options))}"
    name = f"{name}_seed-{seed}{free_part(free)}"
    set_twice = sorted({f"objective.{key}" for key in options} & {key for key, _ in free})
    if set_twice:
        raise UserError(f"{set_twice[0]} is set by the axis objective and by an axis of its own; remove one of them")
    overrides = [override("data.shots", few), override("seed", seed), override("train.negatives", k)]
    own_shots = few is not None and grid.draw_shots == "per_seed"
    if own_shots:
        overrides.append(override("data.shots_seed", seed))
    overrides += [override(f"objective.{key}", value) for key, value in options.items()]
    overrides += [override(key, value) for key, value in free if key != START]
    try:
        config = load_config(layers_of(grid), [*settings_of(grid, dataset), *overrides])
    except UserError as error:
        raise UserError(f"the cell {name}: {last_line(error)}") from None
    named = options | {key.removeprefix("objective."): value for key, value in free}
    label = _label(_of_base(config.objective, named) | options)
    return GridCell(name, dataset, few, k, label, seed, own_shots, free, config)


def _label(options: Mapping[str, Any]) -> str:
    return "-".join([options["name"], *(_option(*option) for option in options.items() if option[0] != "name")])


def _of_base(objective: Any, named: Iterable[str]) -> dict[str, Any]:
    """Options that the layers below the grid changed, such as a likelihood term, but for those in ``named``."""
    if not isinstance(objective, PreferenceOptions):
        return {}
    changed = objective.model_dump(mode="json", exclude_defaults=True, exclude={*named} - {"name"})
    return {"name": objective.name} | changed


def free_part(free: Iterable[tuple[str, Any]]) -> str:
    """The part of a name that the free axes add."""
    return "".join(f"_{key}-{_as_file_name(v if isinstance(v, str) else as_json(v))}" for key, v in free)


def _option(key: str, value: Any) -> str:
    return value if isinstance(value, str) else key if value is True else f"{key}{value}"


def _as_file_name(text: str) -> str:
    """``text`` if it may be part of a file name; else its allowed characters and a hash that keeps it unique."""
    plain = re.sub(r"[^A-Za-z0-9.+-]+", "-", text)[:LONGEST_VALUE]
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def _require_different(cells: Iterable[GridCell]) -> None:
    """Raise UserError where two cells have equal settings."""
    seen: dict[str, str] = {}
    for cell in cells:
        content = f"{cell.dataset} {cell.from_zero_shot} {cell.config.model_dump_json()}"
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
