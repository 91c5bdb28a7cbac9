"""`dmpo sft`, `train`, `evaluate`, `quickstart`, `doctor`: from prepared data to a measured ranking."""

from pathlib import Path
from typing import Annotated

import typer

from dmpo_dist.artifacts.evaluation import Evaluation, EvaluationOrder
from dmpo_dist.artifacts.locks import only_one
from dmpo_dist.cli.options import (
    DryRun,
    Layers,
    Overrides,
    Overwrite,
    Resume,
    RunArguments,
    asked_to_overwrite,
    free_folder,
    interruptible,
    read_run_settings,
    read_settings,
)
from dmpo_dist.config.section import at_home
from dmpo_dist.data.place import require_prepared
from dmpo_dist.errors import UserError

# In examples a backslash joins two source lines; the next one begins in the first column, so that no spaces get in.
stages_app = typer.Typer()


@stages_app.command()
def sft(
    config: Layers = None,
    overrides: RunArguments = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """First stage: supervised fine-tuning on the positives (and, if asked, the histories).

    Examples:

        dmpo sft -c movielens data.path=runs/ml/data output_dir=runs/ml/sft

        torchrun --nproc-per-node 2 -m dmpo_dist sft -c movielens data.path=runs/ml/data output_dir=runs/ml/sft

        dmpo sft --resume runs/ml/sft
    """
    settings = read_run_settings(config, overrides, resume, dry_run)
    require_prepared(settings.data.path)
    from dmpo_dist.commands.train import run_stage
    from dmpo_dist.records.log import make_console

    with interruptible():
        run_stage("sft", settings, make_console(), resume, asked_to_overwrite(settings.output_dir, overwrite))


@stages_app.command()
def train(
    config: Layers = None,
    overrides: RunArguments = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Second stage: preference optimization, one positive against K negatives per group.

    Examples:

        dmpo train -c movielens model.path=runs/ml/sft/model data.path=runs/ml/data output_dir=runs/ml/dmpo

        dmpo train -c movielens objective.name=sdpo cluster.workers=4 deepspeed=zero3 output_dir=runs/ml/sdpo

        dmpo train --resume runs/ml/dmpo

        dmpo train --resume runs/ml/dmpo train.epochs=3 cluster.workers=2
    """
    settings = read_run_settings(config, overrides, resume, dry_run)
    require_prepared(settings.data.path)
    from dmpo_dist.commands.train import run_stage
    from dmpo_dist.records.log import make_console

    with interruptible():
        run_stage("preference", settings, make_console(), resume, asked_to_overwrite(settings.output_dir, overwrite))


@stages_app.command()
def evaluate(
    config: Layers = None,
    overrides: RunArguments = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="NAME=FOLDER of a model to rank with, NAME@SEED=FOLDER of one of its seeds; repeatable.",
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME that all others are compared with, paired by user; repeatable. Else dmpo with all others."
        ),
    ] = None,
    catalogue: Annotated[
        bool, typer.Option("--catalogue", help="Also rank each positive among all items the user had not taken.")
    ] = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Rank the test requests with models and baselines on the same candidates; writes to output_dir.

    Requests are scored on cluster.workers Ray actors, or in this process where there is one.

    Examples:

        dmpo evaluate -c movielens -m sft=runs/ml/sft/model -m dmpo=runs/ml/dmpo/model \
data.path=runs/ml/data output_dir=runs/ml/evaluation

        dmpo evaluate -m dmpo@0=a/model -m dmpo@1=b/model -m sft@0=c/model -m sft@1=d/model --against sft \
data.path=runs/ml/data output_dir=runs/seeds

        dmpo evaluate --resume runs/ml/evaluation

        dmpo evaluate data.path=runs/ml/data output_dir=runs/floors \
'evaluation.baselines=[random, popularity, item_knn, ease, sasrec]'
    """
    settings = read_run_settings(config, overrides, resume, dry_run)
    order = EvaluationOrder(models=_models(model or []), against=against or [], catalogue=catalogue)
    require_prepared(settings.data.path)
    from dmpo_dist.commands.evaluate import evaluate as run
    from dmpo_dist.commands.evaluate import preflight
    from dmpo_dist.commands.run_folder import open_run_folder, require_run_of
    from dmpo_dist.modeling.backbone import find_model, with_length_of
    from dmpo_dist.records.log import make_console

    console = make_console()
    if resume:
        require_run_of("evaluate", settings.output_dir)
    if resume and (settings.output_dir / Evaluation.FILE).exists():
        raise UserError(f"--resume: the evaluation in {settings.output_dir} is finished; nothing is left to do")
    began_with = EvaluationOrder.read_if_there(settings.output_dir) if resume else None
    if began_with is not None and not model:
        if (catalogue, against or []) not in ((False, []), (began_with.catalogue, began_with.against)):
            raise UserError(
                f"--resume: the evaluation in {settings.output_dir} was begun with other --catalogue or --against; "
                "leave them out to go on with it, or give everything again with -m"
            )
        order = began_with
    settings = with_length_of([find_model(path) for path in order.models.values()], settings)
    preflight(order.models, settings, console, order.against, order.catalogue)  # before there is a folder
    open_run_folder(settings, "evaluate", resume, overwrite=asked_to_overwrite(settings.output_dir, overwrite))
    order.write(settings.output_dir)
    with interruptible("what is scored already"), only_one(settings.output_dir):
        run(order.models, settings, settings.output_dir, console, order.catalogue, order.against)


@stages_app.command()
def quickstart(overrides: RunArguments = None, resume: Resume = False, dry_run: DryRun = False) -> None:
    """Simulate users, train SFT and DMPO on two local Ray workers, and measure the ranking: a few minutes on two cores.

    Examples:

        dmpo quickstart

        dmpo quickstart seed=1 output_dir=runs/quickstart-seed1

        dmpo quickstart --resume runs/quickstart
    """
    of_folder = resume and any("=" not in text for text in overrides or [])
    settings = read_run_settings(None if of_folder else [Path("quickstart")], overrides, resume, dry_run)
    if not resume and not any(o.startswith("output_dir=") for o in overrides or []):
        settings = settings.model_copy(update={"output_dir": free_folder(settings.output_dir)})
    from dmpo_dist.commands.quickstart import quickstart as run
    from dmpo_dist.records.log import make_console

    with interruptible("where it stopped"):
        run(settings, make_console(), resume)


@stages_app.command()
def doctor(
    config: Layers = None,
    overrides: Overrides = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Look at every node of the Ray cluster at cluster.address.")
    ] = False,
) -> None:
    """Show versions, accelerator, attention backends, shared memory and writable paths; exit 2 if one is missing.

    Examples:

        dmpo doctor

        dmpo doctor -c movielens output_dir=/shared/runs

        dmpo doctor --cluster cluster.address=10.0.0.1:6379 cluster.workers=8 \
data.path=/shared/data output_dir=/shared/runs
    """
    settings = read_settings(config, overrides, dry_run=False)
    from dmpo_dist.doctor.cluster import examine_cluster
    from dmpo_dist.doctor.machine import examine
    from dmpo_dist.records.log import make_console

    look = examine_cluster if cluster else examine
    if not look(settings, make_console()):
        raise typer.Exit(2)


def _models(entries: list[str]) -> dict[str, str]:
    """The entries NAME=FOLDER of --model as name -> folder."""
    models: dict[str, str] = {}
    for entry in entries:
        name, sep, path = entry.partition("=")
        if not sep or not name or not path:
            raise UserError(
                f"--model {entry!r} is not of the form NAME=FOLDER, for example --model dmpo=runs/dmpo/model"
            )
        if name in models:
            raise UserError(f"--model {name}= is given twice, for {models[name]} and {path}; choose another name")
        models[name] = at_home(path)
    return models
