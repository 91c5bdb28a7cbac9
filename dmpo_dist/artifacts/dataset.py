"""``dataset.json``: the card of prepared data."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from dmpo_dist.artifacts.base import Artifact, Typed


class Cut(Typed):
    """A moment at which a split begins: Unix time, and the same for people."""

    timestamp: int
    utc: str


class LeakFinding(Typed):
    """What one leak check found; see ``data.leaks.Finding``."""

    check: str
    verdict: Literal["ok", "warning", "leak", "not checked"]
    text: str
    figures: dict[str, Any] = Field(default_factory=dict)
    examples: list[str] = Field(default_factory=list)


class DatasetCard(Artifact):
    """What prepared data is and how it was made."""

    FILE: ClassVar[str] = "dataset.json"
    ADVICE: ClassVar[str] = "damaged, or not the card of prepared data; run `dmpo data prepare` again"

    format_version: int | None = None
    name: str
    seed: int | None = None
    counts: dict[str, int]
    """Split -> groups."""
    users: dict[str, int] = Field(default_factory=dict)
    """Split -> users."""
    cuts: dict[str, Cut] | None = None
    """Where validation and test begin; None where the split is not by time."""
    dropped: dict[str, dict[str, int]] = Field(default_factory=dict)
    """Split -> reason -> likes that gave no group."""
    notes: list[str] = Field(default_factory=list)
    items: bool = False
    """Whether items.parquet lies beside it."""
    interactions: bool = False
    """Whether interactions.parquet lies beside it."""
    fingerprint: str
    """sha256 over the content of rows and items."""
    digests: dict[str, str] | None = None
    """Path -> digest of the files of rows, items and interactions, see ``artifacts.digest``; None in older cards."""
    config: dict[str, Any] = Field(default_factory=dict)
    """The section ``data`` of the configuration."""
    leaks: list[LeakFinding] = Field(default_factory=list)
    shown_at: dict[str, dict[str, list[int]]] | None = None
    """Where prompts list the candidates: split -> their number -> how often the target stood at each position."""
