"""``memorization.json``: what a model knows of a dataset before it is trained on it."""

from typing import Any, ClassVar

from pydantic import Field

from dmpo_dist.artifacts.base import Artifact, Typed
from dmpo_dist.artifacts.evaluation import Interval


class ProbeFigures(Typed):
    """One probe: a share of ``count`` items or users, and the same share under a control that nobody can memorise."""

    probe: str
    count: int
    figure: Interval
    control: Interval | None = None
    """None where the control is inside the figure, whose chance level is then a half."""
    difference: Interval | None = None
    """Figure minus control, paired."""


class Memorization(Artifact):
    """All probes of one model on one dataset."""

    FILE: ClassVar[str] = "memorization.json"
    ADVICE: ClassVar[str] = "made by another version? run `dmpo models memorized` again"

    model: str
    data: dict[str, Any]
    """Path and fingerprint of the prepared data."""
    settings: dict[str, int] = Field(default_factory=dict)
    """Number of titles and of users asked for, seed, and bootstrap samples."""
    probes: list[ProbeFigures]
