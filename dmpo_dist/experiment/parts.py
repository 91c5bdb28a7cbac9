"""The models that the cells of a grid need, each trained once: SFT starts, SFT continued, and the cells themselves."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from dmpo_dist.commands.quickstart import PASSED_ON, continued_config
from dmpo_dist.commands.train import SCRATCH, require_rows
from dmpo_dist.config import DataConfig, ReferenceConfig, RunConfig, TrainConfig
from dmpo_dist.config.section import dotted
from dmpo_dist.data.store import PreparedData
from dmpo_dist.errors import UserError
from dmpo_dist.experiment.compute import equal_compute
from dmpo_dist.experiment.datasets import named_path, prepared_by
from dmpo_dist.experiment.grid import Free, GridCell, free_part
from dmpo_dist.experiment.schema import ALL_SHOTS, SKIP, START, GridConfig
from dmpo_dist.modeling.backbone import find_model
from dmpo_dist.modeling.model_files import weights_key
from dmpo_dist.parsing import parse_json, read_text
from dmpo_dist.training.job import Job, Kind

Role = Literal["start", "continued", "compute", "cell"]
FOLDERS = {"start": "sft", "continued": "sft_continued", "compute": "sft_continued_compute", "cell": "cells"}
CONTINUED: dict[str, Role] = {"sft_continued": "continued", "sft_continued_compute": "compute"}
"""Arm -> role of the SFT continued: for as many steps as the preference stage has, or for as many as cost the same."""
PREFERENCE_SECTIONS = ("objective", "reference")
WITHOUT = {
    "start": ("train", "data", START, *PREFERENCE_SECTIONS),
    "continued": (START, *PREFERENCE_SECTIONS),
    "compute": (START, *PREFERENCE_SECTIONS),
    "cell": (),
}
"""Role -> sections of the configuration, and axes, that its parts do not depend on."""
ALSO_PASSED_ON = ("select", "select_metric", "max_grad_norm", "log_every")
"""Settings of the preference stage that SFT continued shares in a study, beside those that it shares everywhere."""
UNTUNED, ZERO_SHOT = "untuned", "zero_shot"
"""The model before training, as evaluations and arms call it; a pretrained one is called zero-shot in tables."""
DEEPSPEED_CONTENT = "deepspeed_json"
"""What a part's settings call the content of the file that ``deepspeed`` names."""
NO_INFLUENCE = ("token_budget", "checkpoint_every", "keep_checkpoints", "log_every")
"""Keys of a stage that change how it runs but not the model it ends with."""


