"""A history becomes a prompt, a title becomes a response."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from typing import Any

from dmpo_dist.config import TemplateConfig
from dmpo_dist.config.model import CANDIDATES, PLACEHOLDER
from dmpo_dist.data.chat import ChatParts, Trim, before_answer, render_chat, take_apart, trim
from dmpo_dist.errors import UserError

RENDERED = ("opening", "closing", "lead", "terminator", "user_trim", "answer_trim")


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt.

    Attributes:
        text: the prompt, from the begin token to the place where the response starts.
        titles: character spans (start, end) of each history title with its terminator, where items end with one.
        templated: a finished prompt that came with begin token or chat template, and was not wrapped again.
    """

    text: str
    titles: tuple[tuple[int, int], ...]
    templated: bool = False


@dataclass(frozen=True)
class Template:
    """Finished texts around histories and titles; placeholders of {title}, fields of items and users, and ``request``'s
    {candidates} are left.

    Attributes:
        opening, closing: the begin token, or what a chat template puts around a user's text.
        preamble, item, request, response: see ``TemplateConfig``; ``item`` has its {end} filled in.
        terminator: ends every response.
        item_ends: history items end exactly like a response, so that a loss on them trains the same thing.
        candidate: one title of the list in the prompt; None where prompts list none.
        lead: spaces that a chat template puts before an answer.
        user_trim, answer_trim: the sides on which a chat template strips white space from a user's text and an answer.
        begin: the tokenizer's begin token, "" where it has none.
        special: its special tokens, one of which begins a text from a chat template.
        day: the date that the chat template prints, YYYY-MM-DD; "" where no chat template is used.
    """

    opening: str
    preamble: str
    item: str
    request: str
    closing: str
    response: str
    terminator: str
    item_ends: bool
    candidate: str | None = None
    lead: str = ""
    user_trim: Trim = "none"
    answer_trim: Trim = "none"
    begin: str = ""
    special: tuple[str, ...] = ()
    day: str = ""

    @property
    def lists_candidates(self) -> bool:
        """Whether prompts list the candidates."""
        return self.candidate is not None

    def render(
        self,
        history: tuple[str, ...],
        listed: Sequence[str] = (),
        items: Mapping[str, Mapping[str, str]] | None = None,
        user: Mapping[str, str] | None = None,
    ) -> Prompt:
        """The prompt for ``history`` (titles, oldest first), with the titles ``listed`` where it lists candidates.

        Args:
            items: title -> field -> text; user: field -> text. What is missing there is left empty.
        """
        items, user = items or {}, dict(user or {})
        text, spans = _filled(self.preamble, user), []
        before, after = self.item.split("{title}", 1)
        for title in history:
            fields = {**items.get(title, {}), "title": title}
            text += _filled(before, fields)
            start = len(text)
            text += title + _filled(after, fields)
            spans.append((start, len(text)))
        if self.candidate is not None:
            lines = (_filled(self.candidate, {**items.get(t, {}), "title": t}) for t in listed)
            user |= {"candidates": "".join(lines)}
        request = _filled(self.request, user)
        prompt = self.wrap(text + request)
        return Prompt(prompt.text, self._moved(spans, text + request) if self.item_ends else ())

    def wrap(self, prompt: str) -> Prompt:
        """A finished prompt (TRL rows) between the begin token or the chat template's parts.

        One that begins with a special token, or as the chat template does, has them already; it gets the begin token
        where only that is missing.
        """
        opening = self.opening.removeprefix(self.begin)
        if prompt.startswith((*self.special, opening) if opening.strip() else self.special):
            missing = self.opening.startswith(self.begin) and not prompt.startswith(self.begin)
            return Prompt(self.begin * missing + prompt, (), templated=True)
        return Prompt(self.opening + trim(prompt, self.user_trim) + self.closing, ())

    def converse(self, turns: list[dict[str, str]], tokenizer: Any) -> Prompt:
        """The prompt after the messages ``turns`` by the chat template of ``tokenizer``.

        Raises:
            UserError: no chat template is used, or it does not treat these messages like a single question.
        """
        if not self.day:
            raise UserError(
                f"a row's prompt has {len(turns)} messages, which only a chat template can put together: use a model "
                "with one and template.chat=auto, or write the prompts as text"
            )
        parts = ChatParts(self.opening, self.user_trim, self.closing, self.lead, self.answer_trim, self.terminator)
        return Prompt(before_answer(tokenizer, turns, date.fromisoformat(self.day), parts), ())

    def _moved(self, spans: Sequence[tuple[int, int]], user: str) -> tuple[tuple[int, int], ...]:
        """``spans`` of a user's text where they are once it is wrapped, which may strip white space."""
        kept = len(trim(user, self.user_trim))
        cut = len(user) - len(user.lstrip()) if self.user_trim in ("left", "both") else 0
        first = len(self.opening)
        return tuple((first + max(start - cut, 0), first + min(end - cut, kept)) for start, end in spans)

    def render_response(self, title: str) -> str:
        """The response text of ``title`` with its terminator."""
        return self.lead + trim(self.response.replace("{title}", title), self.answer_trim) + self.terminator

    def complete(self, response: str, templated: bool) -> str:
        """A finished response (TRL rows) with what it lacks of its terminator and of the space before it.

        Args:
            templated: whether the prompt came with begin token or chat template, and the response may have them too.
        """
        text, ends = response, [end for end in (self.terminator, self.terminator.strip()) if end]
        for whole in (response, response.rstrip("\n")):
            end = next((end for end in ends if whole.endswith(end)), None)
            if end is not None:
                text = whole.removesuffix(end)
                break
        return self.render_response(text.removeprefix(self.lead) if templated else text)

    @property
    def tail(self) -> str:
        """The end of every prompt with a history or a list of candidates; what comes before it varies."""
        if self.candidate is not None:
            varying = _behind_last(self.candidate) + self.request.split(CANDIDATES)[1]
        else:
            varying = _behind_last(self.item) + self.request
        varying = _behind_last(varying)  # a request may end in a field of the user
        right: Trim = "right" if self.user_trim in ("right", "both") else "none"
        return trim(varying, right) + self.closing

    def to_dict(self) -> dict[str, Any]:
        """All parts by name; ``Template(**parts)`` is the template again."""
        return asdict(self)

    def rendered(self) -> dict[str, str]:
        """What tokenizer and chat template brought, for ``dmpo.json`` beside a model and the key of a cache."""
        return {name: getattr(self, name) for name in RENDERED}


