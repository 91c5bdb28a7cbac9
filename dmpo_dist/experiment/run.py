"""An experiment from its grid to its tables: finished models and evaluations are kept, missing ones are made."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path

from rich.console import Console

from dmpo_dist.commands.scored_parts import remove_parts
from dmpo_dist.commands.train import say
from dmpo_dist.data.store import PreparedData
from dmpo_dist.errors import UserError
from dmpo_dist.experiment.baselines import baseline_fits
from dmpo_dist.experiment.datasets import open_datasets
from dmpo_dist.experiment.grid import expand, keep_grid
from dmpo_dist.experiment.measure import measure_baselines, measure_part
from dmpo_dist.experiment.memorization import probe_models
from dmpo_dist.experiment.parts import Part, make_parts
from dmpo_dist.experiment.report import write_report
from dmpo_dist.experiment.schema import GridConfig
from dmpo_dist.experiment.sharing import Alone, Together
from dmpo_dist.experiment.stamps import failure, progress, require_unchanged, stamp, trained
from dmpo_dist.experiment.train import in_this_process, placed, record_failure, train_parts
from dmpo_dist.modeling.memory import give_back

ROLES = {
    "start": "SFT start",
    "continued": "SFT continued",
    "compute": "SFT continued at equal compute",
    "cell": "cell",
}


def run_experiment(grid: GridConfig, console: Console, share: bool = False) -> list[str]:
    """Train and evaluate all missing models, then write tables and pictures.

    Args:
        share: whether other commands may work on the study at the same time. Each takes an SFT start with all that is
            trained from it, if no other has it; the last to end writes the tables of the whole study.

    Returns:
        A line for each model that failed.

    Raises:
        UserError: the grid or a dataset is not valid, a model was trained under other settings, another command is
            running in the folder, or the cluster is too small.
    """
    alone = in_this_process()
    cells = expand(grid)
    make_parts(grid, cells, open_datasets(grid, None))  # refuse what can be refused before data is prepared
    work = Together(grid.output_dir) if share else Alone(grid.output_dir)
    with work.session():
        with work.turn("study"):
            data = open_datasets(grid, make=lambda line: console.print(line, highlight=False))
            parts = [_placed(part, grid, alone) for part in make_parts(grid, cells, data)]
            require_unchanged(parts)
            keep_grid(grid)
        console.print(f"{_counted(parts)}: {_states(parts, data)}", highlight=False)
        with nullcontext() if alone or all(map(trained, parts)) else _cluster(parts[0]):
            with work.taken("baselines") as mine:
                if mine and grid.baselines:
                    measure_baselines(baseline_fits(list(data), parts, grid.output_dir), data, console)
                if mine and grid.memorization:
                    probe_models(parts, data, grid.output_dir, grid.memorization, console)
                    give_back()
            _train_and_measure(parts, data, grid.output_dir, alone, console, work)
        with work.turn("study"):
            failures = [f"{part.title}: {reason}" for part in parts if (reason := failure(part))]
            write_report(grid, parts, data, failures)
            missing = sum(progress(part, data).state != "done" for part in parts)
            scored = not any(trained(part) and failure(part) for part in parts)
            if scored and not (share and missing):  # else what is scored serves the next try, or another command
                remove_parts(grid.output_dir)
    say(console, f"written to {grid.output_dir}: experiment.md, experiment.parquet, curves.parquet and pictures")
    if share and missing > len(failures):
        left = f"{missing - len(failures)} of {len(parts)} models fell to other commands and are not done"
        say(console, f"{left}; once all have ended, run this again to go on with what a killed one left")
    return failures


def show_plan(grid: GridConfig, console: Console) -> None:
    """Print the models that the grid asks for and how far each is; nothing is written.

    Raises:
        UserError: as ``run_experiment``.
    """
    data = open_datasets(grid, None)
    parts = make_parts(grid, expand(grid), data)
    require_unchanged(parts)
    for name in grid.datasets:
        console.print(f"dataset {name}: {_about(data[name]) if name in data else 'to be prepared'}", highlight=False)
    for part in parts:
        found = progress(part, data)
        note = f" ({found.note})" if found.note else ""
        console.print(f"{found.state:<12} {part.title}{note}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{_counted(parts)}: {_states(parts, data)}", highlight=False)


def _train_and_measure(
    parts: Sequence[Part], data: Mapping[str, PreparedData], study: Path, alone: bool, console: Console, work: Alone
) -> None:
    number = {part.title: i for i, part in enumerate(parts, start=1)}

    def heading(part: Part) -> str:
        return f"{number[part.title]}/{len(parts)} {part.title}"

    for name, group in groupby(parts, key=partial(_piece, work)):
        members = list(group)
        batches = [[part] for part in members] if alone else [members]
        with work.taken(name or "cells") as mine:
            for batch in batches if mine else []:
                train_parts([part for part in batch if not trained(part)], alone, heading, console)
                for part in batch:
                    if trained(part) and progress(part, data).state != "done":
                        _measure(part, data, study, console)


def _piece(work: Alone, part: Part) -> str | None:
    """What parts that one command works on in one go have in common: their SFT start, or None where they need none and
    no other command could take some of them."""
    if part.role == "start" or (part.start is None and work.shared):
        return part.name
    return part.start


def _measure(part: Part, data: Mapping[str, PreparedData], study: Path, console: Console) -> None:
    try:
        measure_part(part, data, study, console)
    except (UserError, RuntimeError) as error:  # concerns this part alone: the others go on, as in training
        record_failure(part, error, console)
        return
    finally:
        give_back()
    stamp(part)
    if part.evaluate_on:
        console.print(f"measured {part.title} on {', '.join(part.evaluate_on)}", highlight=False, soft_wrap=True)


@contextmanager
def _cluster(part: Part) -> Iterator[None]:
    """A Ray session for all parts; raises UserError at once where the cluster is too small for any of them."""
    from dmpo_dist.cluster.train import gpus_per_worker_of, ray_session, require_resources

    cluster = part.config.cluster
    with ray_session(cluster):
        require_resources(cluster, gpus_per_worker_of(cluster))
        yield


def _placed(part: Part, grid: GridConfig, alone: bool) -> Part:
    return replace(part, config=placed(part.config, grid.output_dir.absolute(), alone))


def _counted(parts: Sequence[Part]) -> str:
    counts = Counter(ROLES[part.role] for part in parts)
    return ", ".join(
        f"{n} {name}{'s' if n > 1 and not name.startswith('SFT continued') else ''}" for name, n in counts.items()
    )


def _states(parts: Sequence[Part], data: Mapping[str, PreparedData]) -> str:
    counts = Counter(progress(part, data).state for part in parts)
    return ", ".join(f"{n} {state}" for state, n in counts.items())


def _about(data: PreparedData) -> str:
    return f"{len(data.train)} training groups, {len(data.test)} test requests, {data.path}"
