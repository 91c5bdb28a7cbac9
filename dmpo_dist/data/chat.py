"""A tokenizer's chat template taken apart: what it puts around a user's text and around the answer."""

from dataclasses import dataclass
from datetime import date, datetime
from typing import Any, Literal

from dmpo_dist.errors import UserError
from dmpo_dist.parsing import first_line

Trim = Literal["none", "left", "right", "both"]

_PAD = " \t "  # no template ends its own text like this, so it tells whether a message's white space is kept
_USER, _ANSWER = "liked \u241e Heat (1995)", "Alien \u241f (1979)"
_NO_THINKING = {"enable_thinking": False, "thinking": False}
_DIRECTIVES = ("-d", "-e", "-H", "-I", "-j", "-m", "-M", "-S", *"aAbBcdDeFGHIjmMpRSTuUVwWxXyYZ")


@dataclass(frozen=True)
class ChatParts:
    """A conversation of one question is ``opening + user + closing``, its answer ``lead + answer + terminator``.

    Attributes:
        lead: spaces between the generation prompt and an answer.
        user_trim, answer_trim: the sides on which the template strips white space from a message.
    """

    opening: str
    user_trim: Trim
    closing: str
    lead: str
    answer_trim: Trim
    terminator: str


def trim(text: str, sides: Trim) -> str:
    """``text`` without white space on ``sides``."""
    text = text.lstrip() if sides in ("left", "both") else text
    return text.rstrip() if sides in ("right", "both") else text


def take_apart(tokenizer: Any, day: date) -> ChatParts:
    """The parts of the tokenizer's chat template, which prints ``day`` where it prints the date.

    A prompt ends where the answer of a finished conversation begins. The generation prompt must be a beginning of
    that: a header that it leaves out and an empty thought or a channel before the answer are added. Where it opens a
    thought that finished conversations lack, it is asked for without thinking.

    Raises:
        UserError: the template cannot be rendered, does not keep a message's text, renders something else each time,
            or has a generation prompt that no finished conversation begins with.
    """
    turns = [{"role": "user", "content": _padded(_USER)}, {"role": "assistant", "content": _padded(_ANSWER)}]
    renderings = []
    for options in ({}, _NO_THINKING):
        finished = render_chat(tokenizer, turns, day, options=options)
        asked = render_chat(tokenizer, turns[:1], day, generation=True, options=options)
        renderings.append((asked, finished, _parts(finished)))
    if render_chat(tokenizer, turns, day) != renderings[0][1]:
        raise UserError("the tokenizer's chat template renders something else each time; set template.chat=never")
    for agree in (str.__eq__, str.startswith):
        for asked, _, parts in renderings:
            before_answer = parts.opening + _kept(_USER, parts.user_trim) + parts.closing
            if agree(before_answer, asked):
                return _with_lead(parts, before_answer[len(asked) :])
    asked, finished, _ = renderings[0]
    raise UserError(
        f"the tokenizer's chat template has a generation prompt, {asked!r}, that its finished conversation, "
        f"{finished!r}, does not begin with, so a model would be asked otherwise than it was trained; set "
        "template.chat=never, or edit the tokenizer's chat_template so that the two agree"
    )


def before_answer(tokenizer: Any, turns: list[dict[str, str]], day: date, expected: ChatParts) -> str:
    """The prompt that asks for the answer to ``turns``, by the rules of ``take_apart``; ``turns`` end with the user's.

    Args:
        expected: the parts of a conversation of one question, whose ``lead``, ``answer_trim`` and ``terminator`` must
            be those of this one too.

    Raises:
        UserError: the template cannot be rendered, leaves out a message, or puts something else around the answer.
    """
    renderings = []
    for options in ({}, _NO_THINKING):
        answered = [*turns, {"role": "assistant", "content": _padded(_ANSWER)}]
        finished = render_chat(tokenizer, answered, day, options=options)
        asked = render_chat(tokenizer, turns, day, generation=True, options=options)
        renderings.append((asked, *_split(finished, _ANSWER)))
    ends = expected.lead, expected.answer_trim, expected.terminator
    for agree in (str.__eq__, str.startswith):
        for asked, before, answer_trim, after in renderings:
            lead = _spaces_at_the_end(before[len(asked) :])
            if agree(before, asked) and (lead, answer_trim, after.rstrip("\n")) == ends:
                _require_all(turns, before)
                return before.removesuffix(lead)
    asked, before, _, after = renderings[0]
    raise UserError(
        f"the tokenizer's chat template ends a conversation of {len(turns)} messages in another way than one of a "
        f"single question: it asks with {asked!r}, and puts {before!r} and {after!r} around an answer; write the "
        "prompts of these rows as text, or leave them out"
    )


