"""Ready preference rows, merged into groups. This module parses TRL's format, and rows with levels (``ranked``); other
formats pass a parser.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from dmpo_dist.data.sources.conversations import as_text, is_conversation, prompt_text
from dmpo_dist.data.sources.ranked import history_of, ranked_of
from dmpo_dist.data.sources.rowfiles import read_rows, row_files, shorten, split_files
from dmpo_dist.data.splits import SPLITS
from dmpo_dist.data.titles import ENTITY
from dmpo_dist.errors import UserError

KEYS = ("prompt", "chosen", "rejected")
MIN_GROUPS_TO_SPLIT = 50
HELD_OUT = 0.1  # share of a single file's prompts for validation, and again for test


@dataclass(frozen=True)
class PreferenceRow:
    """One chosen and K distinct rejected responses to a prompt or history, or responses in levels.

    Attributes:
        prompt: finished prompt; None where the template makes it from ``history``.
        history: titles, oldest first; () where only the prompt is known.
        titles: the titles that the responses stand for, chosen first; () where responses are free text.
        shown_at: (position of the chosen one, number of candidates) in each list of candidates that the source showed.
        levels, scores: of the chosen one, then of each of ``rejected``; see ``PreferenceGroup``.
    """

    prompt: str | None
    chosen: str
    rejected: tuple[str, ...]
    history: tuple[str, ...] = ()
    titles: tuple[str, ...] = ()
    shown_at: tuple[tuple[int, int], ...] = ()
    levels: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()

    @property
    def _below(self) -> list[bool]:
        return [level > 0 for level in self.levels[1:]] if self.levels else [True] * len(self.rejected)

    @property
    def beaten(self) -> tuple[str, ...]:
        """The responses that the chosen one is preferred to."""
        return tuple(compress(self.rejected, self._below))

    def with_one_positive(self) -> "PreferenceRow":
        """The chosen response against those it is preferred to, as validation and test rank it."""
        titles = self.titles[:1] + tuple(compress(self.titles[1:], self._below))
        return replace(self, rejected=self.beaten, titles=titles, levels=(), scores=())


@dataclass(frozen=True)
class Preferences:
    """Preference groups by split, and one-sentence notes on what reading merged or dropped."""

    splits: dict[str, list[PreferenceRow]]
    name: str
    notes: list[str] = field(default_factory=list)

    def catalogue(self) -> list[str] | None:
        """All titles, sorted, where the template makes all prompts and every response is a title."""
        groups = [group for split in self.splits.values() for group in split]
        if any(group.prompt is not None or not group.titles for group in groups):
            return None
        return sorted({title for group in groups for title in (*group.history, *group.titles)})

    def users(self) -> dict[str, int]:
        """split -> number of users; rows with equal history, or else equal prompt, count as one user's."""
        return {split: len(self._by_user(split)) for split in self.splits}

    def sampled(self, limits: Mapping[str, int | None], seed: int) -> tuple["Preferences", dict[str, int]]:
        """The same with a seeded sample of at most so many users of a split, and split -> number of users left out."""
        splits, left_out = dict(self.splits), {}
        for split, limit in limits.items():
            groups = list(self._by_user(split).values())
            if limit is not None and len(groups) > limit:
                kept = np.sort(np.random.default_rng(seed).choice(len(groups), limit, replace=False))
                splits[split] = [group for index in kept for group in groups[index]]
                left_out[split] = len(groups) - limit
        return replace(self, splits=splits), left_out

    def _by_user(self, split: str) -> dict[Any, list[PreferenceRow]]:
        """The groups of each user, see ``users``."""
        out: dict[Any, list[PreferenceRow]] = {}
        for group in self.splits[split]:
            out.setdefault(group.history or group.prompt, []).append(group)
        return out

    def shown_at(self) -> dict[str, dict[str, list[int]]]:
        """split -> number of candidates listed -> how often the chosen one stood at each position."""
        counts: dict[str, dict[str, list[int]]] = {}
        for split, groups in self.splits.items():
            for position, size in (shown for group in groups for shown in group.shown_at):
                counts.setdefault(split, {}).setdefault(str(size), [0] * size)[position] += 1
        return counts


Parser = Callable[[Any, str], PreferenceRow | None]


