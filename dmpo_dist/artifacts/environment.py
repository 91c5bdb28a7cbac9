"""``environment.json``: what a run ran on, and on which data."""

from typing import ClassVar

from pydantic import Field

from dmpo_dist.artifacts.base import Artifact


class Environment(Artifact):
    """Versions, machine, seed and data of a run; None for what is not known."""

    FILE: ClassVar[str] = "environment.json"
    ADVICE: ClassVar[str] = "restore the file as the run wrote it, or remove it"

    command: str | None = None
    """The subcommand of `dmpo` that began the run, as in "train" or "bench scaling"."""
    dmpo_dist: str | None = None
    git_commit: str | None = None
    """Ends in "-dirty" where files of the checkout differed from it."""
    python: str | None = None
    platform: str | None = None
    cpus: int | None = None
    packages: dict[str, str | None] = Field(default_factory=dict)
    """Versions by package."""
    seed: int | None = None
    run_id: str = ""
    """Tells the run from an earlier one in the same folder; a resumed run keeps it."""
    data_fingerprint: str | None = None
    """Of the training data, see ``data.store.few_fingerprint``."""
    start_digests: dict[str, str] = Field(default_factory=dict)
    """Of the files of the starting model, see ``modeling.model_files.start_digests``."""