@dataclass(frozen=True)
class Part:
    """One model of an experiment: a run folder, its evaluations, its stamp.

    Attributes:
        role: the model of a cell, the SFT start that a cell needs, or that start continued by SFT, for equal steps or
            for equal compute.
        name: the name of its folder.
        folder: holds its settings, run, evaluations and stamp.
        config: the configuration of its stage; ``output_dir`` is ``folder / stage``.
        start: name of the SFT start it is trained from, or compared with where it is trained from the model before
            that; None for a start itself, and for a cell that needs none.
        cell: its cell; for a start or a continued one a cell that needs it, with the same dataset and seed.
        shots: number of its training groups, None for all.
        free: the free axes it depends on, key -> value.
        measured: name in tables -> model to evaluate; for an SFT start, or a cell without one, these may include the
            untuned model.
        evaluate_on: names of the datasets to evaluate these models on.
        settings: all settings that its weights depend on, dotted key -> value.
        others: of a cell: arm -> title of the part that holds what it is compared with, beside its start: SFT
            continued, and without a start the model before training.
    """

    role: Role
    name: str
    folder: Path
    config: RunConfig
    start: str | None
    cell: GridCell
    shots: int | None
    free: Free
    measured: dict[str, Path]
    evaluate_on: tuple[str, ...]
    settings: dict[str, Any]
    others: Mapping[str, str] = field(default_factory=dict)

    def called(self, model: str) -> str:
        """What tables call one of ``measured``."""
        return ZERO_SHOT if model == UNTUNED and self.config.model.path != SCRATCH else model

    @property
    def distinct(self) -> str:
        """What tells the model from others of its role on the same groups: free axes, and steps at equal compute."""
        steps = [length.strip("_").replace("-", "=")] if (length := _length(self.role, self.config)) else []
        return ", ".join([*steps, *_texts(self.free)])

    @property
    def distinct_before(self) -> str:
        """What tells the model before training from others of its groups."""
        return ", ".join(_texts(axis for axis in self.free if _counts("start", axis[0])))

    @property
    def from_before_training(self) -> bool:
        """Whether it is trained from the model before any training, and not from an SFT start."""
        return self.role == "start" or (self.role == "cell" and self.cell.from_zero_shot)

    @property
    def kind(self) -> Kind:
        """The kind of the stage that trains it."""
        return "preference" if self.role == "cell" else "sft"

    @property
    def stage(self) -> Literal["sft", "train"]:
        """The section of the configuration for that stage."""
        return "train" if self.role == "cell" else "sft"

    @property
    def run(self) -> Path:
        """The stage's ``output_dir``."""
        return self.folder / self.stage

    @property
    def model(self) -> Path:
        """The trained model."""
        return self.run / "model"

    @property
    def title(self) -> str:
        """The path of its folder in the folder of the experiment."""
        return f"{FOLDERS[self.role]}/{self.name}"

    @property
    def settings_hash(self) -> str:
        """A hash of all settings that its weights depend on."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]


def make_parts(grid: GridConfig, cells: Sequence[GridCell], data: Mapping[str, PreparedData]) -> list[Part]:
    """Every model that the cells need once, each after the start it needs.

    Args:
        data: the datasets that exist already; the others have no fingerprint yet.

    Raises:
        UserError: a dataset has fewer groups or negatives than a cell asks for, or the grid has all its groups twice.
    """
    for dataset in data:
        _require_all_once([cell for cell in cells if cell.dataset == dataset], data[dataset])
    parts: dict[str, Part] = {}
    asked: set[str] = {*grid.arms}
    of_start = asked - {UNTUNED, ZERO_SHOT}  # these are its models, or go on from it
    before: dict[str, str] = {}  # name of a start that is not needed -> title of the cell that the model before is with
    for cell in cells:
        config = _on_dataset(cell.config, cell, grid, data)
        with_start = bool(of_start) or not cell.from_zero_shot
        if cell.dataset in data:
            _require_enough(config, cell, data[cell.dataset], ("sft", "preference") if with_start else ("preference",))
        start = None
        if with_start:
            start = _part("start", config, cell, None, grid, data)
            parts.setdefault(start.title, start)
            _require_other_shots(cell, start)
        part = _part("cell", config, cell, start, grid, data)
        others: dict[str, str] = {}
        if start is None and asked:
            name = _part("start", config, cell, None, grid, data).name
            others[part.called(UNTUNED)] = before.setdefault(name, part.title)
            if before[name] == part.title:
                part = replace(
                    part, measured={UNTUNED: _before_training(part.run, part.config.model.path)} | part.measured
                )
        for arm in filter(asked.__contains__, CONTINUED):
            longer = _continued(config, arm, there=cell.dataset in data)
            other = _part(CONTINUED[arm], longer, cell, start, grid, data)
            parts.setdefault(other.title, other)
            others[arm] = other.title
        parts[part.title] = replace(part, others=others)
    return list(parts.values())


def _continued(config: RunConfig, arm: str, there: bool) -> RunConfig:
    """SFT for as many steps as the preference stage of ``config``, or at equal compute once its data is there."""
    same = {key: getattr(config.train, key) for key in ALSO_PASSED_ON}
    longer = continued_config(config)
    longer = longer.model_copy(update={"sft": longer.sft.model_copy(update=same)})
    return equal_compute(longer, config) if CONTINUED[arm] == "compute" and there else longer


def _part(
    role: Role,
    config: RunConfig,
    cell: GridCell,
    start: Part | None,
    grid: GridConfig,
    data: Mapping[str, PreparedData],
) -> Part:
    """The part of this role that ``cell`` needs.

    Its name and settings hold only what it depends on, so cells that differ in other keys share the part.
    """
    shots = cell.shots
    if role == "start":
        shots = grid.sft_shots if isinstance(grid.sft_shots, int) else cell.shots if grid.sft_shots == "cell" else None
        config = config.model_copy(update={"data": with_shots(config.data, shots, _seed_of_shots(grid, cell))})
    free = tuple(axis for axis in cell.free if _counts(role, axis[0]))
    name = f"{cell.dataset}_shots-{shots or ALL_SHOTS}{_length(role, config)}_seed-{cell.seed}{free_part(free)}"
    name = cell.name if role == "cell" else name
    folder = grid.output_dir.absolute() / FOLDERS[role] / name
    stage = "train" if role == "cell" else "sft"
    changes: dict[str, Any] = {"output_dir": folder / stage}
    if stage == "sft":  # shared by cells that differ in these
        changes |= {"train": TrainConfig(), "objective": RunConfig().objective, "reference": ReferenceConfig()}
    if config.tracking.wandb or config.tracking.mlflow:
        shown = config.tracking.name or f"{FOLDERS[role]}/{name}"
        changes["tracking"] = config.tracking.model_copy(update={"name": shown})
    trained_from = None if role == "cell" and cell.from_zero_shot else start
    if trained_from is not None:
        changes["model"] = config.model.model_copy(update={"path": str(trained_from.model)})
    config = config.model_copy(update=changes)
    datasets = tuple(grid.datasets) if grid.evaluate_on == "all" else (cell.dataset,)
    measured = _measured(role, folder / stage, config.model.path, cell, grid)
    fingerprint = data[cell.dataset].fingerprint if cell.dataset in data else None
    return Part(
        role=role,
        name=name,
        folder=folder,
        config=config,
        start=None if start is None else start.name,
        cell=cell,
        shots=shots,
        free=free,
        measured=measured,
        evaluate_on=datasets if measured else (),
        settings=_settings(config, stage, fingerprint, trained_from.settings_hash if trained_from else None),
    )


def _counts(role: Role, axis: str) -> bool:
    """Whether a part of this role depends on ``axis``, a key of the configuration or ``START``."""
    section, *key = axis.split(".")
    if section in WITHOUT[role]:
        return False
    return role == "cell" or section != "train" or key[0] in (*PASSED_ON, *ALSO_PASSED_ON)


def _length(role: Role, config: RunConfig) -> str:
    """What tells SFT at equal compute from others on its groups: cells of another K may need other numbers of steps."""
    if role != "compute":
        return ""
    sft = config.sft
    return f"_epochs-{sft.epochs:.4g}" if sft.steps is None else f"_steps-{sft.steps}"


def _measured(role: str, run: Path, start: str, cell: GridCell, grid: GridConfig) -> dict[str, Path]:
    if role == "cell":
        return {cell.objective: run / "model"}
    for arm, of_arm in CONTINUED.items():
        if role == of_arm:
            return {arm: run / "model"}
    models = {UNTUNED: _before_training(run, start), "sft": run / "model"}
    arms = {UNTUNED if arm == ZERO_SHOT else arm for arm in grid.arms}
    return {name: path for name, path in models.items() if name in arms}


def _before_training(run: Path, start: str) -> Path:
    """The model that a run begins with."""
    return run / SCRATCH if start == SCRATCH else Path(start)


def _texts(axes: Iterable[tuple[str, Any]]) -> list[str]:
    return [f"{key}={value}" for key, value in axes]


def _settings(config: RunConfig, stage: str, fingerprint: str | None, start: str | None) -> dict[str, Any]:
    """The settings that the weights depend on: not the number of workers, nor for SFT those of the preference stage."""
    content = config.model_dump(mode="json", include={"seed", "template", "model", "deepspeed", stage})
    if stage == "train":
        content |= config.model_dump(mode="json", include=set(PREFERENCE_SECTIONS))
    if config.deepspeed.endswith(".json"):
        content[DEEPSPEED_CONTENT] = _json_of(Path(config.deepspeed))
    if start is not None:
        content["model"]["path"] = f"the SFT start {start}"
    elif Path(config.model.path).is_dir():
        content["model"]["weights"] = _weights(config.model.path)
    drawn = {key: drawn for key in ("shots_seed", "shots_skip") if (drawn := getattr(config.data, key))}
    flat = dotted(content | {"data": {"fingerprint": fingerprint, "shots": config.data.shots} | drawn})
    ignored = {f"{stage}.{name}" for name in NO_INFLUENCE}
    ignored |= set() if config.template.lists_candidates else {"template.candidate", "sft.negatives"}
    return {key: value for key, value in flat.items() if key not in ignored}


def _json_of(file: Path) -> Any:
    """What a DeepSpeed configuration of the user's own says, which may be edited in place."""
    try:
        return parse_json(read_text(file, "bring the file back, or set deepspeed to another"))
    except ValueError as error:
        raise UserError(f"deepspeed={file}: cannot be read as JSON ({error}); correct it") from None


