"""Preference rows in the formats of other projects: S-DPO's, and the DMPO authors' pairwise prompts."""

import html
import re
from pathlib import Path
from typing import Any, Literal

from dmpo_dist.data.sources.preferences import PreferenceRow, Preferences, load_preferences, read_groups
from dmpo_dist.data.sources.rowfiles import shorten
from dmpo_dist.errors import UserError

TITLE = re.compile(r"<Title:(.*?)>")
QUESTION = ". Rank the likelihood"  # stands between history and candidates in the authors' prompts
TRAINING = re.compile(r"(.+)_dpo_ranking_(\d+)\.json")


def load_sdpo(path: Path | None, seed: int) -> Preferences:
    """Read S-DPO's rows: ``history`` (or ``historyList``), ``itemList`` and ``trueSelection``, which all hold titles.

    Raises:
        UserError: see ``load_preferences``, or candidates without the target.
    """
    return load_preferences(path, seed, _parse_sdpo_row)


def _parse_sdpo_row(row: Any, where: str) -> PreferenceRow:
    if not isinstance(row, dict):
        raise UserError(f"{where}: {shorten(row)} is not an object with history, itemList and trueSelection")
    history = _titles(row, "historyList" if "historyList" in row else "history", where)
    items = _titles(row, "itemList", where)
    target = row.get("trueSelection")
    if not isinstance(target, str) or not target.strip():
        raise UserError(f"{where}: 'trueSelection' is {shorten(target)}; it must be the title that was taken")
    target = target.strip()
    if target not in items:
        raise UserError(f"{where}: the candidates in 'itemList' lack the target {target!r}; add it or remove the row")
    negatives = tuple(title for title in dict.fromkeys(items) if title != target)
    if not negatives:
        raise UserError(f"{where}: 'itemList' holds nothing but the target {target!r}; a group needs a negative")
    shown_at = (items.index(target), len(items))
    return PreferenceRow(None, target, negatives, history, (target, *negatives), (shown_at,))


def _titles(row: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    """The titles in ``row[key]``, which is a list or one string with :: between them."""
    value = row.get(key)
    titles = value.split("::") if isinstance(value, str) else value
    if not isinstance(titles, list) or not titles or not all(isinstance(t, str) and t.strip() for t in titles):
        raise UserError(f"{where}: {key!r} is {shorten(value)}; it must be a list of titles")
    return tuple(title.strip() for title in titles)


def load_released(path: Path | None, negatives: int | None, prompts: Literal["rebuild", "original"]) -> Preferences:
    """Read the folder that the DMPO authors released: ..._dpo_ranking_K.json to train, ..._eval_ranking.json to test.

    Args:
        negatives: which K; None takes the largest in the folder.
        prompts: ``rebuild`` makes one group of a history and all its negatives, with HTML entities in titles decoded,
            for the template; ``original`` keeps each prompt, which lists two titles, and the two orders as responses.

    Raises:
        UserError: no such folder or files, or a malformed row.
    """
    if path is None or not path.is_dir():
        raise UserError(f"{path or 'data.source.path'}: no such folder; set data.source.path to the released folder")
    found = {int(match[2]): match for file in sorted(path.iterdir()) if (match := TRAINING.fullmatch(file.name))}
    if not found or (negatives is not None and negatives not in found):
        have = ", ".join(map(str, sorted(found))) or "none"
        raise UserError(
            f"{path}: no ..._dpo_ranking_K.json for data.source.released_negatives={negatives}; K there: {have}"
        )
    match = found[negatives or max(found)]
    test = path / f"{match[1]}_eval_ranking.json"
    if not test.is_file():
        raise UserError(f"{path}: no {test.name} beside {match[0]} to evaluate on")

    def parse(row: Any, where: str) -> PreferenceRow:
        return _parse_released_row(row, where, prompts == "original")

    notes = ["Files released by the DMPO authors (Bai et al., arXiv 2405.16127), Apache-2.0."]
    splits: dict[str, list[PreferenceRow]] = {"train": [], "validation": [], "test": []}
    for split, file in (("train", path / match[0]), ("test", test)):
        splits[split], more = read_groups(file, parse)
        notes += [f"{file.name}: {note}" for note in more]
    name = f"{path.resolve().name}, K={negatives or max(found)}, {prompts} prompts"
    return Preferences(splits, name, notes)


def _parse_released_row(row: Any, where: str, original: bool) -> PreferenceRow:
    if not isinstance(row, dict) or not isinstance(row.get("instruction"), str):
        raise UserError(f"{where}: {shorten(row)} is not an object with 'instruction' and 'output'")
    orders = row.get("output")
    if not isinstance(orders, list) or len(orders) != 2 or not all(isinstance(order, str) for order in orders):
        raise UserError(
            f"{where}: 'output' is {shorten(orders)}; a preference is a pair [better order, worse order] "
            "(rows with one text are for supervised fine-tuning)"
        )
    before, found, question = row["instruction"].partition(QUESTION)
    history, listed = _bracketed(before), _bracketed(question)
    better, worse = _bracketed(orders[0]), _bracketed(orders[1])
    if not found or len(listed) != 2 or not history:
        raise UserError(
            f"{where}: 'instruction' does not read 'history ... {QUESTION[2:]} ... <Title:A> and <Title:B>'"
        )
    if sorted(better) != sorted(listed) or worse != better[::-1]:
        raise UserError(
            f"{where}: 'output' must hold the two listed titles {listed} in one order and the other, not "
            f"{shorten(orders)}"
        )
    if listed[0] == listed[1]:
        raise UserError(f"{where}: both candidates are {listed[0]!r}; remove the row")
    shown_at = ((listed.index(better[0]), 2),)
    if original:
        return PreferenceRow(row["instruction"], orders[0], (orders[1],), history, better, shown_at)
    return PreferenceRow(None, better[0], (better[1],), history, better, shown_at)


def _bracketed(text: str) -> tuple[str, ...]:
    return tuple(html.unescape(title).strip() for title in TITLE.findall(text))
