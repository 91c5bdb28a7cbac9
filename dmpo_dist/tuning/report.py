"""What a tuning leaves for people: tables and a methods sheet, the trials as CSV, the best settings as YAML."""

import csv
import json
from collections.abc import Sequence
from typing import Any

from dmpo_dist.artifacts.files import whole_file, write_whole
from dmpo_dist.artifacts.tuning import Search, Trial, Tuning
from dmpo_dist.config import RunConfig, dump_config
from dmpo_dist.config.tune import TuneConfig
from dmpo_dist.tables import Cell, Table, markdown
from dmpo_dist.tuning.space import with_values

BEST_FILE, SHEET_FILE, CSV_FILE = "best.yaml", "tune.md", "trials.csv"
COLUMNS = ("search", "trial", "state", "metric", "value", "step", "start", "share", "seconds", "error")
ADVICE = (
    "The best of many figures on the same validation requests flatters: report the test requests, which no search has "
    "seen, and repeat the chosen settings over several seeds."
)


def write_results(tuning: Tuning, config: RunConfig) -> None:
    """Write ``BEST_FILE``, ``SHEET_FILE`` and ``CSV_FILE`` to ``config.output_dir``."""
    output = config.output_dir
    write_whole(output / BEST_FILE, _best_yaml(tuning, config))
    write_whole(output / SHEET_FILE, _sheet(tuning, config))
    with whole_file(output / CSV_FILE) as part, part.open("w", newline="", encoding="utf-8") as file:
        _write_csv(tuning.searches, file)


def trials_table(search: Search, most: int | None = None) -> Table:
    """The trials of a search, the best first; up to ``most`` of them."""
    ranked = sorted(search.trials, key=lambda trial: -1 if trial.value is None else trial.value, reverse=True)
    keys = list(search.space)
    rows = [_row(trial, keys, trial is search.best) for trial in ranked[:most]]
    left_out = len(ranked) - len(rows)
    return Table(
        f"{search.name}: {len(search.trials)} settings tried",
        ["trial", *keys, "state", search.metric, "at step", "seconds"],
        rows,
        text_columns=2 + len(keys),
        note=f"{left_out} more in {CSV_FILE}" if left_out else "",
    )


def _row(trial: Trial, keys: Sequence[str], best: bool) -> list[Cell]:
    value = "" if trial.value is None else f"{trial.value:.4f}"
    state = f"{trial.state} at {trial.share:.0f} %" if trial.state in ("stopped", "out of time") else trial.state
    return [
        Cell(str(trial.number), kind="strong" if best else ""),
        *(Cell(_text(trial.values.get(key))) for key in keys),
        Cell(state),
        Cell(value, kind="strong" if best else "", key=trial.value),
        Cell("" if trial.step is None else str(trial.step)),
        Cell(f"{trial.seconds:.1f}"),
    ]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _best_yaml(tuning: Tuning, config: RunConfig) -> str:
    """The configuration with the best settings of every search, without those of the tuning."""
    best, heads = config.model_copy(update={"tune": TuneConfig(), "output_dir": RunConfig().output_dir}), []
    for search in tuning.searches:
        if search.best is not None:
            best = with_values(best, search.best.values)
            found = f"{search.metric} {search.best.value:.4f} on {tuning.validation_requests} validation requests"
            heads.append(f"# {search.name}: trial {search.best.number} of {len(search.trials)}, {found}")
    use = f"# By dmpo tune. Use it as: dmpo {config.tune.stage} -c {config.output_dir.name}/{BEST_FILE} output_dir=..."
    return "\n".join([use, *heads, dump_config(best, "changed")])


def _sheet(tuning: Tuning, config: RunConfig) -> str:
    lines = [f"# {config.output_dir.name}", _methods(tuning, config), ADVICE]
    for search in tuning.searches:
        lines += [f"## {search.name}", *_of_start(search), markdown(trials_table(search))]
        failed = [f"- trial {t.number}: {t.error}" for t in search.trials if t.error]
        lines += ["Failed:\n\n" + "\n".join(failed)] if failed else []
    return "\n\n".join(lines) + "\n"


def _of_start(search: Search) -> list[str]:
    """A warning where training by the best settings ranks no better than the model it starts from."""
    best = search.best
    if best is None or best.start is None or best.value is None or best.value > best.start:
        return []
    return [f"No trial ranks better than the start ({search.metric} {best.start:.4f}): more steps or another space."]


def _methods(tuning: Tuning, config: RunConfig) -> str:
    """The methods sheet: how each row of a result table was tuned."""
    columns = ["tuned", "space", "asked", "budget", "tried", "finished", "stopped early", "failed", "hours spent",
               "chosen", "validation"]  # fmt: skip
    table = Table("", columns, [_methods_row(search) for search in tuning.searches], text_columns=2)
    how = (
        f"Settings were drawn at random with seed {config.seed}, after the configuration as given (trial 1), and "
        f"compared on {tuning.validation_requests} validation requests of {tuning.data['path']} (fingerprint "
        f"{tuning.data['fingerprint'][:12]}). Trials of a stage were stopped early by ASHA (asynchronous "
        f"successive halving) from {100 * config.tune.earliest_stop:.0f} % of their steps on, with a factor of "
        f"{config.tune.reduction_factor:g}, {config.tune.concurrent} at a time."
    )
    if len(tuning.searches) > 1 and config.evaluation.fit_on == ["shots"]:
        shown = config.data.shots or "all"
        how += f" Baselines are fitted on nothing but the likes that {shown} training groups show."
    return f"## Methods\n\n{how}\n\n{markdown(table)}"


def _methods_row(search: Search) -> list[Cell]:
    count = {state: sum(t.state == state for t in search.trials) for state in ("done", "stopped", "failed")}
    best = search.best
    chosen = "" if best is None else ", ".join(f"{key}={_text(value)}" for key, value in best.values.items())
    space = "; ".join(f"{key} {_axis(*next(iter(axis.items())))}" for key, axis in search.space.items())
    return [
        Cell(search.name),
        Cell(space),
        Cell(f"{search.asked} trials"),
        Cell("no limit" if search.hours is None else f"{search.hours:g} h"),
        Cell(str(len(search.trials))),
        *(Cell(str(count[state])) for state in ("done", "stopped", "failed")),
        Cell(f"{search.seconds / 3600:.3f}"),
        Cell(chosen),
        Cell("" if best is None else f"{search.metric} {best.value:.4f}"),
    ]


def _axis(kind: str, values: Sequence[Any]) -> str:
    shown = [_text(value) for value in values]
    return "of " + ", ".join(shown) if kind == "choice" else f"{kind} {shown[0]} to {shown[1]}"


def _write_csv(searches: Sequence[Search], file: Any) -> None:
    keys = list(dict.fromkeys(key for search in searches for key in search.space))
    writer = csv.writer(file)
    writer.writerow([*COLUMNS, *keys])
    for search in searches:
        for trial in search.trials:
            known = trial.content() | {"search": search.name, "trial": trial.number, "metric": search.metric}
            values = [_text(trial.values[key]) if key in trial.values else "" for key in keys]
            writer.writerow([*("" if known.get(name) is None else known[name] for name in COLUMNS), *values])
