"""`dmpo tune`."""

import typer

from dmpo_dist.cli.options import (
    DryRun,
    Layers,
    Overwrite,
    Resume,
    RunArguments,
    asked_to_overwrite,
    interruptible,
    read_run_settings,
    show_settings,
)
from dmpo_dist.data.place import require_prepared

tune_app = typer.Typer()


@tune_app.command()
def tune(
    config: Layers = None,
    overrides: RunArguments = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Search settings on the validation requests, of a stage and of the baselines with the same budget.

    The section `tune` says what to search, how many trials and how many hours. The best settings are in best.yaml, for
    `dmpo train -c`; see docs/TUNING.md.

    Examples:

        dmpo tune -c movielens -c tune_preference data.path=runs/ml/data model.path=runs/ml/sft/model \
output_dir=runs/ml/tuned tune.hours=2

        dmpo tune -c my.yaml 'tune.space={train.learning_rate: {loguniform: [1e-6, 1e-3]}, objective.beta: \
{choice: [0.1, 0.3, 1]}}' tune.trials=12

        dmpo tune --resume runs/ml/tuned tune.trials=40
    """
    settings = read_run_settings(config, overrides, resume, dry_run=False)
    if dry_run:
        from dmpo_dist.tuning.space import require_stage_space

        require_stage_space(settings, "sft" if settings.tune.stage == "sft" else "preference")
        show_settings(settings, everything=False)
        raise typer.Exit
    require_prepared(settings.data.path)
    from dmpo_dist.records.log import make_console
    from dmpo_dist.tuning.run import tune as run

    with interruptible("where it stopped"):
        run(settings, make_console(), resume, asked_to_overwrite(settings.output_dir, overwrite))
