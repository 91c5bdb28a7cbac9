"""`dmpo models memorized`: probe models for what they know of prepared data before they are trained on it."""

from pathlib import Path

from rich.console import Console

from dmpo_dist.artifacts.files import write_whole
from dmpo_dist.artifacts.memorization import Memorization
from dmpo_dist.config import RunConfig
from dmpo_dist.data.store import PreparedData
from dmpo_dist.evaluation.memorization import memorization_probes, memorization_table, number_of_texts
from dmpo_dist.evaluation.ranking import load_ranking_model
from dmpo_dist.modeling.backbone import find_model, with_length_of
from dmpo_dist.records.progress import UserProgress
from dmpo_dist.tables import markdown, terminal

PAGE = "memorization.md"


def probe_settings(config: RunConfig, titles: int, users: int) -> dict[str, int]:
    """What the figures depend on beside model and data."""
    samples = config.evaluation.bootstrap_samples
    return {"titles": titles, "users": users, "seed": config.seed, "bootstrap_samples": samples}


def probe(
    path: str, data: PreparedData, config: RunConfig, titles: int, users: int, folder: Path, console: Console
) -> Memorization:
    """Probe the model in ``path`` (a folder, GGUF file or hub id) on ``data`` and write the figures to ``folder``.

    Raises:
        UserError: the model cannot be loaded, or see ``memorization_probes``.
    """
    config = with_length_of([find_model(path)], config)
    model = load_ranking_model(path, config)
    settings = probe_settings(config, titles, users)
    folder.mkdir(parents=True, exist_ok=True)  # now, and not after hours, where it cannot be
    samples, total = config.evaluation.bootstrap_samples, number_of_texts(data, titles, users)
    with UserProgress(f"probing {path}", total, 0, console, "loading the model", "texts") as progress:
        probes = memorization_probes(model, data, titles, users, samples, config.seed, progress.advance)
    found = Memorization(
        model=path, data={"path": str(data.path), "fingerprint": data.fingerprint}, settings=settings, probes=probes
    )
    found.write(folder)
    return found


def memorized(path: str, config: RunConfig, titles: int, users: int, console: Console) -> None:
    """Probe a model on ``config.data.path``, show the table and write it to ``config.output_dir``.

    Raises:
        UserError: no prepared data; see ``probe``.
    """
    assert config.data.path is not None
    data = PreparedData.load(config.data.path)
    found = probe(path, data, config, titles, users, config.output_dir, console)
    table = memorization_table(f"what {path} knows of {data.card.name}", found.probes)
    write_whole(config.output_dir / PAGE, f"# {table.caption}\n\n{markdown(table)}\n")
    console.print(terminal(table))
    console.print(f"written to {config.output_dir}/{Memorization.FILE} and {PAGE}", highlight=False)
