"""Titles as a model would write them by itself: free text, which may be no title."""

from collections.abc import Sequence
from typing import Any

import torch

from dmpo_dist.data.template import Template


def greedy_config(tokenizer: Any, template: Template) -> Any:
    """A generation configuration that decodes greedily and ends where a response ends."""
    from transformers import GenerationConfig

    end = tokenizer.backend_tokenizer.encode(template.terminator, add_special_tokens=False).ids
    eos = end[0] if len(end) == 1 else tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos
    return GenerationConfig(do_sample=False, bos_token_id=tokenizer.bos_token_id, eos_token_id=eos, pad_token_id=pad)


@torch.no_grad()
def generate_freely(
    model: Any, tokenizer: Any, template: Template, prompts: Sequence[str], max_new_tokens: int, batch_size: int = 16
) -> list[str]:
    """What ``model`` writes greedily after each prompt, up to the end of a response.

    transformers fills what a generation configuration leaves open from the model's own (sampling, temperature,
    penalties, suppressed tokens); so the model's own is put aside meanwhile.

    Args:
        model: a transformers causal LM or a PEFT model around one, with the attention of ordinary rows
            (``use_backend(model, "unshared")``).
        tokenizer: of the model.
        template: says what ends a response.
        prompts: rendered prompts.
        max_new_tokens: a response that does not end is cut there.
        batch_size: prompts at a time.
    """
    config = greedy_config(tokenizer, template)
    config.max_new_tokens = max_new_tokens
    stops = [] if template.terminator in tokenizer.all_special_tokens else [template.terminator]
    options = {"stop_strings": stops, "tokenizer": tokenizer} if stops else {}
    own, model.generation_config = model.generation_config, config
    try:
        texts: list[str] = []
        for start in range(0, len(prompts), batch_size):
            rows = [
                tokenizer.backend_tokenizer.encode(prompt, add_special_tokens=False).ids
                for prompt in prompts[start : start + batch_size]
            ]
            width = max(map(len, rows))
            ids = torch.tensor([[config.pad_token_id or 0] * (width - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
            out = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=config,
                **options,
            )
            texts += [
                _written(tokenizer, template, row, new.tolist()) for row, new in zip(rows, out[:, width:], strict=True)
            ]
        return texts
    finally:
        model.generation_config = own


def valid_ratio(generated: Sequence[str], responses: Sequence[str], terminator: str) -> float:
    """The share of ``generated`` that is letter by letter one of ``responses`` without its ``terminator``."""
    wanted = {response.removesuffix(terminator) for response in responses}
    return sum(text in wanted for text in generated) / len(generated)


def _written(tokenizer: Any, template: Template, prompt: list[int], new: list[int]) -> str:
    """The text of ``new`` without its end; decoded with ``prompt``, as a decoder may drop a leading space."""
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    before, whole = tokenizer.decode(prompt, **options), tokenizer.decode(prompt + new, **options)
    return whole[len(before) :].split(template.terminator, 1)[0]
