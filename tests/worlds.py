"""Prepared data and small models that many test files use: the same recipe everywhere, and one world made only once."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from dmpo_dist.config import DataConfig, ScratchModel, TemplateConfig
from dmpo_dist.data.prepare import prepare
from dmpo_dist.data.store import PreparedData
from dmpo_dist.modeling.backbone import make_scratch_model, write_stamp

SETTINGS = {
    "source": {"simulator": {"users": 80, "items": 40, "events_per_user": 12}},
    "negatives_per_group": 6,
    "train_requests_per_user": 1,
    "evaluation_negatives": 5,
}
CONTEXT = 256
SHAPE = ScratchModel(hidden_size=32, layers=2, heads=4, intermediate_size=48, vocab_size=400)


@dataclass(frozen=True)
class World:
    """``data`` (6 negatives to train on, 6 candidates to rank), ``model`` from scratch, and ``adapter`` on it.

    All tests of a session read this folder, so none may write to it: what changes is a copy.
    """

    folder: Path

    @cached_property
    def data(self) -> PreparedData:
        return PreparedData.load(self.folder / "data")

    @property
    def titles(self) -> list[str]:
        return self.data.items["title"].tolist()

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"


def make_world(folder: Path) -> World:
    data = prepared(folder / "data")
    make_scratch_model(folder / "model", SHAPE, data.items["title"].tolist(), CONTEXT, seed=0)
    save_adapter(folder / "model", folder / "adapter", scale=0.05)
    return World(folder)


def prepared(folder: Path, seed: int = 0, allow_leaks: bool = False, **changes: object) -> PreparedData:
    """Data prepared in ``folder`` with ``SETTINGS`` but for ``changes``."""
    settings = DataConfig.model_validate(SETTINGS | changes)
    return prepare(settings, seed, folder, echo=lambda _: None, allow_leaks=allow_leaks)


def save_adapter(base: Path, folder: Path, scale: float) -> None:
    """Write a LoRA of rank 4 on the model in ``base``, with normal weights of ``scale`` in B: it has an effect."""
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)
    model.save_pretrained(folder)
    for file in base.glob("token*"):
        shutil.copy(file, folder)


def make_three_models(folder: Path, titles: Sequence[str]) -> None:
    """``base``, ``other`` of the same tokenizer, and ``adapter`` on base, which says that training began at other."""
    scratch = ScratchModel(hidden_size=16, layers=2, heads=2, intermediate_size=24, vocab_size=300)
    for seed, name in enumerate(("base", "other")):
        make_scratch_model(folder / name, scratch, list(titles), 128, seed)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, lora).save_pretrained(folder / "adapter")
    write_stamp(folder / "adapter", TemplateConfig(), stage="train", start=str(folder / "other"))
