"""The state of each model of an experiment, read from the files in its folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dmpo_dist.artifacts.evaluation import Evaluation, weights_digest
from dmpo_dist.artifacts.files import write_json
from dmpo_dist.config import RunConfig
from dmpo_dist.data.store import PreparedData
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.rules import asks_for_rules
from dmpo_dist.experiment.parts import Part
from dmpo_dist.modeling.backbone import find_model
from dmpo_dist.modeling.model_files import start_was_changed
from dmpo_dist.parsing import parse_json
from dmpo_dist.records.read import has_begun, read_run
from dmpo_dist.secrets import redacted

SETTINGS_FILE, DONE_FILE, FAILED_FILE = "settings.json", "done.json", "failed.json"
EVALUATION = "evaluation"
SHOWN = 5  # changed cells named in an error
MODELS_DEPEND_ON = {"bootstrap_samples", "token_budget"}
"""Keys of the evaluation section that change the figures of a trained model; others, such as baselines, do not."""
RULES = {"rule", "rules", "prior_weights"}
"""Further such keys, which count only where they are set: evaluations made before there were rules stay valid."""
BASELINES_IGNORE = {
    "baseline_environment", "token_budget", "order_requests", "candidate_orders", "generate", *RULES
}  # fmt: skip

COUNTED = "likes"
"""What baselines count; evaluations of versions that counted all ratings do not say so and are made again."""

State = Literal["done", "to evaluate", "interrupted", "failed", "to do"]


@dataclass(frozen=True)
class Progress:
    """A model's state, with the step or the reason that belongs to it."""

    state: State
    note: str = ""


def progress(part: Part, data: Mapping[str, PreparedData]) -> Progress:
    """The state of ``part``."""
    if reason := failure(part):
        return Progress("failed", reason)
    if trained(part):
        missing = to_evaluate(part, data)
        done = (part.folder / DONE_FILE).exists() and not missing
        return Progress("done") if done else Progress("to evaluate", ", ".join(missing))
    if begun(part):
        done, total = read_run(part.run).steps
        return Progress("interrupted", f"at step {done} of {total or '?'}")
    return Progress("to do")


def trained(part: Part) -> bool:
    """Whether the stage finished: it writes the model at its end."""
    return part.model.is_dir()


def failure(part: Part) -> str:
    """Why it failed, "" if it did not."""
    file = part.folder / FAILED_FILE
    return _read(file).get("error", "for an unknown reason") if file.exists() else ""


def begun(part: Part) -> bool:
    """Whether training began."""
    return has_begun(part.run)


def to_evaluate(part: Part, data: Mapping[str, PreparedData]) -> list[str]:
    """Names of the datasets on which the model has no evaluation, or only one by other settings or weights."""
    settings = model_settings(part.config)
    return [
        name
        for name in part.evaluate_on
        if name not in data or not evaluated(evaluation_folder(part, name), data[name], settings, part.measured)
    ]


def evaluation_folder(part: Part, dataset: str) -> Path:
    """The folder of the part's evaluation on a dataset."""
    return part.folder / EVALUATION / dataset


def begin(part: Part) -> None:
    """Write the settings down, as a later run must have the same ones to continue."""
    part.folder.mkdir(parents=True, exist_ok=True)
    (part.folder / FAILED_FILE).unlink(missing_ok=True)
    write_json(part.folder / SETTINGS_FILE, {"hash": part.settings_hash, "settings": part.settings})


def stamp(part: Part) -> None:
    """Mark the part as trained and evaluated."""
    (part.folder / FAILED_FILE).unlink(missing_ok=True)
    write_json(part.folder / DONE_FILE, {"hash": part.settings_hash, "evaluated_on": list(part.evaluate_on)})


def stamp_failed(part: Part, error: str, trace: str = "") -> None:
    """Mark the part as failed, in its stage or its evaluation; the next run tries again."""
    part.folder.mkdir(parents=True, exist_ok=True)
    content = redacted({"error": error} | ({"traceback": trace} if trace else {}))
    write_json(part.folder / FAILED_FILE, content)


def require_unchanged(parts: Sequence[Part]) -> None:
    """Raise UserError where a model was trained, or begun, under other settings than the grid now asks for."""
    changed = [(part, lines) for part in parts if (lines := _changes(part))]
    if not changed:
        return
    first, lines = changed[0]
    others = [part.title for part, _ in changed[1 : 1 + SHOWN]]
    more = f" (as were {', '.join(others)}{' and more' if len(changed) > 1 + SHOWN else ''})" if others else ""
    where = first.folder.parent.parent
    raise UserError(
        f"{first.title} in {where} was trained with other settings than the grid now asks for{more}: "
        f"{'; '.join(lines)}. Undo the change, remove these folders to train them again, or write to another output_dir"
    )


def _changes(part: Part) -> list[str]:
    """A text for each key that differs from the part's settings on disk.

    Nothing for a model that failed or whose training never began, as it may start under other settings.
    """
    if not (part.folder / SETTINGS_FILE).exists() or not (trained(part) or (begun(part) and not failure(part))):
        return []
    changed = changed_settings(part)
    if not changed and trained(part) and _has_other_start(part):
        return ["the model it started from was trained again since"]
    return [f"{key} was {old}, is {new}" for key, (old, new) in changed.items()]


def changed_settings(part: Part) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> the value when it was begun last, and the one the grid now asks for, where these differ."""
    file = part.folder / SETTINGS_FILE
    before = _read(file) if file.exists() else {}
    if not before or before.get("hash") == part.settings_hash:
        return {}
    old, new = before.get("settings", {}), part.settings
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return {key: (old.get(key, "not set"), new.get(key, "not set")) for key in keys}


def _has_other_start(part: Part) -> bool:
    return part.start is not None and part.model.is_dir() and start_was_changed(find_model(str(part.model)))


def model_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that the figures of a trained model depend on, as saved in its evaluation."""
    more = {}
    if asks_for_rules(config.evaluation):
        more = config.evaluation.model_dump(mode="json", include=RULES) | {"reference": config.ranking.reference}
    if config.evaluation.candidate_orders > 1:
        more["candidate_orders"] = config.evaluation.candidate_orders
    return config.evaluation.model_dump(mode="json", include=MODELS_DEPEND_ON) | {"seed": config.seed} | more


def baseline_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that the figures of the baselines depend on, as saved in their evaluation."""
    few: dict[str, Any] = {}
    if "shots" in config.evaluation.fit_on:
        few = {"shots": config.data.shots} | ({"shots_seed": config.data.shots_seed} if config.data.shots_seed else {})
    settings = config.evaluation.model_dump(mode="json", exclude=BASELINES_IGNORE)
    return settings | {"seed": config.seed, "counted": COUNTED} | few


def evaluated(
    folder: Path, data: PreparedData, settings: Mapping[str, Any], models: Mapping[str, Path] | None = None
) -> bool:
    """Whether ``folder`` holds an evaluation on the same data by the same ``settings``.

    Args:
        models: name -> folder of the models that it must be of, as they are now: one may have been trained again.
    """
    found = Evaluation.read_if_there(folder)
    if found is None or not data.is_that_of(found.data) or found.settings != settings:
        return False
    return all(name in found.models and _same_weights(found, name, path) for name, path in (models or {}).items())


def _same_weights(found: Evaluation, name: str, model: Path) -> bool:
    """Whether the model of that ``name`` is the one in the folder ``model``, as far as both say which it is."""
    now = weights_digest(model)
    return now is None or found.weights.get(name, now) == now


def _read(file: Path) -> dict[str, Any]:
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{file}: cannot be read; remove the folder {file.parent} to train it again")
    return content
