"""Titles as people write them: without HTML entities, and with "The" in front where catalogues put it last."""

import html
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from dmpo_dist.data.schema import Interactions
from dmpo_dist.errors import UserError

ARTICLES = "The|A|An|La|Le|Les|Il|Lo|Der|Die|Das|El|Los|Las|Det|Den|En"
SORTED = re.compile(rf"(?P<title>.+), (?P<article>{ARTICLES}|L')(?P<other>(?: \([^()]*\))*)(?P<year> \(\d{{4}}\))?")


ENTITY = re.compile(r"&(?:#\d+|#[xX][0-9a-fA-F]+|[a-zA-Z][a-zA-Z0-9]*);")


def without_entities(title: str) -> str:
    """``title`` with HTML entities decoded, also those of a text that was escaped twice: "Q &amp;amp; A" -> "Q & A".

    Only what ends with a semicolon counts, so that "AT&T" and "Q&A" stay.
    """
    for _ in range(2):
        title = ENTITY.sub(lambda entity: html.unescape(entity[0]), title)
    return title


def as_in_data(title: str) -> str:
    """``title`` as prepared data has it, whatever its source: without HTML entities and space around it."""
    return without_entities(title).strip()


def titles_given(given: Any, argument: str) -> list[str]:
    """The titles that a caller passes as ``argument``, from a list, an array, a column of a data frame or the like.

    Raises:
        UserError: it is a single text, of which each letter would be taken for a title, or holds what is no title.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise UserError(f"{argument}={given!r}: is no list of titles; give {argument}=[...] with a text for each")
    titles = list(given)
    for index, title in enumerate(titles):
        if not isinstance(title, str) or not title.strip():
            raise UserError(f"{argument}[{index}] is {title!r}, which is no title; give a text, or leave it out")
    return [str(title) for title in titles]  # NumPy's texts are a type of their own


def article_first(title: str) -> str:
    """``title`` with an article that stands behind a comma put first: "Matrix, The (1999)" -> "The Matrix (1999)"."""
    match = SORTED.fullmatch(title)
    if match is None:
        return title
    space = "" if match["article"].endswith("'") else " "
    return f"{match['article']}{space}{match['title']}{match['other']}{match['year'] or ''}"


def with_articles_first(log: Interactions) -> Interactions:
    """``log`` with the titles of its items as people write them, and a note of how many changed.

    Raises:
        UserError: two items have one title then.
    """
    titles = log.items["title"].map(article_first)
    twice = titles[titles.duplicated(keep=False)]
    if len(twice):
        items = log.items.loc[twice.index, "item"].tolist()
        raise UserError(
            f"data.source.articles=first: items {items[0]!r} and {items[1]!r} would both be {twice.iloc[0]!r}; "
            "rename one, or set data.source.articles=as_is"
        )
    changed = int((titles != log.items["title"]).sum())
    note = f"Titles whose article was put first: {changed}."
    return replace(log, items=log.items.assign(title=titles), notes=[*log.notes, note])
