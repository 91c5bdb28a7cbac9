"""``tune.json``: which settings `dmpo tune` tried, what each reached on validation, and what it cost."""

from typing import Any, ClassVar, Literal

from pydantic import Field, FiniteFloat

from dmpo_dist.artifacts.base import Artifact, Typed

TrialState = Literal["done", "stopped", "failed", "out of time", "begun"]
"""stopped: by ASHA, as others were better; begun: neither finished nor stopped yet."""


class Trial(Typed):
    """One setting that was tried."""

    number: int
    """From 1, which is the configuration as it was given."""
    values: dict[str, Any]
    """Dotted key -> value."""
    state: TrialState
    value: FiniteFloat | None = None
    """The best of the search's metric on the validation requests, the start left out."""
    step: int | None = None
    """The step that reached it."""
    start: FiniteFloat | None = None
    """The metric before the first step."""
    share: FiniteFloat = 0
    """Percent of the steps that were done."""
    seconds: FiniteFloat = 0
    error: str = ""


class Search(Typed):
    """All settings that were tried of one stage or baseline."""

    name: str
    metric: str
    space: dict[str, Any]
    """As the configuration gives it."""
    asked: int
    """Most trials."""
    hours: FiniteFloat | None
    """Most hours."""
    seconds: FiniteFloat = 0
    """Spent by the clock, over all interruptions."""
    whole_trials: bool = False
    """Whether only trials that came to their end may be the best, as where training leaves its last weights: what one
    had reached when it was stopped is not what its settings lead to."""
    trials: list[Trial] = Field(default_factory=list)

    @property
    def best(self) -> Trial | None:
        """The trial with the highest value; None where none has one.

        Not one that failed, though it was validated before: training by its settings would fail again. Nor one that may
        still fail.
        """
        states = ("done",) if self.whole_trials else ("done", "stopped", "out of time")
        return max(
            (t for t in self.trials if t.value is not None and t.state in states),
            key=lambda t: t.value or 0,
            default=None,
        )

    @property
    def seconds_left(self) -> float | None:
        """Of the budget; None without one."""
        return None if self.hours is None else max(0.0, self.hours * 3600 - self.seconds)


class Tuning(Artifact):
    """All searches of one `dmpo tune`, that of the stage first."""

    FILE: ClassVar[str] = "tune.json"
    ADVICE: ClassVar[str] = "restore the file as the command wrote it, or tune anew in another output_dir"

    data: dict[str, Any]
    """Path and fingerprint, and the digest of the log."""
    start: dict[str, str] = Field(default_factory=dict)
    """Digests of the model that all trials start from; empty where it is made anew."""
    validation_requests: int
    searches: list[Search] = Field(default_factory=list)

    def search(self, name: str) -> Search | None:
        """The search called ``name``, if it has begun."""
        return next((search for search in self.searches if search.name == name), None)
