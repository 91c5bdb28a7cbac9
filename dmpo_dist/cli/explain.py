"""`dmpo explain`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from dmpo_dist.cli.options import DryRun, Layers, Overrides, read_settings

explain_app = typer.Typer()


@explain_app.command()
def explain(
    model: Annotated[str, typer.Option("--model", "-m", help="Model folder, trained or exported.")],
    config: Layers = None,
    overrides: Overrides = None,
    user: Annotated[str | None, typer.Option(help="Whose ranking to explain.")] = None,
    item: Annotated[str | None, typer.Option(help="Title or item id.  [the test positive; in a file, the title ranked first]")] = None,
    users: Annotated[int | None, typer.Option(min=1, help="Explain a sample of so many users instead.")] = None,
    requests: Annotated[Path | None, typer.Option(help="Users as `dmpo rank` takes them.  [test requests of data.path]")] = None,
    catalogue: Annotated[Path | None, typer.Option(help="Rank among all its titles: Parquet or CSV with title, or prepared data.  [each request's candidates]")] = None,
    reference: Annotated[str | None, typer.Option(help="Compare the title's words with: base, start, none, or a model folder.  [what training started from, else an adapter's base]")] = None,
    method: Annotated[Literal["margin", "log_prob"], typer.Option(help="Value that history items add to: the title's margin over the mean of the other candidates, or its log-probability.")] = "margin",
    rivals: Annotated[int, typer.Option(min=0, help="Of a whole catalogue, what is left of the history ranks a title among all above it and so many below; 0: all titles, which is slow.")] = 500,
    top: Annotated[int | None, typer.Option(min=1, help="The counterfactual takes the title out of the top so many, or into it.  [1, 5, 10 or 20: the first that holds it]")] = None,
    budget: Annotated[int | None, typer.Option(min=0, help="Most pairs of history items tried for a counterfactual, and most larger sets.  [200, or 0 for whole catalogues]")] = None,
    faithfulness: Annotated[bool, typer.Option("--faithfulness", help="Measure by deletion curves whether contributions say what the model does.")] = False,
    faithfulness_users: Annotated[int, typer.Option(min=2, help="Users it is measured on at most.")] = 200,
    output: Annotated[Path | None, typer.Option(help="Folder for explanations.json and the measurement.  [terminal alone]")] = None,
    dry_run: DryRun = False,
) -> None:  # fmt: skip
    """Say which history items put a title where it is for a user, what removing them would change, and how training changed its words.

    Examples:

        dmpo explain -m runs/ml/dmpo/model data.path=runs/ml/data --user 12

        dmpo explain -m runs/ml/dmpo/model data.path=runs/ml/data --user 12 --item "Heat (1995)" --catalogue runs/ml/data

        dmpo explain -m exported --requests users.csv --user anna --reference none

        dmpo explain -m runs/ml/dmpo/model data.path=runs/ml/data --users 20 --faithfulness --output runs/ml/explained
    """
    settings = read_settings(config, overrides, dry_run)
    from dmpo_dist.commands.explain import Order
    from dmpo_dist.commands.explain import explain as run
    from dmpo_dist.records.log import make_console

    order = Order(
        model=model, user=user, item=item, users=users, requests=requests, catalogue=catalogue, reference=reference,
        method=method, rivals=rivals, top=top, budget=budget, faithfulness=faithfulness_users if faithfulness else 0, output=output,
    )  # fmt: skip
    run(order, settings, make_console())
