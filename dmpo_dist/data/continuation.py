"""A response tokenized behind its prompt, such that its ids are its own."""

from typing import Any, NamedTuple

from tokenizers import Encoding

from dmpo_dist.data.template import Template
from dmpo_dist.errors import UserError

APART = ("\n", "\u241e", ".", "0")
"""Texts behind which a response is tokenized that merges with the end of its prompt, the first that it leaves alone."""


class Continuation(NamedTuple):
    """A response behind a prompt: its ids, and the characters of the response that each of them covers."""

    ids: list[int]
    spans: list[tuple[int, int]]


def encode(tokenizer: Any, text: str) -> Encoding:
    """``text`` in ids, by the Rust tokenizer itself: the wrapper around it costs several times a short text's time."""
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)


def continuation(tokenizer: Any, prompt: str, prompt_ids: list[int], response: str) -> Continuation:
    """``response`` tokenized behind ``prompt``, whose ids stay as they are.

    Prompt and response are tokenized together where the ids of the prompt come out of that; else the response is
    tokenized behind another text.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        prompt: without spaces at its end.
        prompt_ids: its ids.
        response: with its terminator, after the spaces that the prompt ended in.

    Raises:
        UserError: the tokenizer merges the beginning of ``response`` with whatever stands before it.
    """
    found = _behind(tokenizer, prompt, prompt_ids, response)
    if found is not None:
        return found
    for before in APART:
        before_ids = encode(tokenizer, before).ids
        found = _behind(tokenizer, before, before_ids, response) if before_ids else None
        if found is not None:
            return found
    if not _begins_texts_with_more(tokenizer):
        alone = encode(tokenizer, response)
        return Continuation(alone.ids, alone.offsets)
    raise UserError(
        f"the tokenizer merges the response {response!r} with the end of its prompt, however that ends; let "
        "template.response begin with another character"
    )


def require_end(tokenizer: Any, template: Template) -> None:
    """Raise UserError where the terminator leaves no ids, or unknown ones, at the end of a response."""
    terminator, unknown = template.terminator, tokenizer.unk_token_id
    for title in ("Heat", "Alien 3", "(1979)"):
        response = template.render_response(title)
        ids, bare = (encode(tokenizer, text).ids for text in (response, response.removesuffix(terminator)))
        if ids == bare or (unknown is not None and unknown in ids and unknown not in bare):
            raise UserError(
                f"the tokenizer drops the terminator {terminator!r} or does not know it, so responses would have no "
                "end; set template.terminator to {eos} or to a text that the tokenizer keeps"
            )


def _behind(tokenizer: Any, before: str, before_ids: list[int], response: str) -> Continuation | None:
    """``response`` in the ids of ``before + response``; None where these do not begin with ``before_ids``."""
    whole, first, start = encode(tokenizer, before + response), len(before_ids), len(before)
    if whole.ids[:first] != before_ids:
        return None
    # the id of unknown characters is the same if it takes in more of them
    if first and before_ids[-1] == tokenizer.unk_token_id and whole.offsets[first - 1][1] > start:
        return None
    return Continuation(whole.ids[first:], [(begin - start, end - start) for begin, end in whole.offsets[first:]])


def _begins_texts_with_more(tokenizer: Any) -> bool:
    """Whether the tokenizer puts something, such as a space, before a text."""
    backend = tokenizer.backend_tokenizer
    text = "a" if backend.normalizer is None else backend.normalizer.normalize_str("a")
    if backend.pre_tokenizer is not None:
        text = "".join(piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text))
    return len(text) > 1