def _require_all(turns: list[dict[str, str]], prompt: str) -> None:
    """Raise UserError where ``prompt`` lacks the text of one of ``turns``."""
    for turn in turns:
        if turn["content"].strip() not in prompt:
            raise UserError(
                f"the tokenizer's chat template leaves out or changes a message of {turn['role']}, "
                f"{turn['content']!r}; write the prompts of these rows as text, or leave the message out"
            )


def render_chat(
    tokenizer: Any, turns: list[dict[str, str]], day: date, generation: bool = False,
    options: dict[str, Any] | None = None,
) -> str:  # fmt: skip
    """What the chat template makes of ``turns``; the date it prints is ``day``.

    Raises:
        UserError: there is no template or no default one, or it raises an error.
    """
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        names = ", ".join(sorted(template))
        template = template.get("default")
        if template is None:
            raise UserError(
                f"the tokenizer has several chat templates ({names}) and no default; set template.chat=never, or save "
                "the tokenizer with the one to use as its chat_template"
            )
    if not template:
        raise UserError("template.chat is always, but the tokenizer has no chat template; set template.chat to never")
    if "strftime_now" in template:
        template = _date_macro(day) + template
    try:
        return tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=generation, **(options or {})
        )
    except Exception as error:  # a template is a program, and can fail in any way
        raise UserError(
            f"the tokenizer's chat template cannot render a user's message and an answer ({first_line(error)}); "
            "set template.chat=never, or give the tokenizer a chat_template that can"
        ) from None


def _date_macro(day: date) -> str:
    """Jinja text that hides transformers' clock from a template behind one that stands at ``day``, 00:00."""
    moment = datetime(day.year, day.month, day.day)
    filters = "".join(f" | replace('%{d}', {moment.strftime('%' + d)!r})" for d in _DIRECTIVES)
    return "{%- macro strftime_now(format) -%}{{- format" + filters + " -}}{%- endmacro +%}"


def _padded(core: str) -> str:
    return _PAD + core + _PAD


def _kept(core: str, sides: Trim) -> str:
    return trim(_padded(core), sides)


def _parts(finished: str) -> ChatParts:
    """The parts of a rendered conversation, with all between the user's text and the answer as ``closing``."""
    opening, user_trim, rest = _split(finished, _USER)
    closing, answer_trim, after = _split(rest, _ANSWER)
    return ChatParts(opening, user_trim, closing, "", answer_trim, after.rstrip("\n"))


def _split(text: str, core: str) -> tuple[str, Trim, str]:
    """What stands before a padded message, on which sides its padding is gone, and what stands after it."""
    if text.count(core) != 1:
        raise UserError("the tokenizer's chat template does not keep a message's text; set template.chat to never")
    before, after = text.split(core)
    left, right = not before.endswith(_PAD), not after.startswith(_PAD)
    sides: dict[tuple[bool, bool], Trim] = {
        (False, False): "none", (True, False): "left", (False, True): "right", (True, True): "both"
    }  # fmt: skip
    return before.removesuffix(_PAD), sides[left, right], after.removeprefix(_PAD)


def _spaces_at_the_end(text: str) -> str:
    return text[len(text.rstrip(" ")) :]


def _with_lead(parts: ChatParts, added: str) -> ChatParts:
    """``parts`` with the last spaces of what the generation prompt lacks, ``added``, counted to the answer."""
    lead = _spaces_at_the_end(added)
    closing = parts.closing[: len(parts.closing) - len(lead)]
    return ChatParts(parts.opening, parts.user_trim, closing, lead, parts.answer_trim, parts.terminator)
