"""Memorisation probes: what a language model knows of a dataset's titles, histories and item ids without training.

A pretrained model may have read the dataset. Three probes after Carlini et al. (arXiv 2202.07646), who ask a model to
continue its training text: does it complete titles, continue users' histories, and know item ids? Each stands beside
a control that keeps everything but what could be memorised.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from dmpo_dist.artifacts.evaluation import Interval
from dmpo_dist.artifacts.memorization import ProbeFigures
from dmpo_dist.data.continuation import continuation, encode
from dmpo_dist.data.store import PreparedData
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.followed import Followed, Text, followed
from dmpo_dist.evaluation.metrics import bootstrap_interval
from dmpo_dist.evaluation.ranking import require_finite
from dmpo_dist.modeling.ranking_model import RankingModel
from dmpo_dist.tables import Cell, Table

EXAMPLES = 5
"""Other lines of the list before the one that is asked for, so that a model sees what the lines are."""
ID_SEPARATOR = "::"
"""Between an item's id and its title, as MovieLens' own movies.dat has it."""


def memorization_probes(
    model: RankingModel,
    data: PreparedData,
    titles: int,
    users: int,
    samples: int,
    seed: int,
    advance: Callable[[int], None] = lambda count: None,
    examples: int = EXAMPLES,
) -> list[ProbeFigures]:
    """Probe ``model`` on ``titles`` items of the catalogue and on ``users`` test requests, drawn by ``seed``.

    Args:
        samples: of the bootstrap behind the 95 % intervals.
        examples: whole lines of other items, drawn at random, before the one of an item that is asked for.
        advance: told how many more texts are done; there are ``number_of_texts``.

    Raises:
        UserError: the data has no catalogue or log, or too few titles or histories to draw from; or log-probs that are
            not finite, by which a model would know nothing.
    """
    if data.items is None or data.interactions is None:
        raise UserError(f"{data.path}: ready preferences have no catalogue and no histories; take a log")
    rng = np.random.default_rng(seed)
    writer = model.load_weights().writer()

    def run(texts: Sequence[Text]) -> Followed:
        found = followed(writer, texts, advance)
        require_finite(model.source.path, [found.log_prob], str(writer.dtype).removeprefix("torch."))
        return found

    probes = _title_probes(Lines(model.tokenizer, examples, rng), data, titles, rng, run, samples, seed)
    probes += _history_probes(model, data, users, rng, run, samples, seed)
    return probes + _id_probes(Lines(model.tokenizer, examples, rng), data, titles, rng, run, samples, seed)


def number_of_texts(data: PreparedData, titles: int, users: int) -> int:
    """How many texts ``memorization_probes`` runs at most."""
    return 4 * min(titles, 0 if data.items is None else len(data.items)) + 3 * min(users, len(data.test))


Run = Callable[[Sequence[Text]], Followed]


@dataclass
class Lines:
    """Makes plain texts: some whole lines, drawn from those of other items, then the one that is asked for."""

    tokenizer: Any
    examples: int
    rng: np.random.Generator

    def before(self, lines: Sequence[str], *answers: str) -> str:
        """Example lines from ``lines`` without ``answers``, however these are spaced, each with its end."""
        told = {*map(_evenly_spaced, answers)}
        others = [line for line in lines if _evenly_spaced(line) not in told]
        chosen = self.rng.choice(len(others), min(self.examples, len(others)), replace=False) if others else []
        return "".join(others[index] + "\n" for index in chosen)

    def text(self, context: str, following: str) -> Text:
        """Both in ids, after the token that begins texts, where the tokenizer has one."""
        begin = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        ids = encode(self.tokenizer, context).ids
        return Text(begin + ids, continuation(self.tokenizer, context, ids, following).ids)


@cache  # of the same lines for every one that is asked for
def _evenly_spaced(line: str) -> str:
    return " ".join(line.split())


def _title_probes(
    lines: Lines, data: PreparedData, count: int, rng: np.random.Generator, run: Run, samples: int, seed: int
) -> list[ProbeFigures]:
    """Titles completed from their first half, against the same words in another order."""
    assert data.items is not None
    known = [words for words in map(str.split, data.items["title"]) if len(set(words)) > 1]
    chosen = _drawn(known, count, rng, f"{data.path}: no title has two words to complete")
    before = [lines.before(data.items["title"].tolist(), " ".join(words)) for words in chosen]
    own, control = (
        run([_halves(lines, *of_title) for of_title in zip(before, some, strict=True)]).greedy
        for some in (chosen, [_reordered(words, rng) for words in chosen])
    )
    return [_against_control("titles completed from their first half (control: words shuffled)", own, control,
                             samples, seed)]  # fmt: skip


def _history_probes(
    model: RankingModel, data: PreparedData, count: int, rng: np.random.Generator, run: Run, samples: int, seed: int
) -> list[ProbeFigures]:
    """A user's next title after the own history, after another user's, and after the own one in another order."""
    rows = [row for row in data.test if len(set(row["history"])) > 1]
    chosen = _drawn(rows, count, rng, f"{data.path}: no test request has two titles in its history")
    others = _similar_histories(chosen, rows, data)
    shuffled = [_reordered(row["history"], rng) for row in chosen]

    def texts(histories: Sequence[Sequence[str]]) -> list[Text]:
        return [_after_history(model, history, row) for history, row in zip(histories, chosen, strict=True)]

    own = run(texts([row["history"] for row in chosen]))
    other, reordered = run(texts(others)), run(texts(shuffled))
    return [
        _against_control("next title written after the user's history (control: another user's history)", own.greedy,
                         other.greedy, samples, seed),
        _share("next title likelier after the user's history than after another's", own, other, samples, seed),
        _share("next title likelier after the history in its order than shuffled", own, reordered, samples, seed),
    ]  # fmt: skip


def _id_probes(
    lines: Lines, data: PreparedData, count: int, rng: np.random.Generator, run: Run, samples: int, seed: int
) -> list[ProbeFigures]:
    """A title after its item's id, and after the id of another item."""
    assert data.items is not None
    pairs = list(zip(data.items["item"].astype(str), data.items["title"], strict=True))
    chosen = _drawn(pairs, count, rng, f"{data.path}: the catalogue is empty")
    if len(pairs) < 2:
        return []
    # The ids of all drawn items, moved by one: each title gets the id of another item.
    ids = [item for item, _ in chosen] if len(chosen) > 1 else [next(i for i, _ in pairs if i != chosen[0][0])]
    others = ids[1:] + ids[:1]
    line_of = {item: item + ID_SEPARATOR + title for item, title in pairs}
    known = list(line_of.values())
    # No example may say which title an id has that is asked for, the other item's included.
    before = [
        lines.before(known, line_of[item], line_of[other]) for (item, _), other in zip(chosen, others, strict=True)
    ]

    def texts(asked: Sequence[str]) -> list[Text]:
        rows = zip(before, asked, chosen, strict=True)
        return [lines.text(examples + item + ID_SEPARATOR, title) for examples, item, (_, title) in rows]

    own, other = run(texts([item for item, _ in chosen])), run(texts(others))
    return [
        _against_control("title written after its item's id (control: another item's id)", own.greedy, other.greedy,
                         samples, seed),
        _share("title likelier after its item's id than after another's", own, other, samples, seed),
    ]  # fmt: skip


