"""`dmpo quickstart`: simulate data, train SFT, DMPO alone, DMPO with likelihood, SFT continued, and evaluate."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dmpo_dist.artifacts.locks import only_one
from dmpo_dist.artifacts.run_folder import failure_noted
from dmpo_dist.commands.evaluate import check_classical, evaluate
from dmpo_dist.commands.run_folder import open_run_folder, require_no_data_path
from dmpo_dist.commands.train import SCRATCH, run_stage, run_stages, say
from dmpo_dist.config import RunConfig
from dmpo_dist.config.objective import ObjectiveConfig, PreferenceOptions
from dmpo_dist.data.prepare import prepare
from dmpo_dist.errors import UserError
from dmpo_dist.records.read import has_begun
from dmpo_dist.records.tracking import check_tracking
from dmpo_dist.training.job import Kind


def quickstart(config: RunConfig, console: Console, resume: bool = False) -> None:
    """Run all stages into ``config.output_dir``.

    The objective runs alone and, where the configuration gives it a likelihood term, with that in a row of its own. SFT
    continued trains the SFT model by SFT for as many more steps, for a fair comparison.

    Args:
        resume: go on in the folder of an interrupted one: what is finished there is kept.

    Raises:
        UserError: a data folder or a model is given, the folder exists and ``resume`` is not set, or it is to be
            resumed and is of other settings.
    """
    output = config.output_dir.absolute()
    require_no_data_path(config, "quickstart")
    if config.model.path != SCRATCH:
        raise UserError(
            f"model.path={config.model.path}: dmpo quickstart trains a small model from scratch, as its simulated "
            "titles mean nothing to a pretrained one; leave it out, or see launch/pretrained.sh"
        )
    check_tracking(config.tracking)
    check_classical(config.evaluation.baselines, config, console)
    open_run_folder(config, "quickstart", resume)
    with only_one(output), failure_noted(output):
        _run(config, output, console)


def _run(config: RunConfig, output: Path, console: Console) -> None:
    """All stages that are not finished in ``output``."""
    preferences = preference_rows(config)
    stages = 4 + len(preferences)
    say(console, f"1/{stages} data: a simulated world whose best possible ranking is known")
    if not (output / "data").exists():  # it appears whole
        prepare(config.data, config.seed, output / "data", echo=lambda line: console.print(line, highlight=False))
    config = config.model_copy(update={"data": config.data.model_copy(update={"path": output / "data"})})
    models = {
        "untuned": output / "sft" / "scratch",
        "sft": output / "sft" / "model",
        "sft_continued": output / "sft_continued" / "model",
        **{row: output / row / "model" for row in preferences},
    }
    start = str(models["sft"])
    train_missing(
        [
            (
                f"2/{stages} SFT: a small language model learns the catalogue from the users' histories",
                "sft",
                into(config, output / "sft", "scratch"),
            ),
            *(
                (
                    f"{number}/{stages} {row}: one positive against K negatives per user",
                    "preference",
                    into(config.model_copy(update={"objective": objective}), output / row, start),
                )
                for number, (row, objective) in enumerate(preferences.items(), start=3)
            ),
            (
                f"{stages - 1}/{stages} SFT continued on the same groups for as many steps, for a fair comparison",
                "sft",
                continued_config(into(config, output / "sft_continued", start)),
            ),
        ],
        console,
    )
    say(console, f"{stages}/{stages} evaluation on requests after the cut")
    # a few seconds' work for such models: starting actors would take longer
    alone = config.model_copy(update={"cluster": config.cluster.model_copy(update={"workers": 1})})
    evaluate({name: str(path) for name, path in models.items()}, alone, output, console)
    last = list(preferences)[-1]
    say(console, f"curves: {output}/{last}/curves.png   model: {models[last]}")


def preference_rows(config: RunConfig) -> dict[str, ObjectiveConfig]:
    """Row of the table -> objective: that of ``config`` without its likelihood term, then with it if it has one."""
    objective = config.objective
    if not isinstance(objective, PreferenceOptions) or not objective.sft_weight:
        return {objective.name: objective}
    alone = objective.model_copy(update={"sft_weight": 0.0, "sft_loss_on": "response"})
    return {objective.name: alone, f"{objective.name}_likelihood": objective}


def train_missing(stages: Sequence[tuple[str, Kind, RunConfig]], console: Console) -> None:
    """Train the stages that have no model yet: the one that had begun goes on, the others on one set of workers."""
    for heading, kind, config in stages:
        folder = config.output_dir
        if not (folder / "model").is_dir() and has_begun(folder):
            say(console, f"{heading}, from its latest checkpoint")
            run_stage(kind, _with_its_checkpoints(config), console, resume=True)
    left = [stage for stage in stages if not (stage[2].output_dir / "model").is_dir()]
    for _, _, config in left:
        shutil.rmtree(config.output_dir, ignore_errors=True)  # opened, but its training never began
    if left:
        run_stages(left, console)


def _with_its_checkpoints(config: RunConfig) -> RunConfig:
    """``config`` of a stage that goes on alone: checkpoints of stages that were trained together lie in one folder."""
    if config.cluster.storage_path or (config.output_dir / "checkpoints").is_dir():
        return config
    cluster = config.cluster.model_copy(update={"storage_path": str(config.output_dir.parent)})
    return config.model_copy(update={"cluster": cluster})


PASSED_ON = ("steps", "epochs", "global_batch_size", "token_budget", "learning_rate", "schedule", "warmup_ratio",
             "weight_decay", "validate_every", "checkpoint_every")  # fmt: skip
"""Settings of the preference stage that SFT continued shares."""


def continued_config(config: RunConfig) -> RunConfig:
    """The SFT settings with those of the preference stage that ``PASSED_ON`` names."""
    return config.model_copy(
        update={"sft": config.sft.model_copy(update={name: getattr(config.train, name) for name in PASSED_ON})}
    )


def into(config: RunConfig, folder: Path, start: str) -> RunConfig:
    """``config`` for a stage that starts from the model ``start`` and writes to ``folder``."""
    return config.model_copy(update={"output_dir": folder, "model": config.model.model_copy(update={"path": start})})
