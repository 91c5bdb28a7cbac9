"""The preference objectives by name, and a user's own class by its import path."""

import importlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dmpo_dist.config.objective import CustomObjective, ObjectiveConfig
from dmpo_dist.errors import UserError
from dmpo_dist.objectives.dmpo import Dmpo
from dmpo_dist.objectives.dmpo_released import DmpoReleased
from dmpo_dist.objectives.dpo_pairs import DpoPairs
from dmpo_dist.objectives.ipo import Ipo
from dmpo_dist.objectives.loss import Loss
from dmpo_dist.objectives.mult_dpo import MultDpo
from dmpo_dist.objectives.plackett_luce import PlackettLuce
from dmpo_dist.objectives.preference import Preference
from dmpo_dist.objectives.rank_reward import RankReward
from dmpo_dist.objectives.recpo import Recpo
from dmpo_dist.objectives.sdpo import Sdpo
from dmpo_dist.objectives.simpo import Simpo

OBJECTIVES: dict[str, type[Preference]] = {
    "dmpo": Dmpo,
    "sdpo": Sdpo,
    "dpo_pairs": DpoPairs,
    "dmpo_released": DmpoReleased,
    "ipo": Ipo,
    "simpo": Simpo,
    "recpo": Recpo,
    "mult_dpo": MultDpo,
    "plackett_luce": PlackettLuce,
    "rank_reward": RankReward,
}
MEMBERS = ("sums", "needs_reference", "scores_history", "initial", "__call__")


def make_objective(config: ObjectiveConfig) -> Loss:
    """The loss of an ``objective`` section.

    Raises:
        UserError: its ``import_path`` or ``kwargs`` do not make a ``Loss``.
    """
    if isinstance(config, CustomObjective):
        return _make_custom(config.import_path, config.kwargs)
    return OBJECTIVES[config.name](**config.model_dump())


def _make_custom(import_path: str, kwargs: Mapping[str, Any]) -> Loss:
    key = f"objective.import_path={import_path}"
    made = _load_class(import_path, key)
    try:
        inspect.signature(made).bind(**kwargs)
        loss = made(**kwargs)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UserError(f"{key}: objective.kwargs={dict(kwargs)} do not fit: {wrong}") from None
    except Exception as error:
        raise UserError(
            f"{key}: objective.kwargs={dict(kwargs)} do not fit {made.__name__}{inspect.signature(made)}: {error}"
        ) from None
    _require_loss(loss, key)
    return loss


def _load_class(import_path: str, key: str) -> type:
    """The class at ``module:Class``. The working directory counts as well, last: ``python -m`` and torchrun have it on
    their path, and Ray gives its workers the driver's, but the ``dmpo`` script does not have it."""
    module_name, _, name = import_path.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module does when it is imported
        raise UserError(
            f"{key}: the module {module_name} cannot be imported ({type(error).__name__}: {error}); it must be "
            f"installed on every node, or lie in the working directory ({folder})"
        ) from error
    found = getattr(module, name, None)
    if not isinstance(found, type):
        classes = sorted(n for n, v in vars(module).items() if isinstance(v, type) and v.__module__ == module.__name__)
        raise UserError(f"{key}: {module.__file__} has no class {name}; its classes are {', '.join(classes) or 'none'}")
    return found


def _require_loss(loss: Any, key: str) -> None:
    """Refuse what does not implement ``Loss``."""
    see = "see dmpo_dist/objectives/loss.py, or derive the class from dmpo_dist.objectives.preference.Preference"
    lacking = [name for name in MEMBERS if not hasattr(loss, name)]
    if lacking:
        raise UserError(f"{key}: the class has no {', '.join(lacking)}; {see}")
    if isinstance(loss.sums, str) or "loss" not in loss.sums or not all(isinstance(name, str) for name in loss.sums):
        raise UserError(f"{key}: sums is {loss.sums!r}, but must be names with 'loss' among them; {see}")
    if isinstance(loss, Preference) and type(loss).preference_loss is Preference.preference_loss:
        raise UserError(f"{key}: the class derives from Preference and has no preference_loss; {see}")
    for call, count in (("__call__", 4), ("initial", 2)):
        try:
            inspect.signature(getattr(loss, call)).bind(*[None] * count)
        except TypeError as error:
            raise UserError(f"{key}: {call} does not take its {count} arguments ({error}); {see}") from None
