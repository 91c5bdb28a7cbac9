"""`dmpo explain`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from dmpo_dist.cli.options import DryRun, Layers, Overrides, read_settings
from dmpo_dist.errors import UserError

explain_app = typer.Typer()

ITEM = "Title or item id to explain.  [the positive of the request; with --requests the title ranked first]"
REQUESTS = "File of users in the form that `dmpo rank` takes.  [the test requests of data.path]"
CATALOGUE = "Rank all titles of this Parquet, CSV or prepared data.  [the candidates of each request]"
REFERENCE = (
    "Compare the title's words with base, start, none or a model folder.  [what training started from, else base]"
)
METHOD = "What history items add to: the title's margin over the mean of the other candidates, or its log-probability."
RIVALS = "Of a whole catalogue, how many titles ranked below stay in the comparison; 0 keeps all, slowly.  [500]"
TOP = "The counterfactual moves the title out of the top N, or into it.  [1, 5, 10 or 20: the first that holds it]"
BUDGET = "Most pairs of items, and most larger sets, that a counterfactual tries.  [200; 0 for whole catalogues]"
MEASURED = 200
FAITHFULNESS = "Measure by deletion curves whether the contributions say what the model does."


@explain_app.command()
def explain(
    model: Annotated[str, typer.Option("--model", "-m", help="Model folder, trained or exported.")],
    config: Layers = None,
    overrides: Overrides = None,
    user: Annotated[str | None, typer.Option(help="Whose ranking to explain.")] = None,
    item: Annotated[str | None, typer.Option(help=ITEM)] = None,
    users: Annotated[int | None, typer.Option(min=1, help="Explain a sample of so many users instead.")] = None,
    requests: Annotated[Path | None, typer.Option(help=REQUESTS)] = None,
    catalogue: Annotated[Path | None, typer.Option(help=CATALOGUE)] = None,
    reference: Annotated[str | None, typer.Option(help=REFERENCE)] = None,
    method: Annotated[Literal["margin", "log_prob"], typer.Option(help=METHOD)] = "margin",
    rivals: Annotated[int | None, typer.Option(min=0, help=RIVALS)] = None,
    top: Annotated[int | None, typer.Option(min=1, help=TOP)] = None,
    budget: Annotated[int | None, typer.Option(min=0, help=BUDGET)] = None,
    faithfulness: Annotated[bool, typer.Option("--faithfulness", help=FAITHFULNESS)] = False,
    faithfulness_users: Annotated[
        int | None, typer.Option(min=2, help="Most users that it is measured on.  [those of --users, else 200]")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for explanations.json.  [nothing is written]")] = None,
    dry_run: DryRun = False,
) -> None:
    """Show which history items rank a title where it is, what removing them changes, and what training changed.

    Examples:

        dmpo explain -m runs/ml/dmpo/model data.path=runs/ml/data --user 12

        dmpo explain -m runs/ml/dmpo/model data.path=runs/ml/data --user 12 --item "Heat (1995)" --catalogue items.csv

        dmpo explain -m exported --requests users.csv --user anna --reference none

        dmpo explain -m runs/ml/dmpo/model data.path=runs/ml/data --users 20 --faithfulness --output explained
    """
    if faithfulness_users is not None and not faithfulness:
        raise UserError(
            f"--faithfulness-users {faithfulness_users}: says how to measure, and nothing is measured; add "
            "--faithfulness"
        )
    settings = read_settings(config, overrides, dry_run)
    from dmpo_dist.commands.explain import Order
    from dmpo_dist.commands.explain import explain as run
    from dmpo_dist.records.log import make_console

    order = Order(
        model=model,
        user=user,
        item=item,
        users=users,
        requests=requests,
        catalogue=catalogue,
        reference=reference,
        method=method,
        rivals=rivals,
        top=top,
        budget=budget,
        faithfulness=(faithfulness_users or users or MEASURED) if faithfulness else 0,
        output=output,
    )
    run(order, settings, make_console())
