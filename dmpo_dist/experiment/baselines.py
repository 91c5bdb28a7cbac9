"""The baselines of an experiment: on each dataset by the whole log, and by what each number of shots shows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmpo_dist.config import RunConfig
from dmpo_dist.experiment.parts import Part
from dmpo_dist.experiment.schema import ALL_SHOTS

FOLDER = "baselines"


@dataclass(frozen=True)
class BaselineFit:
    """One evaluation of the baselines.

    Attributes:
        dataset: name of the dataset that they are fitted and evaluated on.
        few: whether they are fitted on what the training groups show, and not on the whole log.
        shots: the number of these groups, None for all.
        folder: of the evaluation.
        config: whose ``evaluation.fit_on`` and ``data.shots`` say the same.
    """

    dataset: str
    few: bool
    shots: int | None
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
            fits.append(BaselineFit(dataset, False, None, output / FOLDER / dataset, fitted))
        if "shots" in config.evaluation.fit_on:
            shots = dict.fromkeys(part.cell.shots for part in parts if part.cell.dataset == dataset)
            for few in shots:
                folder = output / FOLDER / f"{dataset}_shots-{few or ALL_SHOTS}"
                fits.append(BaselineFit(dataset, True, few, folder, _fitted_on(config, "shots", few)))
    return fits


def _fitted_on(config: RunConfig, fit_on: str, shots: int | None) -> RunConfig:
    changes: dict[str, Any] = {
        "evaluation": config.evaluation.model_copy(update={"fit_on": [fit_on]}),
        "data": config.data.model_copy(update={"shots": shots}),
    }
    return config.model_copy(update=changes)
