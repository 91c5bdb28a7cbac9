"""TRL's DPOTrainer as an implementation: K pairs a group, LoRA, adapters off as the reference, its fused head.

Trainer, collator, ``training_step`` and metrics are TRL's own, as its users have them; nothing is patched.
Tokenization, data loader, gradient clipping and logging around a step are left out, which is in TRL's favour.
"""

import tempfile
from collections.abc import Sequence
from copy import copy
from importlib.util import find_spec
from typing import Any, Self

import torch
from torch import Tensor

from dmpo_dist.bench.implementations import (
    END_TOKEN,
    MAX_TOKENS,
    PAD_TOKEN,
    ModelSpec,
    Tokens,
    fill_adapters,
    make_base,
    make_lora,
    make_optimizer,
)
from dmpo_dist.data.tokenization import TokenGroup
from dmpo_dist.errors import UserError


def require_trl() -> None:
    """Raise UserError where trl is not installed."""
    if find_spec("trl") is None:
        raise UserError(
            "trl is not installed; install it with: pip install 'dmpo_dist[bench]', "
            "or compare with our own separate rows alone: --without-trl"
        )


def head_everywhere(device: str) -> bool:
    """Whether TRL 1.16's fused head scores every position on ``device`` instead of the completion's alone."""
    from trl.trainer.utils import _use_triton  # what its forward asks; pinned in constraints.txt

    return not _use_triton(torch.device(device))


def pairs_of(group: TokenGroup) -> list[dict[str, list[int]]]:
    """The group as K rows of TRL's tokenized preference format."""
    chosen, *rejected = group.branches
    return [{"prompt_ids": group.prefix, "chosen_ids": chosen, "rejected_ids": ids} for ids in rejected]


class TrlImplementation:
    """DPOTrainer on batches of ``pairs_per_batch`` pairs; a step's groups take as many batches as they need."""

    name = "trl"

    def __init__(self, spec: ModelSpec, pairs_per_batch: int, groups_per_step: int = 1) -> None:
        self.groups_per_step, self.pairs_per_batch = groups_per_step, pairs_per_batch
        self._trainer = _make_trainer(spec)
        fill_adapters(self._trainer.model, spec)
        self._optimizer = make_optimizer(self._trainer.model)

    def with_batches(self, pairs_per_batch: int, groups_per_step: int) -> Self:
        """The same trainer with other batches and steps."""
        other = copy(self)
        other.pairs_per_batch, other.groups_per_step = pairs_per_batch, groups_per_step
        return other

    def batchings(self, group: TokenGroup, device: str) -> dict[str, Self]:
        """One pair at a time, all pairs of a group, and the pairs of two and of four groups."""
        pairs, tokens = self.pairs_per_batch, self.tokens(group).physical
        found = {f"{n} pairs": self.with_batches(n, 1) for n in sorted({1, pairs})}
        for count in (2, 4):
            if count * tokens <= MAX_TOKENS[device]:
                found[f"{count * pairs} pairs of {count} groups"] = self.with_batches(count * pairs, count)
        return found

    def step(self, groups: Sequence[TokenGroup]) -> None:
        pairs = [pair for group in groups for pair in pairs_of(group)]
        starts = range(0, len(pairs), self.pairs_per_batch)
        trainer = self._trainer
        trainer.current_gradient_accumulation_steps = len(starts)  # set by Trainer's own loop before each step
        for start in starts:
            batch = trainer.data_collator(pairs[start : start + self.pairs_per_batch])
            trainer.training_step(trainer.model, batch)
        self._optimizer.step()
        self._optimizer.zero_grad()

    @torch.no_grad()
    def log_probs(self, group: TokenGroup) -> Tensor:
        batch = self._trainer._prepare_inputs(self._trainer.data_collator(pairs_of(group)))
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        rows = self._trainer.model(**inputs, labels=labels, fused_lm_head=True).log_probs.sum(1).cpu()
        chosen, rejected = rows.chunk(2)
        return torch.cat([chosen[:1], rejected])

    def tokens(self, group: TokenGroup) -> Tokens:
        mask = self._trainer.data_collator(pairs_of(group))["attention_mask"]
        logical = len(group.branches) * len(group.prefix) + sum(len(branch) for branch in group.branches)
        return Tokens(logical, mask.numel(), int((mask == 0).sum()))


def _make_trainer(spec: ModelSpec) -> Any:
    """A DPOTrainer without everything that would cost time: checkpointing, dropout, truncation, reports."""
    from datasets import Dataset, disable_progress_bars
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    options = DPOConfig(
        output_dir=tempfile.gettempdir(),  # nothing is saved
        gradient_checkpointing=False,
        max_length=None,
        bf16=False,  # weights are in their final dtype: no autocast
        use_cpu=spec.device == "cpu",
        report_to="none",
        disable_tqdm=True,
        seed=spec.seed,
    )
    return DPOTrainer(
        model=make_base(spec),
        args=options,
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),  # asked for, not used
        processing_class=_tokenizer(),
        peft_config=make_lora(),
    )


def _tokenizer() -> Any:
    """A tokenizer that the trainer requires but does not use, as the groups are token ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": PAD_TOKEN, "<s>": 1, "</s>": END_TOKEN, "<unk>": 3}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)
