"""The settings of ``dmpo bench speed``, checked before anything is measured."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from dmpo_dist.bench.implementations import BENCH_MODEL, LORA_RANK, ModelSpec
from dmpo_dist.bench.trl_pairs import require_trl
from dmpo_dist.errors import UserError
from dmpo_dist.planning.flops import shape_of

PROMPTS, NEGATIVES, VOCABS = (64, 256, 1024), (1, 3, 7, 15), (4096, 32000)


@dataclass(frozen=True)
class SpeedCell:
    """Lengths of the groups of one measurement, in tokens, and the vocabulary."""

    prompt: int
    negatives: int
    vocab: int
    response: int = 12

    def __str__(self) -> str:
        return f"P={self.prompt} K={self.negatives} V={self.vocab}"


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on; it is saved in the JSON, so that ``dmpo bench gate`` can repeat the run.

    Attributes:
        cells: the cells to measure.
        model: the content of a config.json; each cell sets its vocabulary.
        device, dtype: device (``cpu`` or ``cuda``) and dtype of the models.
        threads: CPU threads of every implementation.
        rounds: how often each implementation is timed in a cell.
        with_trl: whether TRL is measured, too.
        groups_per_row: also measure ours with this many groups in one row; 1 does not.
        compiled: whether ours runs with ``model.compile``; TRL runs uncompiled.
    """

    cells: tuple[SpeedCell, ...]
    model: dict[str, Any]
    device: str
    dtype: str
    threads: int
    rounds: int = 5
    with_trl: bool = True
    groups_per_row: int = 1
    compiled: bool = False

    def spec(self, cell: SpeedCell) -> ModelSpec:
        """The model of ``cell``."""
        return ModelSpec({**self.model, "vocab_size": cell.vocab}, self.device, self.dtype, self.compiled)


def make_settings(
    prompts: Sequence[int],
    negatives: Sequence[int],
    vocabs: Sequence[int],
    response: int,
    model_config: Path | None,
    device: str,
    threads: int,
    rounds: int,
    with_trl: bool,
    groups_per_row: int,
    compiled: bool,
) -> Settings:
    """The command line's values, checked and completed; empty lists and 0 threads stand for the defaults.

    Raises:
        UserError: prompts longer than the model reads, an unusable model, a missing device, or no trl.
    """
    model = BENCH_MODEL if model_config is None else _read_model(model_config)
    longest, context = max(prompts or PROMPTS) + response, model.get("max_position_embeddings")
    if context and longest > context:
        asked = f"--prompt {longest - response} with --response {response}"
        raise UserError(f"{asked} exceeds the model's {context} positions; lower it")
    if with_trl:
        require_trl()
    device = _device(device)
    grid = product(
        vocabs or ([model["vocab_size"]] if "vocab_size" in model else VOCABS),
        prompts or PROMPTS,
        negatives or NEGATIVES,
    )
    cells = tuple(SpeedCell(prompt, k, vocab, response) for vocab, prompt, k in dict.fromkeys(grid))
    settings = Settings(
        cells=cells,
        model=model,
        device=device,
        dtype="bfloat16" if device == "cuda" else "float32",
        threads=threads or torch.get_num_threads(),
        rounds=rounds,
        with_trl=with_trl,
        groups_per_row=groups_per_row,
        compiled=compiled,
    )
    try:
        shape_of(settings.spec(cells[0]).transformers_config, LORA_RANK)
    except ValueError as error:
        raise UserError(f"--model-config {model_config}: {error}; give a dense decoder such as a Llama") from None
    return settings


def settings_of(baseline: dict[str, Any], rounds: int | None, with_trl: bool) -> Settings:
    """The settings by which ``dmpo bench speed`` made ``baseline``, for a run to compare with it.

    Raises:
        UserError: it was made on a device that this machine lacks, or with trl, which is not installed.
    """
    cells = tuple(
        SpeedCell(cell["prompt"], cell["negatives"], cell["vocab"], cell["response"]) for cell in baseline["cells"]
    )
    with_trl = with_trl and baseline["with_trl"]
    if with_trl:
        require_trl()
    return Settings(
        cells=cells,
        model=baseline["model"],
        device=_device(baseline["device_type"]),
        dtype=baseline["dtype"],
        threads=baseline["threads"],
        rounds=rounds or baseline["rounds"],
        with_trl=with_trl,
        compiled=baseline.get("compiled", False),
    )


def check_outputs(*files: Path) -> None:
    """Raise UserError for a file that exists or could not be written; folders are made."""
    for file in files:
        if file.exists():
            raise UserError(f"{file} exists already and is kept; give another file or remove it")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{file.parent}: {error.strerror}; write to another folder") from None
        if not os.access(file.parent, os.W_OK):
            raise UserError(f"{file.parent} is not writable; write to another folder")


def _device(asked: str) -> str:
    if asked not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {asked} is not known; choose auto, cpu or cuda")
    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU; use --device cpu, or a baseline made on a CPU")
    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


def _read_model(path: Path) -> dict[str, Any]:
    """The content of a config.json."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--model-config {path}: cannot be read ({error}); give a model's config.json") from None
    if not isinstance(content, dict) or "model_type" not in content:
        raise UserError(f"--model-config {path}: names no model_type; give a transformers config.json")
    return content
