"""A history becomes a prompt, a title becomes a response."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dmpo_dist.config import TemplateConfig
from dmpo_dist.config.model import CANDIDATES
from dmpo_dist.errors import UserError

_MARK = "\u241e"  # stands for the conversation's texts while a chat template is taken apart


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt.

    Attributes:
        text: the prompt, from the begin token to the place where the response starts.
        titles: character spans (start, end) of each history title with its terminator, where items end with one.
    """

    text: str
    titles: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Template:
    """Finished texts around histories and titles: no placeholder but {title} and ``request``'s {candidates} is left.

    Attributes:
        opening, closing: the begin token, or what a chat template puts around a user's text.
        preamble, item, request, response: see ``TemplateConfig``; ``item`` has its {end} filled in.
        terminator: ends every response.
        item_ends: history items end exactly like a response, so that a loss on them trains the same thing.
        candidate: one title of the list in the prompt; None where prompts list none.
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

    @property
    def lists_candidates(self) -> bool:
        """Whether prompts list the candidates."""
        return self.candidate is not None

    def render(self, history: tuple[str, ...], listed: Sequence[str] = ()) -> Prompt:
        """The prompt for ``history`` (titles, oldest first), with the titles ``listed`` where it lists candidates."""
        text, spans = self.opening + self.preamble, []
        before = len(self.item.split("{title}", 1)[0])
        for title in history:
            start = len(text) + before
            text += self.item.replace("{title}", title)
            spans.append((start, len(text)))
        request = self.request
        if self.candidate is not None:
            request = request.replace(CANDIDATES, "".join(self.candidate.replace("{title}", t) for t in listed))
        return Prompt(text + request + self.closing, tuple(spans) if self.item_ends else ())

    def wrap(self, prompt: str) -> Prompt:
        """A finished prompt (TRL rows) between the begin token or the chat template's parts."""
        return Prompt(self.opening + prompt + self.closing, ())

    def render_response(self, title: str) -> str:
        """The response text of ``title`` with its terminator."""
        return self.response.replace("{title}", title) + self.terminator

    @property
    def tail(self) -> str:
        """The end of every prompt with a history or a list of candidates; what comes before it varies."""
        if self.candidate is not None:
            return self.candidate.rsplit("{title}", 1)[1] + self.request.split(CANDIDATES)[1] + self.closing
        return self.item.rsplit("{title}", 1)[1] + self.request + self.closing

    def to_dict(self) -> dict[str, Any]:
        """For ``dmpo.json`` beside a model."""
        return asdict(self)


def make_template(config: TemplateConfig, tokenizer: Any) -> Template:
    """Fill in the tokenizer's begin and end tokens or its chat template.

    Raises:
        UserError: the terminator needs an end token and the tokenizer has none, or a chat template is asked for that
            does not exist or does not keep the message's text.
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
    if use_chat:
        opening, closing, terminator = _chat_parts(tokenizer)
    else:
        opening, closing = tokenizer.bos_token or "", ""
    if not terminator:
        raise UserError("template.terminator is empty: a response needs an end, or its length cannot be learned")
    prefix, suffix = config.response.split("{title}", 1)
    return Template(
        opening=opening,
        preamble=config.preamble,
        item=config.item.replace("{end}", terminator),
        request=config.request,
        closing=closing,
        response=config.response,
        terminator=terminator,
        item_ends=not prefix and config.item.endswith("{title}" + suffix + "{end}"),
        candidate=config.candidate if config.lists_candidates else None,
    )


def _chat_parts(tokenizer: Any) -> tuple[str, str, str]:
    """What the chat template puts before a user's text, between it and the answer, and after the answer."""
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("template.chat is always, but the tokenizer has no chat template; set template.chat to never")
    turns = [{"role": "user", "content": _MARK}, {"role": "assistant", "content": _MARK}]
    opening, *rest = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True).split(_MARK)
    whole = tokenizer.apply_chat_template(turns, tokenize=False).split(_MARK)
    if len(rest) != 1 or len(whole) != 3:
        raise UserError("the tokenizer's chat template does not keep a message's text; set template.chat to never")
    return opening, rest[0], whole[2].rstrip("\n")
