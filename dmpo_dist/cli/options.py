"""What several commands take, and the configuration they make of it."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from dmpo_dist.artifacts.run_folder import config_file
from dmpo_dist.config import RunConfig, dump_config, load_config
from dmpo_dist.config.load import find_recipe
from dmpo_dist.errors import UserError

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
RunArguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RUN_FOLDER] [KEY=VALUE]...",
        help="With --resume, the folder of the run; key=value overrides, such as train.learning_rate=1e-4.",
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with the run in RUN_FOLDER, or in output_dir, from where it stopped; without -c under its own "
        "settings.",
    ),
]

Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Remove an earlier run in output_dir; asks before it does.")
]


def asked_to_overwrite(folder: Path, overwrite: bool) -> bool:
    """``overwrite``, once the user agrees where there is something in ``folder``; ends the command where not.

    Raises:
        UserError: nobody answered, as in a script.
    """
    if overwrite and folder.exists():
        try:
            agreed = typer.confirm(f"remove {folder} and everything in it?")
        except typer.Abort:
            print()
            raise UserError(
                f"--overwrite: nobody said whether to remove {folder}; answer y, in a script by `echo y | dmpo ...`"
            ) from None
        if not agreed:
            raise typer.Exit(1)
    return overwrite


def read_settings(layers: list[Path] | None, overrides: list[str] | None, dry_run: bool) -> RunConfig:
    """The resolved configuration; for a dry run it is shown and the command ends."""
    settings = load_config([find_recipe(str(layer), "--config") for layer in layers or []], overrides)
    if dry_run:
        show_settings(settings, everything=False)
        raise typer.Exit
    return settings


def read_run_settings(layers: list[Path] | None, arguments: list[str] | None, resume: bool, dry_run: bool) -> RunConfig:
    """As ``read_settings``; of a run that is resumed by its folder, or without ``layers``, over its own settings.

    Args:
        arguments: overrides, and with ``resume`` the folder, which the result has as ``output_dir``.
    """
    folders = [text for text in arguments or [] if "=" not in text] if resume else []
    overrides = [text for text in arguments or [] if text not in folders]
    if not resume or (layers and not folders):
        return read_settings(layers, overrides, dry_run)
    if len(folders) > 1 or (folders and any(text.startswith("output_dir=") for text in overrides)):
        raise UserError(f"--resume {folders[0]}: names one run; give no second folder and no output_dir")
    folder = Path(folders[0]) if folders else load_config([], overrides).output_dir
    saved = config_file(folder)
    return read_settings([saved, *(layers or [])], [*overrides, f"output_dir={json.dumps(str(folder))}"], dry_run)


@contextmanager
def interruptible(from_where: str = "the latest checkpoint") -> Iterator[None]:
    """On Ctrl-C print how to continue."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"interrupted; --resume goes on from {from_where}", file=sys.stderr)
        raise


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