def with_shots(config: DataConfig, shots: int | None, seed: int | None) -> DataConfig:
    """``config`` with the first training groups that ``seed`` draws, None for all, or for the seed that it has."""
    drawn = config.shots_seed if seed is None else seed
    return config.model_copy(update={"shots": shots, "shots_seed": 0 if shots is None else drawn, "shots_skip": 0})


def _seed_of_shots(grid: GridConfig, cell: GridCell) -> int | None:
    return cell.seed if grid.draw_shots == "per_seed" else None


@cache
def _weights(model: str) -> str:
    """A hash of the content of a model's folder, which may be trained again in place; read once in a process."""
    return hashlib.sha256(json.dumps(weights_key(find_model(model)), sort_keys=True).encode()).hexdigest()[:16]


def _on_dataset(config: RunConfig, cell: GridCell, grid: GridConfig, data: Mapping[str, PreparedData]) -> RunConfig:
    """The configuration with the dataset's path and with absolute paths, as they will be saved in the run folder."""
    own = {"path": named_path(data, cell.dataset, grid), **prepared_by(grid, cell.dataset)}
    changes: dict[str, Any] = {"data": config.data.model_copy(update=own)}
    if config.deepspeed.endswith(".json"):
        changes["deepspeed"] = str(Path(config.deepspeed).absolute())
    if config.reference.path is not None:
        changes["reference"] = config.reference.model_copy(update={"path": config.reference.path.absolute()})
    if Path(config.model.path).exists():
        changes["model"] = config.model.model_copy(update={"path": str(Path(config.model.path).absolute())})
    return config.model_copy(update=changes)


