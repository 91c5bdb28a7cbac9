"""What a leak check found."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Row = Mapping[str, Any]  # the columns of ``ROW_FEATURES``
Verdict = Literal["ok", "warning", "leak", "not checked"]

ENOUGH = 20  # rows or titles below which a share says nothing
EXAMPLES = 3


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: name of the check.
        verdict: ``not checked`` where the rows lack what the check needs; ``text`` says what is missing.
        text: one sentence with the figures.
        figures: the figures for programs.
        examples: a few of the cases found.
    """

    check: str
    verdict: Verdict
    text: str
    figures: dict[str, Any] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
