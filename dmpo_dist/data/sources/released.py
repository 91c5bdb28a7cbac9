"""Preference rows in the formats of other projects: S-DPO's, and the DMPO authors' pairwise prompts."""

import re
from pathlib import Path
from typing import Any, Literal

from dmpo_dist.data.sources.preferences import PreferenceRow, Preferences, load_preferences, read_groups
from dmpo_dist.data.sources.rowfiles import shorten
from dmpo_dist.data.titles import as_in_data
from dmpo_dist.errors import UserError

TITLE = re.compile(r"<Title:(.*?)(?:, Genre:[^>]*)?>")
BRACKETED = re.compile(r"<Title:.*?>")
QUESTION = ". Rank the likelihood"  # stands between history and candidates in the authors' prompts
TRAINING = re.compile(r"(.+)_dpo_ranking_(\d+)\.json")


def load_sdpo(path: Path | None, seed: int) -> Preferences:
    """Read S-DPO's rows: ``history`` (or ``historyList``), ``itemList`` and ``trueSelection``, which all hold titles.

    HTML entities in them are decoded.

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
    target = as_in_data(target)
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
    return tuple(as_in_data(title) for title in titles)


def load_released(
    path: Path | None,
    negatives: int | None,
    prompts: Literal["rebuild", "original"],
    seed: int = 0,
    category: str | None = None,
) -> Preferences:
    """Read what the DMPO authors released: ..._dpo_ranking_K.json to train, ..._eval_ranking.json to test.

    A single file of the release, or a training file without the one to test on, is split like any other file of rows.

    Args:
        negatives: which K; None takes the largest in the folder.
        prompts: ``rebuild`` makes one group of a history and all its negatives, with HTML entities in titles decoded,
            for the template; ``original`` keeps each prompt, which lists two titles, and the two orders as responses.
        seed: of the split of a single file.
        category: which of the datasets in the folder, such as Amazon_Game; None takes the only one.

    Raises:
        UserError: no such path or files, several datasets and no ``category``, or a malformed row.
    """

    def parse(row: Any, where: str) -> PreferenceRow | None:
        return _parse_released_row(row, where, prompts == "original")

    origin = "Files released by the DMPO authors (Bai et al., arXiv 2405.16127), Apache-2.0."
    if path is None or not path.exists():
        raise UserError(f"{path or 'data.source.path'}: does not exist; set data.source.path to the released folder")
    file, test = (path, None) if path.is_file() else _released_files(path, negatives, category)
    if test is None:
        alone = load_preferences(file, seed, parse)
        return Preferences(alone.splits, f"{alone.name}, {prompts} prompts", [origin, *alone.notes])
    splits: dict[str, list[PreferenceRow]] = {"train": [], "validation": [], "test": []}
    notes = [origin]
    for split, part in (("train", file), ("test", test)):
        splits[split], more = read_groups(part, parse)
        notes += [f"{part.name}: {note}" for note in more]
    return Preferences(splits, f"{path.resolve().name}, {file.stem}, {prompts} prompts", notes)


def _released_files(folder: Path, negatives: int | None, category: str | None) -> tuple[Path, Path | None]:
    """The file to train on and, if it is there, the one to test on."""
    matches = [match for file in sorted(folder.iterdir()) if (match := TRAINING.fullmatch(file.name))]
    names = sorted({match[1] for match in matches})
    if category is None and len(names) > 1:
        raise UserError(f"{folder}: holds several datasets; set data.source.category to one of {', '.join(names)}")
    found = {int(match[2]): match for match in matches if category is None or match[1] == category}
    if not found or (negatives is not None and negatives not in found):
        have = ", ".join(map(str, sorted(found))) or "none"
        of = "" if category is None else f" of data.source.category={category} (there are {', '.join(names) or 'none'})"
        raise UserError(
            f"{folder}: no ..._dpo_ranking_K.json{of} for data.source.released_negatives={negatives}; K there: {have}"
        )
    match = found[negatives or max(found)]
    test = folder / f"{match[1]}_eval_ranking.json"
    return folder / match[0], test if test.is_file() else None


def _parse_released_row(row: Any, where: str, original: bool) -> PreferenceRow | None:
    if not isinstance(row, dict) or not isinstance(row.get("instruction"), str):
        raise UserError(f"{where}: {shorten(row)} is not an object with 'instruction' and 'output'")
    orders = _both_orders(row.get("output"))
    if not isinstance(orders, list) or len(orders) != 2 or not all(isinstance(order, str) for order in orders):
        raise UserError(
            f"{where}: 'output' is {shorten(orders)}; it must be a text that names both titles, the better first, or a "
            "pair [better order, worse order]"
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
        return None
    shown_at = ((listed.index(better[0]), 2),)
    if original:
        return PreferenceRow(row["instruction"], orders[0], (orders[1],), history, better, shown_at)
    return PreferenceRow(None, better[0], (better[1],), history, better, shown_at)


def _both_orders(output: Any) -> Any:
    """``output`` as a pair; where it is one text (the files for SFT, and MovieLens' to evaluate on) that and its
    reverse, written as the files with pairs write it."""
    bracketed = BRACKETED.findall(output) if isinstance(output, str) else []
    return [output, f" {bracketed[1]} ,  {bracketed[0]} "] if len(bracketed) == 2 else output


def _bracketed(text: str) -> tuple[str, ...]:
    return tuple(as_in_data(title) for title in TITLE.findall(text))
