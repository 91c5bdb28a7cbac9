"""What evaluations, explanations and studies left on disk, read back and checked."""

import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pandas as pd
from pydantic import BaseModel, Field, FiniteFloat, ValidationError, model_validator

from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.metrics import sure_hits
from dmpo_dist.evaluation.seeds import split_name

EVALUATION_FILE, EXPLANATIONS_FILE, STUDY_FILE, CARD_FILE = (
    "evaluation.json", "explanations.json", "experiment.parquet", "dataset.json"
)  # fmt: skip
STUDY_COLUMNS = ("dataset", "evaluated_on", "model", "metric", "value")
STUDY_OPTIONAL = ("shots", "train_groups", "k", "objective", "free", "seed", "low", "high", "loss")
STUDY_LOSSES = ("loss", "final_preference_loss", "final_train_loss")

Record = TypeVar("Record", bound=BaseModel)


class Interval(BaseModel):
    """A figure and, where it was resampled, its 95 % interval; a bare number is a figure without one."""

    value: FiniteFloat
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, data: Any) -> Any:
        return {"value": data} if isinstance(data, int | float) else data


Metrics = Annotated[dict[str, Interval], Field(min_length=1)]


class Comparison(BaseModel):
    """The mean difference ``a - b`` of a metric over the same users, and over ``seeds`` where both have some."""

    a: str
    b: str
    metric: str
    difference: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat
    p: FiniteFloat | None = None
    seeds: list[str] = []


class Stratum(BaseModel):
    """Some of the requests, and all models on them."""

    requests: int
    models: dict[str, Metrics]


class Catalogue(BaseModel):
    """Ranking among all items."""

    items: int | None = None
    models: dict[str, Metrics]

    @model_validator(mode="before")
    @classmethod
    def _by_model(cls, data: Any) -> Any:
        """``{"gini@10": {model: figure}}`` beside ``models`` is put among each model's metrics."""
        if not isinstance(data, dict) or not isinstance(data.get("models"), dict):
            return data
        models = {name: dict(metrics) for name, metrics in data["models"].items()}
        for metric in ("coverage@10", "gini@10"):
            for name, figure in (data.get(metric) or {}).items():
                models.setdefault(name, {})[metric] = figure
        return {**data, "models": models}


class Moved(BaseModel):
    """How far scores moved at most, in nats."""

    max_difference: FiniteFloat


class Order(BaseModel):
    """Requests scored again: by model, with ``candidates`` in other orders and with ``packing`` otherwise."""

    requests: int
    models: dict[str, dict[str, Moved]]


class Baseline(BaseModel):
    """What is known of the training of a classical baseline."""

    settings: dict[str, FiniteFloat] = {}
    validation: dict[str, FiniteFloat] = {}
    seconds: FiniteFloat | None = None
    requests_with_unknown_history: int = 0
    unknown_positives: int = 0


class Evaluation(BaseModel):
    """``evaluation.json``."""

    requests: int
    negatives: Annotated[dict[str, int], Field(min_length=1)]
    models: Annotated[dict[str, Metrics], Field(min_length=1)]
    comparisons: list[Comparison] = []
    data: dict[str, Any] = {}
    folders: dict[str, str] = {}
    strata: dict[str, dict[str, Stratum]] = {}
    catalogue: Catalogue | None = None
    seeds: dict[str, dict[str, dict[str, FiniteFloat]]] = {}
    notes: list[str] = []
    baselines: dict[str, Baseline] = {}
    order: Order | None = None

    @property
    def most_negatives(self) -> int:
        """Of any request."""
        return self.negatives.get("most", max(self.negatives.values()))

    @property
    def sure_hits(self) -> tuple[str, ...]:
        """Metrics that say nothing of so few candidates."""
        return sure_hits(self.most_negatives)

    @property
    def trained(self) -> dict[str, str]:
        """Language model -> its folder, of one of its seeds where ``folders`` has them as ``name@seed``."""
        by_name = {split_name(name)[0]: folder for name, folder in reversed(self.folders.items())} | self.folders
        return {name: by_name[name] for name in self.models if name in by_name}


