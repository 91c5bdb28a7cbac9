"""A conversation as a prompt: stored as one text until a model's chat template is known."""

import json

MARK = "\x1e"  # the record separator that begins a JSON text in RFC 7464; no prompt of words begins with it


def text_of(messages: list[dict[str, str]]) -> str:
    """``messages`` (role and content) as the prompt of a row."""
    return MARK + json.dumps(messages, ensure_ascii=False)


def messages_of(prompt: str) -> list[dict[str, str]] | None:
    """The messages that ``text_of`` made ``prompt`` of; None for a prompt that is text."""
    return json.loads(prompt.removeprefix(MARK)) if prompt.startswith(MARK) else None
