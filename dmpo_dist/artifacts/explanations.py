"""``explanations.json``: why titles stand where they do, and how faithful that is."""

from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field, FiniteFloat

from dmpo_dist.artifacts.base import Artifact, Typed


class ExplainedToken(Typed):
    """A token of the ranked title, and its log-probability under the model minus that under the reference."""

    text: str
    log_ratio: FiniteFloat


class HistoryItem(Typed):
    """An item of the history: what the score loses without it, and the rank then."""

    item: str | None = None
    title: str
    contribution: FiniteFloat
    rank_without: int | None = None


class ExplainedChange(Typed):
    """The smallest change of the history that was found to move the rank out of the top ``top``, or into it."""

    removed: list[str] = Field(default_factory=list)
    rank_before: int | None = None
    rank_after: int | None = None
    sentence: str = ""
    top: int | None = None


class ExplainedRequest(Typed):
    """Why one item stands where it does for one user.

    ``compared`` of the candidates, itself too, as items were left out.
    """

    user: Annotated[str, BeforeValidator(str)]
    item: str | None = None
    title: str
    rank: int
    candidates: int
    compared: int | None = None
    tokens: list[ExplainedToken] = Field(default_factory=list)
    others_log_ratio: FiniteFloat | None = None
    history: list[HistoryItem] = Field(default_factory=list)
    cut_off: list[str] = Field(default_factory=list)
    counterfactual: ExplainedChange | None = None


class Faithfulness(Typed):
    """Deletion curves: mean change of the title's value as history items are taken away, and areas between curves."""

    value: str = "score"
    left_out: int | None = None
    users: int | None = None
    requests: int | None = None
    random_orders: int | None = None
    bootstrap: dict[str, int] = Field(default_factory=dict)
    areas: dict[str, dict[str, int | FiniteFloat]] = Field(default_factory=dict)
    curves: dict[str, list[FiniteFloat]] = Field(default_factory=dict)


class Explanations(Artifact):
    """What ``dmpo explain`` found."""

    FILE: ClassVar[str] = "explanations.json"
    ADVICE: ClassVar[str] = "made by another version? run `dmpo explain` again, or pass --no-explanations"

    model: str
    reference: str | None = None
    method: str = ""
    requests: list[ExplainedRequest]
    faithfulness: Faithfulness | None = None