class Token(BaseModel):
    """A token of the ranked title, and its log-probability under the model minus that under the reference."""

    text: str
    log_ratio: FiniteFloat


class HistoryItem(BaseModel):
    """An item of the history: what the score loses without it, and the rank then."""

    title: str
    contribution: FiniteFloat
    rank_without: int | None = None


class Counterfactual(BaseModel):
    """The smallest change of the history that was found to move the rank."""

    removed: list[str] = []
    rank_before: int | None = None
    rank_after: int | None = None
    sentence: str = ""


class ExplainedRequest(BaseModel):
    """Why one item stands where it does for one user; ``compared`` of the candidates, itself too, as items were left out."""

    user: str
    title: str
    rank: int
    candidates: int
    compared: int | None = None
    tokens: list[Token] = []
    history: list[HistoryItem] = []
    cut_off: list[str] = []
    counterfactual: Counterfactual | None = None

    @model_validator(mode="before")
    @classmethod
    def _user_as_text(cls, data: Any) -> Any:
        return {**data, "user": str(data["user"])} if isinstance(data, dict) and "user" in data else data


class Faithfulness(BaseModel):
    """Deletion curves: mean change of the title's value as history items are taken away, and areas between curves."""

    value: str = "score"
    users: int | None = None
    curves: dict[str, list[FiniteFloat]] = {}
    areas: dict[str, dict[str, FiniteFloat]] = {}


class Explanations(BaseModel):
    """``explanations.json``."""

    model: str
    reference: str | None = None
    method: str = ""
    requests: list[ExplainedRequest]
    faithfulness: Faithfulness | None = None


def read_evaluation(file: Path) -> Evaluation:
    """``evaluation.json`` of any version that names its models' metrics as this one does.

    Raises:
        UserError: the file is damaged, or of a version that this one cannot show.
    """
    return _read(Evaluation, file, "made by another version? run `dmpo evaluate` again, or leave this folder out")


def read_explanations(file: Path) -> Explanations:
    """``explanations.json``; raises UserError as ``read_evaluation`` does."""
    return _read(Explanations, file, "made by another version? run `dmpo explain` again, or pass --no-explanations")


def read_card(file: Path) -> dict[str, Any]:
    """``dataset.json`` of prepared data; raises UserError where it is damaged."""
    card = _json(file)
    if not isinstance(card, dict) or not {"name", "counts", "fingerprint"} <= card.keys():
        raise UserError(f"{file}: not the card of prepared data (no name, counts, fingerprint); prepare the data again")
    return card


def read_study(file: Path) -> pd.DataFrame:
    """``experiment.parquet``, a row per cell, model and metric; columns of ``STUDY_OPTIONAL`` it lacks are all missing.

    ``loss`` is the first of ``STUDY_LOSSES`` it has.

    Raises:
        UserError: it cannot be read, or lacks one of ``STUDY_COLUMNS``.
    """
    try:
        table = pd.read_parquet(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({_first_line(error)}); run `dmpo experiment` again") from None
    missing = [name for name in STUDY_COLUMNS if name not in table]
    if missing:
        raise UserError(f"{file}: has no column {', '.join(missing)}; made by another version? run it again")
    if table.empty:
        raise UserError(f"{file}: holds no rows; no cell of the experiment is finished yet")
    loss = next((table[name] for name in STUDY_LOSSES if name in table), None)
    table = table.reindex(columns=[*STUDY_COLUMNS, *STUDY_OPTIONAL]).assign(loss=loss)
    numbers = [name for name in ("value", *STUDY_OPTIONAL) if name not in ("objective", "free")]
    return table.assign(**{name: pd.to_numeric(table[name], errors="coerce").astype(float) for name in numbers})


def _read(kind: type[Record], file: Path, advice: str) -> Record:
    content = _json(file)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{file}: {place}: {first['msg'].lower()}; {advice}") from None


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({_first_line(error)}); was it cut off? write it again") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
