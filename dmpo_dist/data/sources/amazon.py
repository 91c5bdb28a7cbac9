"""Amazon Reviews (McAuley lab): reviews of a category joined with its metadata, 2018 and 2023 layouts."""

import html
import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from dmpo_dist.data.cleaning import assemble
from dmpo_dist.data.rules import Rules
from dmpo_dist.data.schema import Interactions
from dmpo_dist.data.tables import as_strings, pick, read_json_lines
from dmpo_dist.errors import UserError

META = "meta_"
PAGE_CODE = ("getTime", "var aPageStart")  # metadata of 2018 holds scripts of the shop's page instead of some titles


@dataclass(frozen=True)
class Layout:
    """File names and keys of one edition.

    Attributes:
        extension: of the files with reviews and metadata, which may also be gzipped.
        reviews: our column -> the key of a review that holds it.
        item: the key of the metadata that holds the product's id.
        ticks: units of the timestamp in a second, 1000 for milliseconds.
        terms: origin and terms of the data.
    """

    extension: str
    reviews: dict[str, str]
    item: str
    ticks: int
    terms: str


EDITIONS = {
    "2018": Layout(
        ".json",
        {"user": "reviewerID", "item": "asin", "rating": "overall", "timestamp": "unixReviewTime"},
        "asin",
        1,
        "Amazon Reviews 2018 (J. Ni, J. Li, J. McAuley, EMNLP 2019): for research, to be cited.",
    ),
    "2023": Layout(
        ".jsonl",
        {"user": "user_id", "item": "parent_asin", "rating": "rating", "timestamp": "timestamp"},
        "parent_asin",
        1000,
        "Amazon Reviews 2023 (Y. Hou et al., arXiv 2403.03952): for research, to be cited.",
    ),
}


def read_amazon(folder: Path, category: str | None, fields: dict[str, str], rules: Rules) -> Interactions:
    """Read reviews and titles of ``category`` (None: the only category in ``folder``).

    Args:
        fields: name of a further text of the products -> its key in the metadata.

    HTML entities in titles are decoded and tags removed. Products without a title are left out with their reviews, and
    a note says how many.

    Raises:
        UserError: no or several categories in the folder, or a malformed file.
    """
    edition, category, reviews_file, meta_file = _find(folder, category)
    layout = EDITIONS[edition]
    advice = f"this is not a file of Amazon Reviews {edition}"
    rows = dict(read_json_lines(reviews_file, list(layout.reviews.values())))
    events = pick(_frame(rows), layout.reviews, reviews_file, advice)
    seconds = pd.to_numeric(events["timestamp"], errors="coerce") // layout.ticks
    events["timestamp"] = seconds.astype("Int64").astype(str).where(seconds.notna(), events["timestamp"])
    items = pick(
        _frame(dict(read_json_lines(meta_file, [layout.item, "title", *fields.values()]))),
        {"item": layout.item, "title": "title", **fields},
        meta_file,
        advice,
    )
    notes = [layout.terms]
    items = _cleaned(items, notes)
    known = events["item"].isin(items["item"])
    if not known.any():
        raise UserError(f"{meta_file}: has no title for any product in {reviews_file.name}; take files of one category")
    if not known.all():
        notes.append(f"{int((~known).sum())} reviews of products without a title left out.")
    name = f"Amazon {category.replace('_', ' ')} {edition}"
    return assemble(events[known], items, reviews_file, meta_file, name, notes, rules)


def _frame(rows: dict[int, dict[str, object]]) -> pd.DataFrame:
    return as_strings(pd.DataFrame(list(rows.values()), index=list(rows), dtype=object))


def _find(folder: Path, category: str | None) -> tuple[str, str, Path, Path]:
    """Edition, category, file of reviews and file of metadata in ``folder``."""
    if not folder.is_dir():
        raise UserError(f"{folder}: data.source.kind=amazon wants the folder with reviews and metadata, not a file")
    found: dict[str, tuple[str, str, Path, Path]] = {}
    for file in sorted(folder.iterdir()):
        for edition, layout in EDITIONS.items():
            match = re.fullmatch(rf"{META}(.+){re.escape(layout.extension)}(\.gz)?", file.name)
            if match is None:
                continue
            names = [f"{match[1]}{core}{layout.extension}{gz}" for core in ("", "_5") for gz in ("", ".gz")]
            reviews = next((folder / name for name in names if (folder / name).is_file()), None)
            if reviews is not None:
                found[match[1]] = (edition, match[1], reviews, file)
    if category is None and len(found) == 1:
        return next(iter(found.values()))
    if category not in found:
        have = (
            ", ".join(found)
            or "none with both reviews and metadata (such as Video_Games.jsonl.gz, meta_Video_Games.jsonl.gz)"
        )
        raise UserError(f"{folder}: set data.source.category to one of the categories there: {have}")
    return found[category]


def _cleaned(items: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """One row for each product that has a title after cleaning."""
    titles = items["title"].map(clean_title)
    changed = int((titles != items["title"].str.strip()).sum())
    if changed:
        notes.append(f"{changed} titles freed of HTML, line breaks or page code.")
    items = items.assign(title=titles)
    return items[items["title"] != ""].drop_duplicates("item")


def clean_title(title: str) -> str:
    """``title`` on one line, HTML entities decoded, without tags; "" where it is code of the shop's page."""
    if any(code in title for code in PAGE_CODE):
        return ""
    text = re.sub(r"<[a-zA-Z/][^<>]*>", " ", html.unescape(html.unescape(title)))
    return " ".join(text.split())