def _drawn(population: Sequence[Any], count: int, rng: np.random.Generator, nothing: str) -> list[Any]:
    if not population:
        raise UserError(nothing)
    chosen = np.sort(rng.choice(len(population), min(count, len(population)), replace=False))
    return [population[index] for index in chosen]


def _reordered(words: Sequence[str], rng: np.random.Generator) -> list[str]:
    """``words``, of which at least two differ, in another order."""
    while True:
        other = [words[index] for index in rng.permutation(len(words))]
        if other != list(words):
            return other


def _halves(lines: Lines, before: str, words: Sequence[str]) -> Text:
    """The first half of a title, the longer one of an odd number of words, and the rest."""
    middle = (len(words) + 1) // 2
    return lines.text(before + " ".join(words[:middle]), " " + " ".join(words[middle:]))


def _after_history(model: RankingModel, history: Sequence[str], row: dict[str, Any]) -> Text:
    """The positive of a request after ``history``, by the model's template; any list of candidates is the request's."""
    listed = [row["positive"], *row["negatives"]]
    group = model.token_group(history, [row["positive"]], row["user"], row["timestamp"], listed)
    (branch,), (first,) = group.branches, group.scored_from
    return Text(group.prefix + branch[:first], branch[first:])


def _similar_histories(
    chosen: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], data: PreparedData
) -> list[list[str]]:
    """For each request another user's history without its positive: the nearest in popularity and length.

    Popularity is the mean logarithm of how often the history's items were taken in the log, length its logarithm.
    """
    assert data.interactions is not None
    counts = np.log1p(data.interactions["item"].value_counts())
    places = np.array([_popularity_and_length(row, counts) for row in rows])  # (n_rows, 2)
    found = []
    for row in chosen:
        distance = np.abs(places - _popularity_and_length(row, counts)).sum(axis=1)
        order = np.argsort(distance, kind="stable")
        usable = (rows[index] for index in order if rows[index]["user"] != row["user"])
        other = next((other for other in usable if row["positive"] not in other["history"]), None)
        if other is None:
            raise UserError(f"{data.path}: no other user's history can stand beside that of user {row['user']!r}")
        found.append(other["history"])
    return found


def _popularity_and_length(row: dict[str, Any], counts: pd.Series) -> tuple[float, float]:
    items = row["history_items"]
    return float(counts.reindex(items).fillna(0).mean()), float(np.log(len(items)))


def _against_control(probe: str, own: np.ndarray, control: np.ndarray, samples: int, seed: int) -> ProbeFigures:
    return ProbeFigures(
        probe=probe,
        count=len(own),
        figure=_interval(own, samples, seed),
        control=_interval(control, samples, seed),
        difference=_interval(own - control, samples, seed),
    )


def _share(probe: str, own: Followed, other: Followed, samples: int, seed: int) -> ProbeFigures:
    """The share of texts whose own context makes them likelier than the other one; a tie counts half."""
    above = (own.log_prob > other.log_prob) + 0.5 * (own.log_prob == other.log_prob)
    return ProbeFigures(probe=probe, count=len(above), figure=_interval(above, samples, seed))


def _interval(values: np.ndarray, samples: int, seed: int) -> Interval:
    value, low, high = map(float, bootstrap_interval(values, samples, seed))
    return Interval(value=value, low=low, high=high)


def memorization_table(caption: str, probes: Sequence[ProbeFigures]) -> Table:
    """The probes of one model on one dataset: figure, control and paired difference with 95 % intervals."""
    rows = [
        [Cell(p.probe), Cell(str(p.count)), _cell(p.figure), _cell(p.control, "0.5 by chance"), _cell(p.difference)]
        for p in probes
    ]
    return Table(caption, ["probe", "n", "share", "control", "difference"], rows)


def _cell(figure: Interval | None, missing: str = "") -> Cell:
    return Cell(missing if figure is None else f"{figure.value:.3f} [{figure.low:.3f}, {figure.high:.3f}]")
