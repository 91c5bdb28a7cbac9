"""`dmpo serve`, and `dmpo bench serve`."""

from pathlib import Path
from typing import Annotated

import typer

from dmpo_dist.cli.bench import bench_app
from dmpo_dist.cli.options import DryRun, Layers, Overrides, free_folder, read_settings

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


@bench_app.command("serve")
def bench_serve(
    model: Annotated[str, typer.Option("--model", "-m", help="Model folder.")],
    catalogue: Annotated[Path | None, typer.Option(help="As for dmpo rank.  [1,700 made-up titles]")] = None,
    candidates: Annotated[int, typer.Option(min=0, help="Titles ranked in a request; 0 for the whole catalogue.")] = 20,
    prompt: Annotated[int, typer.Option(min=1, help="Prompt tokens, at least.")] = 256,
    returning: Annotated[float, typer.Option(min=0, max=1, help="Share of users who were there before.")] = 0.0,
    requests: Annotated[int, typer.Option(min=1, help="Requests of each measurement.")] = 12,
    rate: Annotated[
        list[float] | None, typer.Option(help="Arrivals per second; repeatable.  [shares of the throughput]")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Of arrivals at each rate; 0 leaves them out.")] = 30,
    within: Annotated[float, typer.Option(help="An answer is in time after so many seconds.")] = 1.0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    half: Annotated[bool, typer.Option("--half", help="Both in bfloat16.")] = False,
    output: Annotated[Path | None, typer.Option(help="Result file.  [runs/bench-serve/serve.json]")] = None,
) -> None:
    """Ask a running server at rates that do not wait for it, and a Hugging Face loop in the same run.

    Examples:

        dmpo bench serve -m runs/ml/dmpo/model --catalogue runs/ml/data

        dmpo bench serve -m runs/ml/dmpo/model --candidates 0 --requests 3 --seconds 0
    """
    from dmpo_dist.bench import report, serving_report, settings
    from dmpo_dist.bench.serving import bench_serving
    from dmpo_dist.bench.serving_load import Load, made_up_titles
    from dmpo_dist.commands.serve import require_packages
    from dmpo_dist.data.requests import read_catalogue
    from dmpo_dist.records.environment import describe_environment
    from dmpo_dist.records.log import make_console

    require_packages()
    titles = list(read_catalogue(catalogue).titles) if catalogue else made_up_titles(1700)
    output = output or free_folder(Path("runs/bench-serve")) / "serve.json"
    png = output.with_suffix(".png")
    settings.check_outputs(output, png)
    dtype = "bfloat16" if half else "float32"
    rates = tuple(rate or ())
    load = Load(model, titles, prompt, candidates, returning, requests, rates, seconds, within, threads, dtype)
    result = bench_serving(load) | {"model": model, "environment": describe_environment().content()}
    report.write_json(result, output)
    serving_report.show(result, make_console())
    if result["rates"]:
        serving_report.draw(result, png)
    print(f"written: {output}" + (f" and {png}" if result["rates"] else ""))
