"""The models that the cells of a grid need, each trained once: SFT starts, SFT continued, and the cells themselves."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dmpo_dist.commands.quickstart import continued_config
from dmpo_dist.commands.train import require_reorderable
from dmpo_dist.config import ReferenceConfig, RunConfig, TrainConfig
from dmpo_dist.config.section import dotted
from dmpo_dist.data.store import PreparedData
from dmpo_dist.errors import UserError
from dmpo_dist.experiment.datasets import named_path
from dmpo_dist.experiment.grid import Free, GridCell, free_part
from dmpo_dist.experiment.schema import ALL_SHOTS, GridConfig
from dmpo_dist.training.groups import require_negatives
from dmpo_dist.training.job import Kind

Role = Literal["start", "continued", "cell"]
FOLDERS = {"start": "sft", "continued": "sft_continued", "cell": "cells"}
PREFERENCE_SECTIONS = ("objective", "reference")
WITHOUT = {"start": ("train", *PREFERENCE_SECTIONS), "continued": PREFERENCE_SECTIONS, "cell": ()}
"""Sections of the configuration that a part of each role does not depend on."""
NO_INFLUENCE = ("token_budget", "checkpoint_every", "keep_checkpoints", "log_every")
"""Of a stage: what changes how it runs, and not what it ends with."""


@dataclass(frozen=True)
class Part:
    """One model of an experiment: a run folder, its evaluations, its stamp.

    Attributes:
        role: a cell's model, the SFT start it needs, or that start trained on by SFT.
        name: of its folder.
        folder: where its settings, run, evaluations and stamp are.
        config: of its stage; ``output_dir`` is ``folder / stage``.
        start: name of the SFT start it is trained from; None for a start itself.
        cell: the cell, or for the others one that needs it: they share dataset and seed.
        shots: its training groups, None for all.
        free: the free axes it depends on, key -> value.
        measured: name in tables -> model, of those asked for; an SFT start also has what it started from, untuned.
        evaluate_on: names of the datasets to measure them on.
        settings: what its weights depend on, dotted key -> value.
        continued: title of the SFT continued that a cell is compared with; None for the others, and without that arm.
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
    continued: str | None = None

    @property
    def kind(self) -> Kind:
        """Of the stage it is trained by."""
        return "preference" if self.role == "cell" else "sft"

    @property
    def stage(self) -> Literal["sft", "train"]:
        """That stage's section of the configuration."""
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
        """Its folder below the experiment's."""
        return f"{FOLDERS[self.role]}/{self.name}"

    @property
    def settings_hash(self) -> str:
        """Changes with everything its weights depend on."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:16]


def make_parts(grid: GridConfig, cells: Sequence[GridCell], data: Mapping[str, PreparedData]) -> list[Part]:
    """Every model once, each after the start it needs.

    Args:
        data: the datasets that are there already; the others have no fingerprint yet.

    Raises:
        UserError: a dataset has fewer groups or negatives than a cell asks for.
    """
    parts: dict[str, Part] = {}
    for cell in cells:
        config = _on_dataset(cell.config, cell, grid, data)
        if cell.dataset in data:
            _require_enough(config, cell, data[cell.dataset])
        start = _part("start", config, cell, None, grid, data)
        parts.setdefault(start.title, start)
        part = _part("cell", config, cell, start, grid, data)
        if "sft_continued" in grid.arms:
            same = {
                key: getattr(config.train, key) for key in ("select", "select_metric", "max_grad_norm", "log_every")
            }
            longer = continued_config(config)
            longer = longer.model_copy(update={"sft": longer.sft.model_copy(update=same)})
            continued = _part("continued", longer, cell, start, grid, data)
            parts.setdefault(continued.title, continued)
            part = replace(part, continued=continued.title)
        parts[part.title] = part
    return list(parts.values())


def _part(
    role: Role,
    config: RunConfig,
    cell: GridCell,
    start: Part | None,
    grid: GridConfig,
    data: Mapping[str, PreparedData],
) -> Part:
    """The part of this role that ``cell`` needs; cells that differ only in what it does not depend on share it."""
    shots = cell.shots
    if role == "start":
        shots = grid.sft_shots if isinstance(grid.sft_shots, int) else cell.shots if grid.sft_shots == "cell" else None
        config = config.model_copy(update={"data": config.data.model_copy(update={"shots": shots})})
    free = tuple(axis for axis in cell.free if axis[0].split(".")[0] not in WITHOUT[role])
    name = f"{cell.dataset}_shots-{shots or ALL_SHOTS}_seed-{cell.seed}{free_part(free)}"
    name = cell.name if role == "cell" else name
    folder = grid.output_dir.absolute() / FOLDERS[role] / name
    stage = "train" if role == "cell" else "sft"
    changes: dict[str, Any] = {"output_dir": folder / stage}
    if stage == "sft":  # shared by cells that differ in these
        changes |= {"train": TrainConfig(), "objective": RunConfig().objective, "reference": ReferenceConfig()}
    if config.tracking.wandb or config.tracking.mlflow:
        shown = config.tracking.name or f"{FOLDERS[role]}/{name}"
        changes["tracking"] = config.tracking.model_copy(update={"name": shown})
    if start is not None:
        changes["model"] = config.model.model_copy(update={"path": str(start.model)})
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
        settings=_settings(config, stage, fingerprint, None if start is None else start.settings_hash),
    )


def _measured(role: str, run: Path, start: str, cell: GridCell, grid: GridConfig) -> dict[str, Path]:
    if role == "cell":
        return {cell.objective: run / "model"}
    if role == "continued":
        return {"sft_continued": run / "model"}
    models = {"untuned": run / "scratch" if start == "scratch" else Path(start), "sft": run / "model"}
    return {name: path for name, path in models.items() if name in grid.arms}


def _settings(config: RunConfig, stage: str, fingerprint: str | None, start: str | None) -> dict[str, Any]:
    """What the weights depend on: not on the number of workers, and of a start not on the preference stage."""
    content = config.model_dump(mode="json", include={"seed", "template", "model", "deepspeed", stage})
    if stage == "train":
        content |= config.model_dump(mode="json", include=set(PREFERENCE_SECTIONS))
    if start is not None:
        content["model"]["path"] = f"the SFT start {start}"
    flat = dotted(content | {"data": {"fingerprint": fingerprint, "shots": config.data.shots}})
    ignored = {f"{stage}.{name}" for name in NO_INFLUENCE}
    ignored |= set() if config.template.lists_candidates else {"template.candidate", "sft.negatives"}
    return {key: value for key, value in flat.items() if key not in ignored}


def _on_dataset(config: RunConfig, cell: GridCell, grid: GridConfig, data: Mapping[str, PreparedData]) -> RunConfig:
    """The configuration with the dataset's path, and all paths absolute, as the run folder will have them."""
    changes: dict[str, Any] = {"data": config.data.model_copy(update={"path": named_path(data, cell.dataset, grid)})}
    if config.deepspeed.endswith(".json"):
        changes["deepspeed"] = str(Path(config.deepspeed).absolute())
    if config.reference.path is not None:
        changes["reference"] = config.reference.model_copy(update={"path": config.reference.path.absolute()})
    if Path(config.model.path).exists():
        changes["model"] = config.model.model_copy(update={"path": str(Path(config.model.path).absolute())})
    return config.model_copy(update=changes)


def _require_enough(config: RunConfig, cell: GridCell, data: PreparedData) -> None:
    """What would otherwise stop a cell hours later."""
    if cell.shots is not None and cell.shots > len(data.train):
        raise UserError(
            f"the cell {cell.name}: shots={cell.shots}, but {data.path} holds {len(data.train)} training groups; take "
            "that number out of the grid, or give the dataset a block of its own"
        )
    try:
        require_negatives(data.stored_negatives(), config.train.negatives, fixed_rows=data.items is None)
        if config.sft.history_order == "shuffled":
            require_reorderable(config, data)
    except UserError as error:
        raise UserError(f"the cell {cell.name}: {error}") from None