def _filled(text: str, fields: Mapping[str, str]) -> str:
    """``text`` with its placeholders filled in at once, so that one in a title stays what it is."""
    return PLACEHOLDER.sub(lambda match: fields.get(match[1], ""), text) if "{" in text else text


def _behind_last(text: str) -> str:
    """What follows the last placeholder of ``text``."""
    return PLACEHOLDER.split(text)[-1]


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The texts of the tokenizer's special tokens but those that are white space."""
    added = [token.content for token in getattr(tokenizer, "added_tokens_decoder", {}).values() if token.special]
    named = getattr(tokenizer, "all_special_tokens", [tokenizer.bos_token, tokenizer.eos_token])
    return tuple(token for token in dict.fromkeys([*named, *added]) if token and token.strip())


def make_template(config: TemplateConfig, tokenizer: Any) -> Template:
    """Fill in the tokenizer's begin and end tokens or its chat template.

    Raises:
        UserError: the terminator needs an end token and the tokenizer has none, or a chat template is asked for that
            does not exist or cannot be kept to, see ``take_apart``.
    """
    use_chat = config.chat == "always" or (config.chat == "auto" and bool(getattr(tokenizer, "chat_template", None)))
    terminator = config.terminator
    if "{eos}" in terminator and not use_chat:
        if not tokenizer.eos_token:
            raise UserError(
                "template.terminator is {eos}, but the tokenizer has no end token; set one in the tokenizer, "
                'or set template.terminator to a text, such as "\\n" in a YAML file'
            )
        terminator = terminator.replace("{eos}", tokenizer.eos_token)
    lead, user_trim, answer_trim = "", "none", "none"
    if use_chat:
        chat = take_apart(tokenizer, date.fromisoformat(config.date))
        opening, closing, terminator = chat.opening, chat.closing, chat.terminator
        lead, user_trim, answer_trim = chat.lead, chat.user_trim, chat.answer_trim
    else:
        opening, closing = tokenizer.bos_token or "", ""
    if not terminator:
        raise UserError("template.terminator is empty: a response needs an end, or its length cannot be learned")
    prefix, suffix = config.response.split("{title}", 1)
    template = Template(
        opening=opening,
        preamble=config.preamble if use_chat else config.preamble.removeprefix(opening),
        item=config.item.replace("{end}", terminator),
        request=config.request,
        closing=closing,
        response=config.response,
        terminator=terminator,
        item_ends=not prefix and config.item.endswith("{title}" + suffix + "{end}"),
        candidate=config.candidate if config.lists_candidates else None,
        begin=tokenizer.bos_token or "",
        special=special_tokens(tokenizer),
        lead=lead,
        user_trim=user_trim,
        answer_trim=answer_trim,
        day=config.date if use_chat else "",
    )
    if use_chat:
        _require_same_chat(template, tokenizer, config)
    return template


def _require_same_chat(template: Template, tokenizer: Any, config: TemplateConfig) -> None:
    """Raise UserError where ``template`` makes of a real history and title another text than the chat template does."""
    bare = replace(template, opening="", closing="", user_trim="none")
    user, answer = bare.render(("Heat (1995)",), ("Alien", "Up")).text, config.response.replace("{title}", "Alien")
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    theirs = render_chat(tokenizer, turns, date.fromisoformat(config.date))
    own = template.wrap(user).text + template.render_response("Alien")
    if theirs.rstrip("\n") != own.rstrip("\n"):
        raise UserError(
            f"the tokenizer's chat template changes a message's text: for this template's prompt and response it "
            f"renders {theirs!r} instead of {own!r}; set template.chat=never, or change template.preamble, "
            "template.request or template.response to a text that it keeps"
        )
