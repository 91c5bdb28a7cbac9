"""`dmpo experiment`."""

from pathlib import Path
from typing import Annotated

import typer

from dmpo_dist.cli.options import DryRun, Overrides, Resume, read_settings

experiment_app = typer.Typer()


@experiment_app.command()
def experiment(
    grid: Annotated[
        Path, typer.Argument(metavar="GRID", help="YAML file, a recipe named experiment_..., or a study's folder.")
    ],
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cells and how far each is, and stop.")] = False,
    share: Annotated[
        bool, typer.Option("--share", help="Work beside other such commands: take what no other has begun.")
    ] = False,
) -> None:
    """Train and measure every combination of a grid (datasets x shots x K x objective x seed); tables, curves, matrix.

    Run it again after an interruption, or with a grown grid: finished cells stay, the interrupted one goes on from its
    latest checkpoint. A cell that fails is noted and the others go on; exit status 1 then. See docs/EXPERIMENTS.md.

    Examples:

        dmpo experiment experiment_k_sweep --dry-run

        dmpo experiment my_grid.yaml output_dir=/shared/study cluster.workers=8

        dmpo experiment runs/study     # goes on with what that folder holds

        torchrun --nproc-per-node 1 -m dmpo_dist experiment experiment_tiny     # one process, no Ray: tiny models

        torchrun --standalone --nproc-per-node 1 -m dmpo_dist experiment my_grid.yaml --share     # once for each GPU
    """
    from dmpo_dist.experiment.grid import read_grid
    from dmpo_dist.experiment.run import run_experiment, show_plan
    from dmpo_dist.records.log import make_console

    settings = read_grid(grid, overrides or [])
    if dry_run:
        show_plan(settings, make_console())
        return
    try:
        failures = run_experiment(settings, make_console(), share)
    except KeyboardInterrupt:
        print("interrupted; dmpo experiment with this output_dir as its GRID goes on from here")
        raise
    if failures:
        print(f"{len(failures)} failed; run the command again to try them once more:")
        print("\n".join(f"  {line}" for line in failures))
        raise typer.Exit(1)


@experiment_app.command()
def reproduce(
    name: Annotated[str, typer.Argument(metavar="NAME", help="sdpo, dynamicpo, dmpo or minionerec.")],
    overrides: Overrides = None,
    resume: Resume = False,
    dry_run: DryRun = False,
) -> None:
    """Run a paper's protocol and show its figure beside the one found here, with all that differs.

    The recipe pins data, prompt, candidates, batch size, epochs and metric; whatever you change is listed. See
    docs/EXPERIMENTS.md for the data that each needs.

    Examples:

        dmpo reproduce sdpo data.source.path=datasets/lastfm-sft-cans20

        dmpo reproduce dmpo data.source.path=dmpo-released-games model.path=Qwen/Qwen3-0.6B output_dir=runs/dmpo-small
    """
    from dmpo_dist.commands.reproduce import recipe_of
    from dmpo_dist.commands.reproduce import reproduce as run
    from dmpo_dist.records.log import make_console

    settings = read_settings([recipe_of(name)], overrides, dry_run)
    run(name, settings, read_settings([recipe_of(name)], None, dry_run=False), make_console(), resume)
