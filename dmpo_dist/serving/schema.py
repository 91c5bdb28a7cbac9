"""What clients send: the shapes of Cohere, Jina and vLLM for /v1/rerank, and ours for the rest."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

Text = Annotated[str, StringConstraints(strip_whitespace=True)]
"""Refused where it holds half of a character, which pydantic lets pass in a plain ``str``."""
Title = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Body(BaseModel):
    """A request; keys that other rerankers know and this one has no use for are passed over."""

    model_config = ConfigDict(extra="ignore", use_attribute_docstrings=True)

    model: str | None = None
    """Passed over: the server has one model."""
    user: str = Field("", max_length=256)
    """Of whom the history is; needed only where prompts show fields of the user."""
    keep_unknown: bool = False
    """Accept history titles that the catalogue does not have."""


class WithHistory(Body):
    history: list[Title] = Field(min_length=1)
    """Titles or item ids that the user liked, oldest first."""


class RerankBody(Body):
    """Rank given documents after a history."""

    query: Text | list[Title] | None = None
    """The history under the name that other rerankers use: a list, or a text with a title on each line."""
    history: list[Title] | None = None
    """Titles or item ids that the user liked, oldest first; in place of query."""
    documents: list[Title] = Field(min_length=1)
    """Titles or item ids to rank, as texts or as {"text": ...}; titles need not be in the catalogue."""
    top_n: int | None = Field(None, ge=0)
    """How many results to return; none or 0 for all."""
    return_documents: bool = True
    """Return each result's text."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"history": ["Heat (1995)", "Alien (1979)"], "documents": ["Up (2009)", "Aliens (1986)"]}]
        }
    )

    @field_validator("documents", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return [one["text"] if isinstance(one, dict) and "text" in one else one for one in value]

    @model_validator(mode="after")
    def _one_history(self) -> "RerankBody":
        if (self.query is None) == (self.history is None):
            raise ValueError("give the user's history either as history or as query")
        if not self.titles:
            raise ValueError("the history is empty: a prompt needs at least one title")
        return self

    @property
    def titles(self) -> list[str]:
        """The history, oldest first."""
        given = self.history if self.query is None else self.query
        lines = given.splitlines() if isinstance(given, str) else given or []
        return [line.strip() for line in lines if line.strip()]


class RecommendBody(WithHistory):
    """The best titles of the catalogue after a history."""

    k: int = Field(10, ge=1, le=1000)
    """How many titles to return."""
    exclude: list[Title] = Field(default_factory=list, max_length=100_000)
    """Titles or item ids to leave out, beside those of the history."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"history": ["Heat (1995)", "Alien (1979)"], "k": 5}]})


class ExplainBody(WithHistory):
    """What each history item contributes to the scores of some documents."""

    documents: list[Title] = Field(min_length=2, max_length=100)
    """Titles or item ids, of which each is compared with the others."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"history": ["Heat (1995)", "Alien (1979)"], "documents": ["Up (2009)", "Aliens (1986)"]}]
        }
    )


class RerankDocument(BaseModel):
    text: str


class RerankResult(BaseModel):
    """A document's index in the request, and what it is ranked by: the score of ``dmpo rank``, by default a
    log-probability in nats, which is negative."""

    index: int
    relevance_score: float
    document: RerankDocument | None = None


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class RerankAnswer(BaseModel):
    """Documents from best to worst; equal scores keep their order."""

    id: str
    model: str
    results: list[RerankResult]
    cut_off: int
    """How many of the oldest history titles did not fit into the prompt, behind which the longest document must fit."""
    usage: Usage


class RecommendResult(BaseModel):
    rank: int
    title: str
    item: str | None
    score: float


class RecommendAnswer(BaseModel):
    """Titles from best to worst, and the catalogue they were chosen from."""

    id: str
    model: str
    catalogue: str
    results: list[RecommendResult]
    not_in_catalogue: list[str]
    """What ``exclude`` names and the catalogue does not hold: nothing was left out for it."""
    cut_off: int
    """How many of the oldest history titles did not fit into the prompt, behind which the longest title must fit."""
    usage: Usage


class ExplainedItem(BaseModel):
    """A history title that the model saw, and its contribution to each document."""

    title: str
    contributions: list[float]


class ExplainAnswer(BaseModel):
    """Leave-one-out contributions: a document's margin over the others with all of the history, minus that without the
    item, in nats; a positive one speaks for the document. ``cut_off`` titles did not fit into the prompt."""

    id: str
    model: str
    documents: list[str]
    margins: list[float]
    history: list[ExplainedItem]
    cut_off: int
