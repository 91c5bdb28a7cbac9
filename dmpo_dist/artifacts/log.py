"""``metrics.jsonl``: one record a line, told apart by ``kind``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from dmpo_dist.artifacts.base import Typed, first_problem
from dmpo_dist.errors import UserError
from dmpo_dist.parsing import parse_json, read_text

METRICS_FILE = "metrics.jsonl"
COMMANDS = {"sft": "sft", "preference": "train"}
"""Stage -> the command that trains it, which is also its section of the configuration."""
Stage = Annotated[Literal["sft", "preference"], BeforeValidator(lambda stage: _stage_of_command(stage))]


class LogLine(Typed):
    """What all records have: when they were written, as Unix time."""

    time: float | None = None


class StartRecord(LogLine):
    """The workers are ready: what is trained, on what, and how."""

    kind: Literal["start"] = "start"
    stage: Stage | None = None
    route: str = ""
    """The attention backend, and why it was chosen."""
    route_reason: str = ""
    reference: str = ""
    parameters: int | None = None
    trainable: int | None = None
    groups: int | None = None
    token_budget: int | None = None
    validation_requests: int | None = None
    truncated: int = 0
    """Histories that were shortened to fit."""
    steps: int = 0
    world_size: int | None = None
    device: str | None = None
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    setup_seconds: float | None = None


class StepRecord(LogLine):
    """Means since the record before, over all workers; further keys are what the stage's loss has to tell."""

    kind: Literal["step"] = "step"
    stage: Stage | None = None
    step: int
    """Optimizer steps done."""
    total_steps: int | None = None
    loss: float | None = None
    margin: float | None = None
    """Reward of the positive minus the mean of its negatives'."""
    accuracy: float | None = None
    """Share of negatives with a log-prob below the positive's."""
    learning_rate: float | None = None
    grad_norm: float | None = None
    groups_per_second: float | None = None
    tokens_per_second: float | None = None
    reuse: float | None = None
    """Tokens of separate rows over tokens that ran."""
    imbalance: float | None = None
    slowest_rank: int | None = None
    slowest_share: float | None = None
    """Busy time of the slowest rank over the mean."""
    memory_gib: float | None = None
    refresh_seconds: float | None = None
    """What the search of titles by ``train.on_policy`` took since the record before."""
    refresh_share: float | None = None
    """Of the time since then."""
    drawn_titles: int | None = None
    """Distinct titles among all negatives of the latest draw."""
    top10_titles: int | None = None
    """Distinct titles among the ten best of all its prompts."""
    target_found: float | None = None
    """Share of its groups in which the search found the positive."""
    target_rank: float | None = None
    """Mean rank of the positive in these."""

    def figures(self) -> dict[str, Any]:
        """All numbers of the record by name."""
        return _without(self, "kind", "stage", "step", "total_steps", "time")


class ValidationRecord(LogLine):
    """Ranking metrics of the validation requests after ``step`` steps; the metrics are further keys."""

    kind: Literal["validation"] = "validation"
    step: int

    def figures(self) -> dict[str, Any]:
        """Metric -> value."""
        return _without(self, "kind", "step", "time")


class CheckpointRecord(LogLine):
    """A checkpoint of ``step`` is complete."""

    kind: Literal["checkpoint"] = "checkpoint"
    step: int


class NoteRecord(LogLine):
    """A sentence for people."""

    kind: Literal["note"] = "note"
    text: str


class EndRecord(LogLine):
    """The stage is finished: the weights of ``selected_step`` are in the folder ``model``."""

    kind: Literal["end"] = "end"
    selected_step: int
    """0: no later step was better than the start on validation, so that the start is the result."""
    model: str
    select_metric: str = "ndcg@10"
    """What the two figures are of."""
    start: float | None = None
    """Validation before the first step."""
    best_later: float | None = None
    """The best validation after it."""
    best_later_step: int | None = None


LogRecord = Annotated[
    StartRecord | StepRecord | ValidationRecord | CheckpointRecord | NoteRecord | EndRecord, Field(discriminator="kind")
]
RECORD: TypeAdapter[LogRecord] = TypeAdapter(LogRecord)
KINDS = ("start", "step", "validation", "checkpoint", "note", "end")


@dataclass(frozen=True)
class MetricsLog:
    """A metrics.jsonl.

    Attributes:
        records: in order.
        lines: how many lines it has.
        damaged: numbers, from 1, of the lines that are no record, such as the half line of a killed run.
    """

    records: Sequence[LogRecord]
    lines: int = 0
    damaged: Sequence[int] = ()


def read_log(file: Path) -> MetricsLog:
    """Read a metrics.jsonl of any version; lines that are no record are left out and numbered.

    Raises:
        UserError: it cannot be read, or a field of a record is missing or of another type.
    """
    lines = read_text(file, "was it edited or copied in part?").splitlines()
    records: list[LogRecord] = []
    damaged: list[int] = []
    stage: str | None = None
    for number, line in enumerate(lines, start=1):
        content = _json_object(line)
        if content is None or content.get("kind") not in (*KINDS, "train"):
            damaged += [number] if line.strip() else []
            continue
        try:
            record = parse_record(content, stage)
        except ValidationError as error:
            raise UserError(f"{file}: line {number}: {first_problem(error)}; was it edited?") from None
        stage = record.stage if isinstance(record, StartRecord) else stage
        records.append(record)
    return MetricsLog(records, len(lines), damaged)


def parse_record(content: Mapping[str, Any], stage: str | None) -> LogRecord:
    """The record ``content``; one of kind ``train``, as steps were called once, becomes a step of ``stage``.

    Args:
        stage: of the run; None tells it by the record's margin, which SFT has none of.
    """
    if content["kind"] == "train":
        told = stage or ("preference" if "margin" in content else "sft")
        content = {**content, "kind": "step", "stage": told}
    return RECORD.validate_python(content)


def by_step(records: Sequence[LogRecord], kind: type[StepRecord] | type[ValidationRecord]) -> pd.DataFrame:
    """Figures of the records of one kind, indexed by step; infinities and null are gaps.

    Where a resumed run logged a step again, its last record counts.
    """
    found = [record for record in records if isinstance(record, kind)]
    rows = [record.figures() for record in found]
    frame = pd.DataFrame(rows, columns=sorted({name for row in rows for name in row}))
    numbers = frame.apply(pd.to_numeric, errors="coerce").replace([np.inf, -np.inf], np.nan)
    numbers = numbers.assign(step=pd.Series([record.step for record in found], dtype="int64"))
    return numbers.drop_duplicates("step", keep="last").sort_values("step").set_index("step")


def _stage_of_command(stage: Any) -> Any:
    """``preference`` for ``train``, by which files of earlier versions call it."""
    return "preference" if stage == "train" else stage


def _without(record: LogLine, *names: str) -> dict[str, Any]:
    return {name: value for name, value in record.content().items() if name not in names}


def _json_object(line: str) -> dict[str, Any] | None:
    try:
        content = parse_json(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None
