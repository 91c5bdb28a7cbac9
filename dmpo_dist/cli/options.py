"""What several commands take, and the configuration they make of it."""

from pathlib import Path
from typing import Annotated

import typer

from dmpo_dist.config import RunConfig, dump_config, load_config
from dmpo_dist.config.load import find_recipe

Layers = Annotated[
    list[Path] | None,
    typer.Option("-c", "--config", help="YAML file, or the name of a recipe in launch/recipes; later ones win."),
]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value overrides, such as train.learning_rate=1e-4.")]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Print the settings that differ from the defaults (all of them: dmpo config show --all) and stop.",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in output_dir from its latest checkpoint.")]


Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Remove an earlier run in output_dir; asks before it does.")
]


def asked_to_overwrite(folder: Path, overwrite: bool) -> bool:
    """``overwrite``, once the user agrees where there is something in ``folder``; ends the command where not."""
    if overwrite and folder.exists():
        typer.confirm(f"remove {folder} and everything in it?", abort=True)
    return overwrite


def read_settings(layers: list[Path] | None, overrides: list[str] | None, dry_run: bool) -> RunConfig:
    """The resolved configuration; for a dry run it is shown and the command ends."""
    settings = load_config([find_recipe(str(layer), "--config") for layer in layers or []], overrides)
    if dry_run:
        show_settings(settings, everything=False)
        raise typer.Exit
    return settings


def show_settings(settings: RunConfig, everything: bool) -> None:
    """Print a configuration as YAML that ``-c`` reads: every key, or those that differ from their defaults."""
    print(dump_config(settings, "all" if everything else "changed"), end="")
    if not everything:
        print("# all other keys have their defaults: dmpo config show --all")


def print_now(line: str) -> None:
    """Print a line without delay, also into a pipe."""
    print(line, flush=True)


def free_folder(folder: Path) -> Path:
    """``folder``, or the first of folder-2, folder-3, ... that does not exist."""
    if not folder.exists():
        return folder
    number = next(n for n in range(2, 10_000) if not folder.with_name(f"{folder.name}-{n}").exists())
    other = folder.with_name(f"{folder.name}-{number}")
    print(f"{folder} exists already and is kept; writing to {other}")
    return other
