"""`dmpo serve`."""

from pathlib import Path
from typing import Annotated

import typer

from dmpo_dist.cli.options import DryRun, Layers, Overrides, read_settings

serve_app = typer.Typer()

CATALOGUE = (
    "Titles to recommend: a file with a column title and, if you have them, item and popularity, or prepared data; a "
    "new version of it is taken up while the server runs.  [data.path, else what the model saw]"
)


@serve_app.command()
def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, trained or exported.")],
    catalogue: Annotated[Path | None, typer.Option(help=CATALOGUE)] = None,
    without_ray: Annotated[
        bool, typer.Option("--without-ray", help="Score in this process: one copy of the model, ready in seconds.")
    ] = False,
    config: Layers = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Answer requests for rankings over HTTP, on serving.replicas copies of the model under Ray Serve.

    /v1/rerank ranks given documents in the shape of Cohere, Jina and vLLM; /v1/recommend the whole catalogue. The page
    at / shows rankings and why they are so, /docs the interface with forms to try it.

    Examples:

        dmpo serve runs/ml/dmpo/model --catalogue runs/ml/data

        dmpo serve runs/ml/dmpo/model --catalogue items.csv --without-ray serving.port=8080

        dmpo serve exported --catalogue items.parquet serving.host=0.0.0.0 serving.token_file=token serving.replicas=2 \
serving.most_replicas=4 cluster.gpus_per_worker=1
    """
    settings = read_settings(config, overrides, dry_run)
    from dmpo_dist.commands.serve import serve as run
    from dmpo_dist.records.log import make_console

    run(model, catalogue, settings, without_ray, make_console())
