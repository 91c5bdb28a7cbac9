"""`dmpo config`, `recipes`, `init`: settings shown, explained, checked and begun."""

from pathlib import Path
from typing import Annotated

import typer

from dmpo_dist.cli.options import Layers, Overrides, read_settings, show_settings
from dmpo_dist.errors import UserError

config_app = typer.Typer(help="Show, explain and check configurations.", no_args_is_help=True)
start_app = typer.Typer()


@config_app.command("show")
def config_show(
    config: Layers = None,
    overrides: Overrides = None,
    everything: Annotated[bool, typer.Option("--all", help="Print every key, those with their defaults too.")] = False,
) -> None:
    """Print the keys that differ from their defaults, as YAML.

    Examples:

        dmpo config show -c quickstart train.negatives=15

        dmpo config show -c quickstart --all
    """
    show_settings(read_settings(config, overrides, dry_run=False), everything)


@config_app.command("validate")
def config_validate(config: Layers = None, overrides: Overrides = None) -> None:
    """Check configuration files and overrides; print what is wrong and exit with status 2.

    Examples:

        dmpo config validate -c my.yaml
    """
    read_settings(config, overrides, dry_run=False)
    print("valid: " + (", ".join(str(layer) for layer in config) if config else "the defaults"))


@config_app.command("keys")
def config_keys(word: Annotated[str, typer.Argument(help="Only keys with this in their name or help.")] = "") -> None:
    """List the keys of a configuration with their defaults; those with WORD in their name or help text.

    Examples:

        dmpo config keys

        dmpo config keys history
    """
    from dmpo_dist.config.keys import keys_with

    found = keys_with(word)
    if not found:
        raise UserError(f"no key has {word!r} in its name or help; dmpo config keys lists all")
    for key in found:
        print(f"{key.name}: {key.default}    {key.help}".rstrip())


@config_app.command("explain")
def config_explain(key: Annotated[str, typer.Argument(help="Key or section, such as train.learning_rate.")]) -> None:
    """Print what a key does, what it may hold and its default.

    Examples:

        dmpo config explain train.learning_rate

        dmpo config explain data.source
    """
    from dmpo_dist.config.keys import find_key

    for found in find_key(key):
        print(f"{found.name}: {found.kind}, by default {found.default}")
        if found.help:
            print(f"    {found.help}")


@start_app.command("recipes")
def recipes() -> None:
    """List the recipes for `-c`, and apart from them the grids for `dmpo experiment`, with what each is for.

    Examples:

        dmpo recipes
    """
    from dmpo_dist.config.load import GRID, recipes_with

    for heading, prefix in (("recipes, for -c:", ""), ("grids of studies, for dmpo experiment:", GRID)):
        print(heading)
        for name, file in recipes_with(prefix).items():
            print(f"  {name}: {file.read_text(encoding='utf-8').partition(chr(10))[0].removeprefix('# ')}")


@start_app.command("init")
def init(file: Annotated[Path, typer.Argument(help="YAML file to write; must not exist yet.")]) -> None:
    """Write a configuration file with the keys that one usually changes, each with its help text.

    Examples:

        dmpo init my.yaml
    """
    from dmpo_dist.artifacts.files import naming
    from dmpo_dist.config.keys import write_starting_file

    with naming(file):
        write_starting_file(file)
    print(f"written: {file}; change it, then: dmpo data prepare -c {file}")
