"""The baselines of an experiment: on each dataset by the whole log, and by what each number of shots shows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmpo_dist.config import RunConfig
from dmpo_dist.experiment.grid import GridCell
from dmpo_dist.experiment.parts import Part, with_shots
from dmpo_dist.experiment.schema import ALL_SHOTS

FOLDER = "baselines"


@dataclass(frozen=True)
class BaselineFit:
    """One evaluation of the baselines.

    Attributes:
        dataset: name of the dataset that they are fitted and evaluated on.
        few: whether they are fitted on what the training groups show, and not on the whole log.
        shots: the number of these groups, None for all.
        seed: of the cells that have these groups, where each seed draws its own.
        folder: of the evaluation.
        config: whose ``evaluation.fit_on``, ``data.shots`` and ``data.shots_seed`` say the same.
    """

    dataset: str
    few: bool
    shots: int | None
    seed: int | None
    folder: Path
    config: RunConfig


def baseline_fits(datasets: Sequence[str], parts: Sequence[Part], output: Path) -> list[BaselineFit]:
    """The evaluations that the grid asks for, by ``evaluation.fit_on``.

    Args:
        datasets: names of all datasets of the grid.
        parts: whose cells say which numbers of shots there are on each.
    """
    fits = []
    for dataset in datasets:
        config = next((part.config for part in parts if part.cell.dataset == dataset), parts[0].config)
        if "log" in config.evaluation.fit_on:
            fitted = _fitted_on(config, "log", None)
            fits.append(BaselineFit(dataset, False, None, None, output / FOLDER / dataset, fitted))
        if "shots" in config.evaluation.fit_on:
            for few, seed in dict.fromkeys(_drawn(part.cell) for part in parts if part.cell.dataset == dataset):
                by_seed = "" if seed is None else f"_seed-{seed}"
                folder = output / FOLDER / f"{dataset}_shots-{few or ALL_SHOTS}{by_seed}"
                fitted = _fitted_on(config, "shots", few, seed)
                fits.append(BaselineFit(dataset, True, few, seed, folder, fitted))
    return fits


def _drawn(cell: GridCell) -> tuple[int | None, int | None]:
    """A cell's number of shots, and its seed where that draws them."""
    return cell.shots, cell.seed if cell.own_shots else None


def _fitted_on(config: RunConfig, fit_on: str, shots: int | None, seed: int | None = None) -> RunConfig:
    changes: dict[str, Any] = {
        "evaluation": config.evaluation.model_copy(update={"fit_on": [fit_on]}),
        "data": with_shots(config.data, shots, seed),
    }
    return config.model_copy(update=changes)
