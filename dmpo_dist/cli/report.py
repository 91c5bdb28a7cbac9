"""`dmpo report`."""

from pathlib import Path
from typing import Annotated

import typer

report_app = typer.Typer()


@report_app.command()
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="output_dirs of stages, evaluations, studies, or folders that hold them."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", help="HTML file; an earlier report there is replaced.  [report.html in the first RUN]"
        ),
    ] = None,
    explanations: Annotated[
        bool, typer.Option(help="Show single users (ids, titles, histories): explanations and ranked lists.")
    ] = True,
    tables: Annotated[
        Path | None, typer.Option("--tables", help="Folder for every table of the page as CSV and LaTeX.")
    ] = None,
) -> None:
    """One self-contained HTML page about one or several runs: results, curves, strata, studies, data, settings.

    It opens offline, on a phone too, and shows what it finds: the folders are looked through for training runs,
    evaluation.json, explanations.json, experiment.parquet and prepared data.

    Examples:

        dmpo report runs/quickstart

        dmpo report runs/ml/sft runs/ml/dmpo runs/ml/evaluation --output ml.html --tables ml-tables
    """
    from dmpo_dist.cli.options import print_now
    from dmpo_dist.report.page import write_report

    write_report(folders, output or folders[0] / "report.html", explanations, print_now, tables)
