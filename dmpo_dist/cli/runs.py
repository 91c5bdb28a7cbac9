"""`dmpo runs`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from dmpo_dist.errors import UserError

runs_app = typer.Typer(help="Look at and compare the runs below a folder.", no_args_is_help=True)

Compared = Annotated[list[Path], typer.Argument(metavar="RUN RUN ...", help="output_dirs of training runs.")]


@runs_app.command("list")
def runs_list(
    root: Annotated[Path, typer.Argument(help="Folder that holds runs.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every column.")] = False,
) -> None:
    """List the training runs below a folder: stage, steps, best validation, test figures, speed, commit, state.

    Examples:

        dmpo runs list runs/ml

        dmpo runs list runs/ml --json
    """
    from dmpo_dist.records.compare import runs_as_json, show_runs
    from dmpo_dist.records.log import make_console
    from dmpo_dist.records.read import find_runs

    if as_json:
        print(runs_as_json(find_runs(root), root))
        return
    show_runs(find_runs(root), root, make_console())


@runs_app.command("compare")
def runs_compare(
    runs: Compared,
    evaluations: Annotated[
        Path | None, typer.Option(help="Folder that holds evaluations.  [the folder that holds all runs]")
    ] = None,
) -> None:
    """Show settings that differ, final figures and, where `dmpo evaluate` ranked both, paired test differences.

    Examples:

        dmpo runs compare runs/ml/sft runs/ml/dmpo
    """
    from dmpo_dist.records.compare import find_evaluations, run_names, show_comparison
    from dmpo_dist.records.log import make_console
    from dmpo_dist.records.read import read_run

    found, root = [read_run(folder) for folder in _several(runs)], _common(runs)
    show_comparison(found, run_names(found, root), find_evaluations(evaluations or root), make_console())


@runs_app.command("plot")
def runs_plot(
    runs: Compared,
    metric: Annotated[str, typer.Option(help="Validation metric.")] = "ndcg@10",
    output: Annotated[Path, typer.Option("--output", help="PNG to write.")] = Path("runs.png"),
) -> None:
    """Draw loss, margin and validation of several runs in one picture.

    Examples:

        dmpo runs plot runs/ml/dmpo runs/ml/sdpo --output runs/ml/compare.png
    """
    from dmpo_dist.bench.settings import check_outputs
    from dmpo_dist.records.compare import plot_runs, run_names
    from dmpo_dist.records.read import read_run

    found = [read_run(folder) for folder in _several(runs)]
    check_outputs(output)
    plot_runs(found, run_names(found, _common(runs)), metric, output)
    print(f"written: {output}")


def _several(runs: list[Path]) -> list[Path]:
    if len(set(runs)) < max(2, len(runs)):
        raise UserError(f"{' '.join(map(str, runs))}: give two or more different runs; `dmpo runs list` shows them")
    return runs


def _common(folders: list[Path]) -> Path:
    """The deepest folder that holds all of ``folders``."""
    return Path(os.path.commonpath(folders))
