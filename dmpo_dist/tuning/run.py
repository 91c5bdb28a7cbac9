"""`dmpo tune`: the search over a stage's settings, then over those of each baseline with the same budget."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from dmpo_dist.artifacts.locks import only_one
from dmpo_dist.artifacts.tuning import Search, Tuning
from dmpo_dist.commands.evaluate import check_classical
from dmpo_dist.commands.run_folder import open_run_folder, require_run_of
from dmpo_dist.commands.train import checked_job
from dmpo_dist.config import RunConfig
from dmpo_dist.config.tune import Space
from dmpo_dist.data.place import require_prepared
from dmpo_dist.data.store import PreparedData
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.backbone import find_model
from dmpo_dist.modeling.model_files import weights_key
from dmpo_dist.tables import terminal
from dmpo_dist.training.job import Kind
from dmpo_dist.tuning.baselines import METRIC, baseline_spaces, data_to_fit_on, search_baseline
from dmpo_dist.tuning.report import BEST_FILE, CSV_FILE, SHEET_FILE, trials_table, write_results
from dmpo_dist.tuning.space import ends, require_baseline_spaces, require_stage_space, trial_values, with_values
from dmpo_dist.tuning.stage import RUN, TRIALS, run_folder, search_stage, with_own_paths

SHOWN = 10
FREE = ("tune.trials", "tune.hours", "tune.concurrent", "cluster.")
"""What a tuning that goes on may have otherwise: more trials, more time, other machines."""


def tune(config: RunConfig, console: Console, resume: bool = False, overwrite: bool = False) -> Tuning:
    """Tune ``config.tune.stage`` and the baselines, and write what was found to ``config.output_dir``.

    Args:
        resume: go on in the folder of an interrupted tuning, or give one that ended more trials or time.
        overwrite: remove an earlier tuning there.

    Raises:
        UserError: an axis that cannot be tuned, data without validation requests, several workers, or no trial that
            could be trained; see also ``open_run_folder``.
    """
    if resume:
        require_run_of("tune", config.output_dir)
    kind: Kind = "sft" if config.tune.stage == "sft" else "preference"
    data = PreparedData.load(require_prepared(config.data.path))
    config, spaces = _checked(config, kind, data)
    open_run_folder(config, "tune", resume, data.fingerprint, overwrite, FREE)
    fitted_on = data_to_fit_on(config, data) if spaces else data
    with only_one(config.output_dir):
        tuning = _begun(config, data)

        def save() -> None:
            tuning.write(config.output_dir)

        stage = config.sft if config.tune.stage == "sft" else config.train
        search = _search(tuning, f"dmpo {config.tune.stage}", stage.select_metric, config.tune.space, config)
        search.whole_trials = stage.select == "last"
        values = trial_values(config, search.space, search.asked, config.seed)
        _say_plan(search, values, console)
        search_stage(search, values, kind, config, save, console)
        _require_some(search)
        for name, space in spaces.items():
            of_baseline = _search(tuning, name, METRIC, space, config)
            tried = trial_values(config, space, of_baseline.asked, config.seed)
            _say_plan(of_baseline, tried, console)
            search_baseline(of_baseline, tried, config, fitted_on, save, console)
        save()
        write_results(tuning, config)
        _show(tuning, config, console)
    return tuning


def _checked(config: RunConfig, kind: Kind, data: PreparedData) -> tuple[RunConfig, dict[str, Space]]:
    """``config`` with absolute paths, and the spaces of the baselines; refuses what would fail in every trial."""
    if config.cluster.workers > 1:
        raise UserError(
            f"cluster.workers={config.cluster.workers}: a trial trains with one worker; set cluster.workers=1, and "
            "tune.concurrent for several trials at a time"
        )
    if not len(data.validation):
        raise UserError(f"{data.path} holds no validation requests to compare trials on; see its card.md")
    require_stage_space(config, kind)
    if config.cluster.storage_path is not None:
        raise UserError(
            f"cluster.storage_path={config.cluster.storage_path} has no effect: each trial keeps its checkpoints in "
            "its folder below output_dir; leave it out (cluster.storage_path=null)"
        )
    spaces = baseline_spaces(config, data)
    require_baseline_spaces(config, spaces)
    checked_job(kind, config)
    for key in ("train.negatives", "data.shots"):  # keys of which the data says how far they go
        for value in ends(config.tune.space.get(key, {"choice": []})):
            try:
                checked_job(kind, with_values(config, {key: value}))
            except UserError as error:
                raise UserError(f"tune.space.{key}: {error}") from None
    check_classical(list(spaces), config, Console(quiet=True))
    return with_own_paths(config), spaces


def _begun(config: RunConfig, data: PreparedData) -> Tuning:
    """What ``output_dir`` holds so far."""
    found = Tuning.read_if_there(config.output_dir)
    start = {} if config.model.path == "scratch" else weights_key(find_model(config.model.path))
    if found is None:
        return Tuning(data=data.about(), start=start, validation_requests=len(data.validation), searches=[])
    if found.start and found.start != start:
        raise UserError(
            f"{config.model.path} does not hold the model that {config.output_dir} began with; give that model, or "
            "tune anew in another output_dir"
        )
    if not data.is_that_of(found.data):
        raise UserError(
            f"{data.path} does not hold the data that {config.output_dir} began with; give that data, or tune anew in "
            "another output_dir"
        )
    return found


def _search(tuning: Tuning, name: str, metric: str, space: Space, config: RunConfig) -> Search:
    """The search called ``name``, with the budget as it is now."""
    search = tuning.search(name)
    if search is None:
        search = Search(name=name, metric=metric, space=dict(space), asked=0, hours=None, seconds=0, trials=[])
        tuning.searches = [*tuning.searches, search]
        search = tuning.searches[-1]
    search.asked, search.hours = config.tune.trials, config.tune.hours
    return search


def _require_some(search: Search) -> None:
    if search.best is None:
        reasons = [trial.error for trial in search.trials if trial.error]
        until = (
            "a trial came to its end, as it must with select=last" if search.whole_trials else "the first validation"
        )
        why = f"the first failed: {reasons[0]}" if reasons else f"the time was over before {until}"
        raise UserError(f"{search.name}: no trial reached a validation without failing; {why}")


def _say_plan(search: Search, values: Sequence[dict[str, Any]], console: Console) -> None:
    over = sum(trial.state != "begun" for trial in search.trials)
    time = "" if search.hours is None else f", {(search.seconds_left or 0) / 3600:.2f} of {search.hours:g} hours left"
    fewer = f" (the space has no more than {len(values)})" if len(values) < search.asked else ""
    console.print(
        f"{search.name}: {len(values)} trials{fewer}, {over} of them done{time}", style="bold", highlight=False
    )


def _show(tuning: Tuning, config: RunConfig, console: Console) -> None:
    for search in tuning.searches:
        console.print(terminal(trials_table(search, SHOWN)))
    best, output = tuning.searches[0].best, config.output_dir
    assert best is not None
    if best.start is not None and best.value is not None and best.value <= best.start:
        console.print(f"warning: no trial ranks better than the start ({best.start:.4f})", highlight=False)
    model = run_folder(output, best.number) / "model"
    trained = f"; its model is in {model}" if model.is_dir() else ""
    console.print(f"best: trial {best.number}{trained}", highlight=False, soft_wrap=True)
    console.print(f"train by it: dmpo {config.tune.stage} -c {output / BEST_FILE} output_dir=...",
                  highlight=False, soft_wrap=True)  # fmt: skip
    console.print(
        f"written to {output}: {BEST_FILE}, {SHEET_FILE}, {CSV_FILE}, {Tuning.FILE}, {TRIALS}/NUMBER/{RUN}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
