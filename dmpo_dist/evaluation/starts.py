"""Which of the evaluated models another one's stage started from."""

from pathlib import Path

from dmpo_dist.evaluation.seeds import by_name, split_name
from dmpo_dist.modeling.backbone import find_model
from dmpo_dist.modeling.model_files import start_was_changed


def starts_of(models: dict[str, str]) -> dict[str, str]:
    """Model -> the other one of ``models`` (name or name@seed -> folder) that its stage started from, as it says itself.

    One that was trained again in its folder since is another model.

    A model of several seeds counts where all of them started from one model: from its own seed, or one without seeds.
    """
    by_folder = {str(Path(path).resolve()): split_name(entry) for entry, path in models.items()}
    starts: dict[str, str] = {}
    for name, entries in by_name(models).items():
        found = set()
        for seed, entry in entries.items():
            source = find_model(models[entry])
            start = None if start_was_changed(source) else source.stamp.start
            start_name, start_seed = by_folder.get(str(Path(start).resolve()) if start else "", ("", ""))
            found.add(start_name if start_seed in ("", seed) else "")
        if len(found) == 1 and found not in ({""}, {name}):
            starts[name] = found.pop()
    return starts
