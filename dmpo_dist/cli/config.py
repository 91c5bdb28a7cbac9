"""`dmpo config`."""

from typing import Annotated

import typer

from dmpo_dist.cli.options import Layers, Overrides, read_settings, show_settings

config_app = typer.Typer(help="Show and check configurations.", no_args_is_help=True)


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
