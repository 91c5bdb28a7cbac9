"""The memorisation probe of an experiment: each pretrained model on each dataset that it is trained on."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from dmpo_dist.artifacts.memorization import Memorization
from dmpo_dist.commands.memorized import probe, probe_settings
from dmpo_dist.commands.train import SCRATCH
from dmpo_dist.data.store import PreparedData
from dmpo_dist.experiment.parts import Part

FOLDER = "memorization"


def probe_models(
    parts: Sequence[Part], data: Mapping[str, PreparedData], output: Path, count: int, console: Console
) -> None:
    """Probe each model that training starts from, unless it was by the same settings; random weights are left out.

    Args:
        count: titles and users to probe on.

    Raises:
        UserError: see ``commands.memorized.probe``.
    """
    for part, folder in _probed(parts, output):
        prepared, path = data[part.cell.dataset], part.config.model.path
        found = Memorization.read_if_there(folder)
        wanted = (probe_settings(part.config, count, count), prepared.fingerprint)
        if found is None or (found.settings, found.data.get("fingerprint")) != wanted:
            probe(path, prepared, part.config, count, count, folder, console)


def probed(parts: Sequence[Part], output: Path) -> list[tuple[str, Memorization]]:
    """(dataset, figures) of all probes that were made."""
    found = [(part.cell.dataset, Memorization.read_if_there(folder)) for part, folder in _probed(parts, output)]
    return [(dataset, figures) for dataset, figures in found if figures is not None]


def _probed(parts: Sequence[Part], output: Path) -> Iterator[tuple[Part, Path]]:
    """One part that is trained from it for each dataset and pretrained model, and the folder of its figures."""
    seen: set[Path] = set()
    for part in parts:
        path = part.config.model.path
        if not part.from_before_training or path == SCRATCH:
            continue
        folder = output / FOLDER / f"{part.cell.dataset}_{hashlib.sha256(path.encode()).hexdigest()[:8]}"
        if folder not in seen:
            seen.add(folder)
            yield part, folder
