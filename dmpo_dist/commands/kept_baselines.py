"""What the baselines of an evaluation gave, kept until the evaluation is written, so that they are fitted once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dmpo_dist import __version__
from dmpo_dist.artifacts.digest import json_digest
from dmpo_dist.artifacts.files import write_json
from dmpo_dist.commands.scored_parts import PARTS
from dmpo_dist.config import RunConfig
from dmpo_dist.data.store import PreparedData
from dmpo_dist.evaluation.baseline_scores import BaselineScores, baseline_scores
from dmpo_dist.evaluation.whole_catalogue import Ranked
from dmpo_dist.parsing import parse_json


def kept_baseline_scores(
    data: PreparedData, config: RunConfig, catalogue: bool, folder: Path, echo: Callable[[str], None]
) -> BaselineScores:
    """What ``baseline_scores`` gives, from ``folder`` where an interrupted evaluation has left it there.

    Raises:
        UserError: see ``baseline_scores``.
    """
    file = folder / PARTS / f"baselines-{json_digest(_key(data, config, catalogue))[:16]}.json"
    found = _read(file)
    if found is None:
        found = baseline_scores(data, config, catalogue, echo)
        file.parent.mkdir(parents=True, exist_ok=True)
        content = _content(found)
        write_json(file, {"digest": json_digest(content), "content": content})
    else:
        echo("baselines: their scores are there from before the interruption")
    return found


def _key(data: PreparedData, config: RunConfig, catalogue: bool) -> dict[str, Any]:
    """All that the scores depend on; more of the settings than need be."""
    ignored = {"token_budget", "order_requests", "rules", "rule", "prior_weights"}
    return {
        "dmpo": __version__,
        "data": data.fingerprint,
        "log": data.log_digest,
        "shots": config.data.shots,
        "shots_seed": config.data.shots_seed,
        "shots_skip": config.data.shots_skip,
        "seed": config.seed,
        "catalogue": catalogue,
        "exclude_history": config.ranking.exclude_history,
        "evaluation": config.evaluation.model_dump(mode="json", exclude=ignored),
    }


def _content(found: BaselineScores) -> dict[str, Any]:
    return {
        "scores": {name: [row.tolist() for row in rows] for name, rows in found.scores.items()},
        "catalogue": {
            name: {"metrics": {m: v.tolist() for m, v in ranked.metrics.items()}, "shown": ranked.shown.tolist()}
            for name, ranked in found.catalogue.items()
        },
        "details": found.details,
    }


def _read(file: Path) -> BaselineScores | None:
    """None where the file is missing or damaged: then they are fitted again."""
    try:
        written = parse_json(file.read_text(encoding="utf-8"))
        content = written["content"]
        if json_digest(content) != written["digest"]:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return BaselineScores(
        scores={name: [np.array(row) for row in rows] for name, rows in content["scores"].items()},
        catalogue={
            name: Ranked({m: np.array(v) for m, v in of["metrics"].items()}, np.array(of["shown"], dtype=np.int64))
            for name, of in content["catalogue"].items()
        },
        details=content["details"],
    )