def load_preferences(path: Path | None, seed: int, parse: Parser | None = None) -> Preferences:
    """Read a file, or a folder with files named train, validation and test, in JSONL, JSON or Parquet.

    A single file of at least 50 groups gives 10 % of its prompts each to validation and test (a seeded draw; equal
    prompts stay together); a smaller one is all training. Rows with equal prompt and chosen become one group.

    Args:
        parse: makes a group of a row and of what to call it in errors, or None where its candidates are one title;
            TRL's rows by default.

    Raises:
        UserError: no such file, unknown format, or a bad row; the message names file and row.
    """
    if path is None:
        raise UserError("this data.source.kind needs data.source.path; set it to the file or folder to read")
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; correct data.source.path")
    parse = parse or _parse_trl_row
    if path.is_file():
        groups, notes = read_groups(path, parse)
        splits = _split(groups, seed)
        if not splits["test"]:
            notes.append(f"{len(groups)} groups are too few to hold any out: all are training groups.")
        return Preferences(_evaluable(splits, notes), path.stem, notes)
    splits: dict[str, list[PreferenceRow]] = {split: [] for split in SPLITS}
    notes = []
    files = split_files(path)
    for split, file in files.items():
        splits[split], file_notes = read_groups(file, parse)
        notes += [f"{file.name}: {note}" for note in file_notes]
    if unread := [file.name for file in row_files(path) if file not in files.values()]:
        notes.append(f"Not read: {', '.join(unread)}; rows are read from files named {', '.join(SPLITS)}.")
    return Preferences(_evaluable(splits, notes), path.resolve().name, notes)


def _evaluable(splits: dict[str, list[PreferenceRow]], notes: list[str]) -> dict[str, list[PreferenceRow]]:
    """``splits`` with one positive in every row to evaluate, as metrics are of one; notes on levels are added."""
    lists = sum(bool(group.levels) for group in splits["train"])
    if lists:
        count = len(splits["train"])
        notes.append(f"{lists} of {count} training groups have several positives or more than two levels.")
    held_out = [group for split in SPLITS[1:] for group in splits[split] if group.levels]
    if held_out:
        left_out = sum(len(group.rejected) - len(group.beaten) for group in held_out)
        notes.append(
            f"{len(held_out)} validation and test groups with levels rank the first best response among all of lower "
            f"levels; {left_out} other best ones are left out there."
        )
    evaluated = {split: [group.with_one_positive() for group in splits[split]] for split in SPLITS[1:]}
    return {"train": splits["train"], **evaluated}


def read_groups(file: Path, parse: Parser) -> tuple[list[PreferenceRow], list[str]]:
    """The rows of ``file``, those of equal prompt, history and chosen merged, and notes."""
    numbered = list(read_rows(file))
    parsed = [parse(row, f"{file}, row {number}") for number, row in numbered]
    rows = [row for row in parsed if row is not None]
    if not rows:
        raise UserError(f"{file}: holds no rows; is this the right file?")
    merged: dict[tuple[Any, ...], list[PreferenceRow]] = {}
    for row in rows:
        ranks = (row.rejected, row.levels, row.scores) if row.levels or row.scores else ()  # kept as they are
        merged.setdefault((row.prompt, row.history, row.chosen, ranks), []).append(row)
    groups = [_merge(same) for same in merged.values()]
    notes = [f"{len(parsed) - len(rows)} rows left out whose candidates are one title."] * (len(rows) < len(parsed))
    if len(groups) < len(rows):
        notes.append(f"{len(rows)} rows merged into {len(groups)} groups of equal prompt and chosen.")
    repeated = sum(len(row.rejected) for row in rows) - sum(len(g.rejected) for g in groups)
    if repeated:
        notes.append(f"{repeated} repeated rejected responses dropped.")
    return groups, notes + _contradictions(groups) + _entities([row for _, row in numbered], groups)


def _contradictions(groups: list[PreferenceRow]) -> list[str]:
    """A note on pairs of responses that are preferred both ways after one prompt, which teach nothing."""
    pairs = {(g.prompt, g.history, g.chosen, other) for g in groups for other in g.beaten}
    both = [(g, other) for g in groups for other in g.beaten if (g.prompt, g.history, other, g.chosen) in pairs]
    if not both:
        return []
    group, other = both[0]
    return [
        f"{len(both) // 2} pairs of responses are preferred both ways after the same prompt, the first "
        f"{shorten(group.chosen)} and {shorten(other)} after {shorten(group.prompt or group.history)}: they cancel "
        "out; keep one row of each."
    ]


def _entities(rows: list[Any], groups: list[PreferenceRow]) -> list[str]:
    """A note on HTML entities: decoded in what is known to be titles, kept in free text, which may be about HTML."""
    kept = sum(any(ENTITY.search(text) for text in (g.prompt or "", g.chosen, *g.rejected)) for g in groups)
    if kept:
        return [
            f"{kept} of {len(groups)} groups hold HTML entities such as &amp;, which are kept as they are; decode them "
            "in the file if they are titles."
        ]
    written = sum(bool(ENTITY.search(str(row))) for row in rows)
    return [f"HTML entities decoded in the titles of {written} rows."] if written else []


