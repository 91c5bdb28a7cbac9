"""`dmpo config`."""

import typer

from dmpo_dist.cli.options import Layers, Overrides, read_settings
from dmpo_dist.config import dump_config

config_app = typer.Typer(help="Look at and check configurations.", no_args_is_help=True)


@config_app.command("show")
def config_show(config: Layers = None, overrides: Overrides = None) -> None:
    """Print the resolved configuration as YAML.

    Examples:

        dmpo config show -c quickstart train.negatives=15
    """
    print(dump_config(read_settings(config, overrides, dry_run=False)), end="")


@config_app.command("validate")
def config_validate(config: Layers = None, overrides: Overrides = None) -> None:
    """Check configuration files; exit 2 with the first mistakes named.

    Examples:

        dmpo config validate -c my.yaml
    """
    read_settings(config, overrides, dry_run=False)
    print("valid: " + (", ".join(str(layer) for layer in config) if config else "the defaults"))
