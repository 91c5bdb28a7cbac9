"""Distributed Direct Multi-Preference Optimization (DMPO) for LLM recommenders.

    import dmpo_dist as dmpo
    data = dmpo.prepare(frame, columns={...})
    sft = dmpo.train(data, "Qwen/Qwen3-0.6B", stage="sft")
    model = dmpo.train(data, sft, objective="dmpo", negatives=7)
    model.rank(history=[...], candidates=[...])
    dmpo.evaluate(data, {"sft": sft, "dmpo": model})

docs/PYTHON.md describes it. Names are imported when they are first used, so that ``import dmpo_dist`` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmpo_dist.api import evaluate, load, prepare, train
    from dmpo_dist.modeling.ranking_model import RankingModel
    from dmpo_dist.modeling.shared_prompt import shared_prompt_log_probs
    from dmpo_dist.objectives.dmpo import Dmpo
    from dmpo_dist.objectives.dmpo_released import DmpoReleased
    from dmpo_dist.objectives.dpo_pairs import DpoPairs
    from dmpo_dist.objectives.functional import preference_loss
    from dmpo_dist.objectives.ipo import Ipo
    from dmpo_dist.objectives.mult_dpo import MultDpo
    from dmpo_dist.objectives.plackett_luce import PlackettLuce
    from dmpo_dist.objectives.rank_reward import RankReward
    from dmpo_dist.objectives.recpo import Recpo
    from dmpo_dist.objectives.sdpo import Sdpo
    from dmpo_dist.objectives.simpo import Simpo

__version__ = "0.1.0"
__all__ = [
    "Dmpo",
    "DmpoReleased",
    "DpoPairs",
    "Ipo",
    "MultDpo",
    "PlackettLuce",
    "RankReward",
    "RankingModel",
    "Recpo",
    "Sdpo",
    "Simpo",
    "evaluate",
    "load",
    "preference_loss",
    "prepare",
    "shared_prompt_log_probs",
    "train",
]

_HOMES = {
    "Dmpo": "objectives.dmpo",
    "DmpoReleased": "objectives.dmpo_released",
    "DpoPairs": "objectives.dpo_pairs",
    "Ipo": "objectives.ipo",
    "MultDpo": "objectives.mult_dpo",
    "PlackettLuce": "objectives.plackett_luce",
    "RankReward": "objectives.rank_reward",
    "RankingModel": "modeling.ranking_model",
    "Recpo": "objectives.recpo",
    "Sdpo": "objectives.sdpo",
    "Simpo": "objectives.simpo",
    "evaluate": "api",
    "load": "api",
    "preference_loss": "objectives.functional",
    "prepare": "api",
    "shared_prompt_log_probs": "modeling.shared_prompt",
    "train": "api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
