"""TRL's conversational rows, whose prompt and responses are lists of messages."""

from typing import Any

from dmpo_dist.data.messages import text_of
from dmpo_dist.data.sources.rowfiles import shorten
from dmpo_dist.errors import UserError

ADVICE = (
    "write the conversation as text with tokenizer.apply_chat_template(messages, tokenize=False, "
    "add_generation_prompt=True), which is not wrapped again, and the responses as strings"
)


def is_conversation(value: Any) -> bool:
    """Whether ``value`` is a list of messages (role and content)."""
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def as_text(row: dict[str, Any], where: str) -> dict[str, Any]:
    """``row`` with the texts of its messages: the user's as prompt, the assistant's as responses.

    A prompt of several messages becomes a text that only a model's chat template can render, see ``data.messages``.
    ``rejected`` may be one conversation or a list of them. Where ``prompt`` is missing, the responses begin with it, as
    TRL allows.

    Raises:
        UserError: messages in an order that no conversation has, a response of several, or one without role or text.
    """
    if not any(map(is_conversation, (row.get("prompt"), row["chosen"], row["rejected"]))):
        return row
    sides = row["rejected"] if isinstance(row["rejected"], list) else [row["rejected"]]
    if is_conversation(row["rejected"]):
        sides = [row["rejected"]]
    prompt, responses = row.get("prompt"), [row["chosen"], *sides]
    if prompt is None:
        prompt = row["chosen"][:-1]
        responses = [_behind(prompt, side, where) for side in responses]
    return row | {
        "prompt": prompt_text(prompt, where),
        "chosen": only_message(responses[0], "assistant", "chosen", where),
        "rejected": [only_message(side, "assistant", "rejected", where) for side in responses[1:]],
    }


def prompt_text(value: Any, where: str) -> Any:
    """The text of a single question, or the messages that lead to one as ``text_of`` writes them."""
    if not is_conversation(value) or len(value) == 1:
        return only_message(value, "user", "prompt", where)
    roles = [message.get("role") for message in value]
    spoken = roles[1:] if roles[0] == "system" else roles
    if spoken != ["user", "assistant"] * (len(spoken) // 2) + ["user"]:
        raise UserError(
            f"{where}: 'prompt' has messages of {', '.join(map(str, roles))}; what can be read is one of system if "
            f"any, then user and assistant in turn, and user last. Otherwise {ADVICE}"
        )
    return text_of([{"role": str(message["role"]), "content": _content(message, "prompt", where)} for message in value])


def _behind(prompt: list[Any], side: Any, where: str) -> Any:
    """The answer of a conversation that begins with ``prompt``."""
    if not is_conversation(side) or side[:-1] != prompt:
        raise UserError(
            f"{where}: there is no 'prompt', and 'chosen' and 'rejected' do not begin with the same messages; write "
            "the prompt apart from the responses"
        )
    return side[-1:]


def only_message(value: Any, role: str, key: str, where: str) -> Any:
    """The text of a conversation that is one message of ``role``; what is no conversation stays as it is."""
    if not is_conversation(value):
        return value
    roles = [message.get("role") for message in value]
    if roles != [role]:
        raise UserError(
            f"{where}: {key!r} has messages of {', '.join(map(str, roles))}; one of {role} can be read: {ADVICE}"
        )
    return _content(value[0], key, where)


def _content(message: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(message.get("content"), str):
        raise UserError(f"{where}: the content of {key!r} is {shorten(message.get('content'))}; it must be a string")
    return message["content"]
