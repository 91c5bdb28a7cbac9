"""CPU configurations that ``dmpo plan --verify`` predicts and measures: random models, each in processes of its own."""

from dataclasses import dataclass
from typing import Any

from dmpo_dist.config import LoraConfig, RunConfig
from dmpo_dist.planning.model import Row

MICRO_BATCHES = 2
"""Micro-batches of a rank in a step: with two, the gradients of the first are in memory while the second runs."""


@dataclass(frozen=True)
class Case:
    """One configuration.

    Attributes:
        name: its name in the table.
        deepspeed: name of a DeepSpeed configuration.
        ranks: number of processes.
        lora: rank of the adapters, 0 for full fine-tuning.
        checkpointing: whether activations are recomputed in the backward pass.
        hidden, layers, heads, kv_heads, intermediate, vocab: sizes of a random Llama.
        prompt, response, negatives: tokens of the prompt and of a response, and K, of every group.
        budget: most tokens in a row.
        dtype: of weights and arithmetic.
    """

    name: str
    deepspeed: str
    ranks: int = 1
    lora: int = 0
    checkpointing: bool = False
    hidden: int = 512
    layers: int = 8
    heads: int = 8
    kv_heads: int = 4
    intermediate: int = 1408
    vocab: int = 16000
    prompt: int = 128
    response: int = 9
    negatives: int = 7
    budget: int = 1024
    dtype: str = "float32"

    @property
    def row(self) -> Row:
        """A row of as many groups as fit into the budget; all groups have the same length."""
        group = Row(self.prompt, self.response, self.negatives, 0, shared=True)
        tokens = self.budget // group.group_tokens * group.group_tokens
        return Row(self.prompt, self.response, self.negatives, tokens, shared=True)

    @property
    def global_batch_size(self) -> int:
        return self.row.groups * MICRO_BATCHES * self.ranks

    @property
    def transformers_config(self) -> dict[str, Any]:
        """The content of a config.json."""
        return {
            "model_type": "llama", "hidden_size": self.hidden, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.intermediate, "vocab_size": self.vocab, "max_position_embeddings": 2048,
            "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        }  # fmt: skip

    def run_config(self, model: str) -> RunConfig:
        """The configuration of a run that trains the model in the folder ``model``."""
        return RunConfig.model_validate(
            {
                "model": {
                    "path": model,
                    "dtype": self.dtype,
                    "lora": LoraConfig(r=self.lora).model_dump() if self.lora else None,
                    "gradient_checkpointing": self.checkpointing,
                    "max_length": self.prompt + self.response,
                },
                "train": {
                    "negatives": self.negatives,
                    "token_budget": self.budget,
                    "global_batch_size": self.global_batch_size,
                    "steps": 100,
                },
                "deepspeed": self.deepspeed,
                "cluster": {"workers": self.ranks},
            }
        )


CASES = (
    Case("zero0, full", "zero0", layers=4, vocab=8000, budget=512),
    Case("zero1, full, 2 ranks", "zero1", ranks=2, budget=512),
    Case("zero2, full, large vocabulary", "zero2", layers=4, vocab=32000, budget=1536),
    Case("zero2, full, checkpointing, 2 ranks", "zero2", ranks=2, checkpointing=True, vocab=32000, budget=1024),
    Case("zero3, full, 2 ranks", "zero3", ranks=2, layers=6, vocab=16000, budget=1024),
    Case("zero2, LoRA", "zero2", lora=16, budget=1536, negatives=3),
    Case("zero2, LoRA, checkpointing", "zero2", lora=16, checkpointing=True, vocab=32000, budget=2048),
    Case("zero3, LoRA, 2 ranks", "zero3", ranks=2, lora=16, layers=6, budget=1024, prompt=256, negatives=15),
)
SMALL = Case(
    "warm-up", "zero0", hidden=64, layers=2, heads=2, kv_heads=1, intermediate=128, vocab=256, prompt=16, budget=256
)
"""A model so small that after training it a process holds little more than the libraries."""
