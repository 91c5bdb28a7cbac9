"""The looks of the models and runs of a page: what shows one model has one colour."""

from dataclasses import dataclass

from dmpo_dist.evaluation.seeds import split_name
from dmpo_dist.figures.models import looks_of
from dmpo_dist.figures.style import Look
from dmpo_dist.report.gather import Material


@dataclass(frozen=True)
class PageLooks:
    """Name of a run, and name of a model in any evaluation, -> its look."""

    runs: dict[str, Look]
    models: dict[str, Look]


def page_looks(material: Material) -> PageLooks:
    """The looks on the page about ``material``; a model has the colour of the run that made it."""
    models = {name: name for evaluation in material.evaluations.values() for name in evaluation.models}
    for evaluation in material.evaluations.values():
        for run in material.runs.values():
            name = evaluation.name_of(run.folder / "model")
            if name is not None:
                models[name if name in models else split_name(name)[0]] = run.model
    # All at once, as a name that is no method's takes a colour that no other has; runs first, for their plain dashes.
    runs = {f"run {name}": run.model for name, run in material.runs.items()}
    looks = looks_of(runs | {f"model {name}": model for name, model in models.items()})
    return PageLooks(
        {name: looks[f"run {name}"] for name in material.runs}, {name: looks[f"model {name}"] for name in models}
    )