def _merge(same: list[PreferenceRow]) -> PreferenceRow:
    first = same[0]
    rejected = tuple(dict.fromkeys(text for row in same for text in row.rejected))
    titles = first.titles[:1] + tuple(dict.fromkeys(title for row in same for title in row.titles[1:]))
    shown_at = tuple(shown for row in same for shown in row.shown_at)
    return replace(first, rejected=rejected, titles=titles, shown_at=shown_at)


def _parse_trl_row(row: Any, where: str) -> PreferenceRow:
    if not isinstance(row, dict):
        raise UserError(f"{where}: {shorten(row)} is not an object with {', '.join(KEYS)}")
    if row.get("ranked") is not None:
        return _parse_ranked_row(row, where)
    for key in KEYS:
        if row.get(key) is None and not (key == "prompt" and is_conversation(row.get("chosen"))):
            exist = ", ".join(map(repr, row)) or "no keys"
            raise UserError(f"{where}: no {key!r} (the row has {exist}); write the prompt apart from the responses")
    row = as_text(row, where)
    rejected = row["rejected"] if isinstance(row["rejected"], list) else [row["rejected"]]
    if not rejected:
        raise UserError(f"{where}: 'rejected' is an empty list; a preference needs at least one rejected response")
    for key, value in [("prompt", row["prompt"]), ("chosen", row["chosen"]), *(("rejected", r) for r in rejected)]:
        _check_text(value, key, where)
    if row["chosen"] in rejected:
        raise UserError(f"{where}: chosen {shorten(row['chosen'])} is also rejected; remove it from one side")
    shown_at = _position_in(row["prompt"], [row["chosen"], *rejected])
    return PreferenceRow(
        row["prompt"], row["chosen"], tuple(rejected), shown_at=() if shown_at is None else (shown_at,)
    )


def _parse_ranked_row(row: dict[str, Any], where: str) -> PreferenceRow:
    """``prompt`` or ``history``, and ``ranked``: lists of responses, best first; ``scores`` in the same form if any."""
    both = [key for key in ("chosen", "rejected") if row.get(key) is not None]
    if both:
        raise UserError(f"{where}: both 'ranked' and {both[0]!r}; keep 'ranked', or chosen and rejected responses")
    ranked = ranked_of(row, where)
    responses, levels = ranked.responses, ranked.levels
    if row.get("prompt") is None:
        history = history_of(row, where)
        return PreferenceRow(None, responses[0], responses[1:], history, responses, (), levels, ranked.scores)
    prompt = prompt_text(row["prompt"], where)
    _check_text(prompt, "prompt", where)
    shown = _position_in(prompt, list(responses))
    shown_at = () if shown is None else (shown,)
    return PreferenceRow(prompt, responses[0], responses[1:], (), (), shown_at, levels, ranked.scores)


def _position_in(prompt: str, candidates: list[str]) -> tuple[int, int] | None:
    """(position of the first candidate, number of candidates) in the order in which ``prompt`` last names them.

    None where the prompt does not name each of them.
    """
    offsets = [prompt.rfind(text.strip()) for text in candidates]
    if min(offsets) < 0 or len(set(offsets)) < len(offsets):
        return None
    return sorted(offsets).index(offsets[0]), len(offsets)


def _check_text(value: Any, key: str, where: str) -> None:
    if not isinstance(value, str):
        raise UserError(
            f"{where}: {key!r} is {shorten(value)}; it must be a string{' or a list of strings' * (key == 'rejected')}"
        )
    if not value.strip():
        raise UserError(f"{where}: {key!r} is an empty string; fill it or remove the row")


def _split(groups: list[PreferenceRow], seed: int) -> dict[str, list[PreferenceRow]]:
    prompts = list(dict.fromkeys((g.prompt, g.history) for g in groups))
    held_out = int(len(prompts) * HELD_OUT)
    if len(groups) < MIN_GROUPS_TO_SPLIT or held_out == 0:
        return {"train": groups, "validation": [], "test": []}
    order = np.random.default_rng(seed).permutation(len(prompts)).tolist()
    split_of = {
        prompts[i]: "validation" if n < held_out else "test" if n < 2 * held_out else "train"
        for n, i in enumerate(order)
    }
    return {split: [g for g in groups if split_of[g.prompt, g.history] == split] for split in SPLITS}
