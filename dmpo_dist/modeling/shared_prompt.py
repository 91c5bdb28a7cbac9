"""Log-probs of many responses behind shared prompts, on any Hugging Face causal LM: for training loops of one's own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dmpo_dist.batching.layout import lay_out
from dmpo_dist.data.schema import PreferenceGroup
from dmpo_dist.data.template import Template
from dmpo_dist.data.tokenization import GroupTokenizer, TokenGroup
from dmpo_dist.modeling.logprobs import LogProbModel, unwrap_peft
from dmpo_dist.modeling.routing import take_route


def shared_prompt_log_probs(
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    responses: Sequence[Sequence[str]],
    *,
    end: str | None = None,
    attention: str = "auto",
) -> list[Tensor]:
    """Summed log-probs of several responses to each prompt, where each prompt runs through the model once.

    Differentiable in the weights of ``model``. All prompts and responses are packed into one row without padding, so a
    call costs the tokens of every prompt once plus those of its responses. Prompt and response are tokenized together,
    so that merges over their boundary come out as in an ordinary text. The model keeps an attention implementation that
    computes calls without a layout (``generate``, ordinary rows) as before.

    Args:
        model: a transformers causal LM, or a PEFT model around one, on any device; its dropout must be 0.
        tokenizer: its fast tokenizer.
        prompts: G texts. A begin token that the tokenizer has is put before each that does not start with it.
        responses: for each prompt its texts, as many as it likes; each is followed by ``end``.
        end: what ends a response and is scored with it; None is the tokenizer's end token.
        attention: "auto", or a backend by name as in ``model.attention`` of a configuration.

    Returns:
        For each prompt a tensor (number of its responses,) in fp32 or wider.

    Raises:
        UserError: a prompt with its longest response exceeds the model's context, or the model has a head, an attention
            or an adapter that cannot be computed exactly.
        ValueError: no prompts, a prompt without responses, a single text in place of a list, or as many lists of
            responses as prompts are not given; or the tokenizer has no end token and ``end`` is not given.

    Example:
        >>> policy = shared_prompt_log_probs(model, tokenizer, ["Liked: Alien\\nNext:"], [[" Dune", " Cars"]])
        >>> loss = softplus(policy[0][1] - policy[0][0])  # a reference-free pair
        >>> loss.backward()
    """
    single = next((text for text in (prompts, *responses) if isinstance(text, str)), None)
    if single is not None:  # to Python a text is a list of letters, each of which would be scored
        raise ValueError(f"{single!r}: give prompts as a list, and for each of them a list of responses")
    if not prompts or len(prompts) != len(responses) or not all(responses):
        raise ValueError(
            f"{len(prompts)} prompts and {len(responses)} lists of responses: give one non-empty list for each prompt"
        )
    language_model = unwrap_peft(model)
    context = getattr(language_model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    groups = _tokenized(tokenizer, prompts, responses, end, context)
    longest = max(len(group.prefix) + max(map(len, group.branches)) for group in groups)
    device = next(model.parameters()).device
    route = take_route(language_model, device.type, longest, attention)
    log_probs = LogProbModel(model)(lay_out(groups, shared=route.backend != "unshared").to(device))
    return list(log_probs.split([len(group.branches) for group in groups]))


def _tokenized(
    tokenizer: Any, prompts: Sequence[str], responses: Sequence[Sequence[str]], end: str | None, context: int
) -> list[TokenGroup]:
    """Each prompt with its responses as token ids, by the tokenization that training uses."""
    begin = tokenizer.bos_token or ""
    terminator = tokenizer.eos_token if end is None else end
    if not terminator:
        raise ValueError("the tokenizer has no end token, and a response without an end has no length: give end=...")
    groups = []
    for prompt, texts in zip(prompts, responses, strict=True):
        opening = "" if prompt.startswith(begin) else begin  # a text from a chat template brings its own
        template = Template(opening, "", "{title}", "", "", "{title}", terminator, item_ends=False)
        first, *rest = texts
        groups.append(
            GroupTokenizer(tokenizer, template, context)(PreferenceGroup("", 0, (), first, tuple(rest), prompt))
        )
    return groups