def _require_all_once(cells: Sequence[GridCell], data: PreparedData) -> None:
    """Raise UserError where a number of shots is that of all groups, beside cells with all: tables would mix them."""
    shots = {cell.shots for cell in cells}
    if {None, len(data.train)} <= shots:
        raise UserError(
            f"the grid has shots={len(data.train)} and shots={ALL_SHOTS}, but these are all training groups of "
            f"{data.path}; leave one of them out"
        )


def _require_other_shots(cell: GridCell, start: Part) -> None:
    """Raise UserError where groups that a cell learns from instead of those of its SFT start are some of those."""
    skipped = cell.config.data.shots_skip
    if skipped and not cell.from_zero_shot and (start.shots is None or skipped < start.shots):
        raise UserError(
            f"the cell {cell.name}: {SKIP}={skipped}, but its SFT start learns from shots={start.shots or ALL_SHOTS}, "
            "some of which the cell would learn from again; skip at least as many, or set sft_shots beside grid"
        )


def _require_enough(config: RunConfig, cell: GridCell, data: PreparedData, stages: Sequence[Kind]) -> None:
    """Raise UserError for a lack of groups, or rows that one of the ``stages`` cannot be trained on, now, and not hours
    later when the cell is trained."""
    if cell.shots is not None and cell.shots + config.data.shots_skip > len(data.train):
        after = f" after {SKIP}={config.data.shots_skip}" if config.data.shots_skip else ""
        raise UserError(
            f"the cell {cell.name}: shots={cell.shots}{after}, but {data.path} holds {len(data.train)} training "
            "groups; take that number out of the grid, or give the dataset a block of its own"
        )
    try:
        for stage in stages:
            require_rows(Job(stage, config, config.model.path, config.output_dir), data)
    except UserError as error:
        raise UserError(f"the cell {cell.name}: {error}") from None
