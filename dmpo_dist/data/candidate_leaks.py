"""Leak checks of candidates: do they give the target away to one who knows nothing of the user?

Two attackers read candidates alone. The look-up learns which items are targets. The overlap test finds the request
whose candidates are most alike, and names the target of that one. ``tests/benchmarks/leak_calibration.py`` measures how
often either accuses honest data, and which leaks they find.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from dmpo_dist.data.finding import ENOUGH, EXAMPLES, Finding, Row, Verdict
from dmpo_dist.data.popularity import counts_before

Z = 1.96  # standard errors from the mean to either end of a 95 % interval
LOOK_UP_GAIN = 0.05  # the look-up must gain more HR@1 than this over popularity to count as a leak
RECENT = 0.25  # recent popularity counts the events of this last part of the time before a request
TESTED = 1000  # requests that the overlap test is made on; they are compared with all others
BEYOND = 3  # negatives that one with the same target must share beyond all with other targets, to give it away
FEW = 5  # with fewer negatives than this, one that is shared beyond the others is enough
OVERLAP_GAIN = 0.02  # share of requests given away, above chance, that counts as a leak
ALIKE_GAIN = 0.1  # the same for requests that are given away with luck, which is a warning


def look_up(rows: Mapping[str, Sequence[Row]], events: pd.DataFrame | None) -> Finding:
    """Can the target be guessed from how often items are targets? Naive Bayes over items is trained to do so.

    It learns from the candidates of the training rows how often each item is a target and how often a negative. Popular
    items are likelier targets than random negatives, whatever the user likes, so HR@1 above chance is no leak by
    itself. It is one if HR@1 is also above that of ranking by popularity, of all time and recent.
    """
    check = "candidate look-up"
    tested = rows["test"] or rows["validation"]
    if min(len(tested), len(rows["train"])) < ENOUGH:
        return Finding(check, "not checked", f"Fewer than {ENOUGH} rows to learn from or to try it on.")
    candidates = [_candidates(row) for row in tested]
    weight = _target_weights([_candidates(row) for row in rows["train"]])
    probe = np.array([_hit(np.array([weight[item] for item in items])) for items in candidates])  # (n_requests,)
    chance = float(np.mean([1 / len(items) for items in candidates]))
    low, high = _interval(probe)
    figures = {"hr@1": float(probe.mean()), "low": low, "high": high, "chance": chance, "requests": len(tested)}
    text = (
        f"From the candidates alone HR@1 is {probe.mean():.3f} [{low:.3f}, {high:.3f}] on {len(tested)} requests; "
        f"chance is {chance:.3f}"
    )
    if events is None and not any(row["history_items"] for part in rows.values() for row in part):
        verdict: Verdict = "warning" if low > chance + LOOK_UP_GAIN else "ok"
        return Finding(check, verdict, f"{text}. The rows do not tell popularity, which may explain it.", figures)
    popular = _popularity_hits(rows, tested, candidates, events)  # (n_requests,)
    # Paired: both rank the same candidates, so their difference per request varies less than either of them. Its
    # whole interval must lie above the gate, so that a few lucky requests are not called a leak.
    gain_low, gain_high = _interval(probe - popular)
    verdict = "leak" if gain_low > LOOK_UP_GAIN else "warning" if low > chance + LOOK_UP_GAIN else "ok"
    text += f", counting popularity gives {popular.mean():.3f} (difference [{gain_low:.3f}, {gain_high:.3f}])."
    if verdict == "warning":
        text += " Random negatives are less popular than targets: show a popularity baseline beside every figure."
    return Finding(check, verdict, text, figures | {"popularity_hr@1": float(popular.mean()), "gain_low": gain_low})


def _candidates(row: Row) -> list[str]:
    """The items of a request, or its titles where items are unknown; the positive first."""
    if row["positive_item"]:
        return [row["positive_item"], *row["negative_items"]]
    return [row["positive"], *row["negatives"]]


def _target_weights(sets: Sequence[Sequence[str]]) -> defaultdict[str, float]:
    """item -> log-odds of being the target; 0 for an item never seen. Positives come first in each set."""
    positive = Counter(items[0] for items in sets)
    negative = Counter(item for items in sets for item in items[1:])
    # There are K times as many negatives as positives, so counts of negatives are divided by K: an item that is target
    # and negative at the overall rate has weight 0. Adding 1 (Laplace smoothing) keeps rare items near 0.
    negatives_per_positive = negative.total() / len(sets)
    weights: defaultdict[str, float] = defaultdict(float)
    for item in positive | negative:
        weights[item] = float(np.log((positive[item] + 1) / (negative[item] / negatives_per_positive + 1)))
    return weights


def _hit(scores: np.ndarray) -> float:
    """Probability that the first of ``scores`` (n,) ranks first when ties are broken at random."""
    best = scores == scores.max()
    return float(best[0] / best.sum())


def _popularity_hits(
    rows: Mapping[str, Sequence[Row]],
    tested: Sequence[Row],
    candidates: Sequence[list[str]],
    events: pd.DataFrame | None,
) -> np.ndarray:
    """(n_requests,) hits of ranking by popularity.

    Popularity is the number of events before the request, of all time or of the last part of it: whichever ranks
    better, as the look-up may have learnt either. Without a log it is the number of rows whose history has the item,
    the request itself left out.
    """
    if events is not None:
        items = [item for candidate in candidates for item in candidate]
        sizes = [len(candidate) for candidate in candidates]
        until = np.repeat([row["timestamp"] for row in tested], sizes)
        since = until - (RECENT * (until - events["timestamp"].min())).astype(np.int64)
        ever = counts_before(items, until, events)
        recent = ever - counts_before(items, since, events)
        bounds = np.cumsum(sizes)[:-1]
        hits = [np.array([_hit(counts) for counts in np.split(flat, bounds)]) for flat in (ever, recent)]
        return max(hits, key=lambda found: found.mean())
    total = Counter(item for split in rows.values() for row in split for item in set(row["history_items"]))
    histories = [set(row["history_items"]) for row in tested]
    scores = [[total[i] - (i in own) for i in items] for own, items in zip(histories, candidates, strict=True)]
    return np.array([_hit(np.array(row)) for row in scores])


def _interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean, by its standard error."""
    half = Z * float(values.std()) / len(values) ** 0.5
    return float(values.mean()) - half, float(values.mean()) + half


def overlapping(rows: Mapping[str, Sequence[Row]]) -> Finding:
    """Are the negatives a function of the target? Then requests with one target share negatives, and others do not.

    Where negatives are drawn without regard to the target, the request that shares most of them has the same target as
    seldom as any other request. What shares them for another reason (a pool of one day's items, users who have seen the
    same) is shared with other targets too, so only what goes beyond all of those counts.
    """
    check = "overlap of candidates"
    every = [*rows["train"], *rows["validation"], *rows["test"]]
    evaluated = np.arange(len(rows["train"]), len(every))
    if len(evaluated) < ENOUGH:
        return Finding(check, "not checked", f"Fewer than {ENOUGH} validation and test rows.")
    tested = evaluated[np.linspace(0, len(evaluated) - 1, min(TESTED, len(evaluated))).astype(int)]
    found = overlap([_candidates(row) for row in every], tested)
    given_away = found.same >= found.other + np.where(found.negatives < FEW, 1, BEYOND)
    above, alike_above = (_interval(part - found.chance)[0] for part in (given_away, found.alike))
    verdict: Verdict = "leak" if above > OVERLAP_GAIN else "warning" if alike_above > ALIKE_GAIN else "ok"
    text = (
        f"The request with most negatives in common has the same target in {found.alike.mean():.1%} of {len(tested)} "
        f"validation and test requests, and in {given_away.mean():.1%} it has more of them than luck would bring; "
        f"{found.chance.mean():.1%} of all requests have it."
    )
    if verdict == "leak":
        text += " Negatives were made from the target: draw them without regard to it."
    elif verdict == "warning":
        text += " Candidates of one moment's pool may look like this; so may negatives that are made from the target."
    figures = {
        "alike": float(found.alike.mean()),
        "given_away": float(given_away.mean()),
        "low": above,
        "chance": float(found.chance.mean()),
        "requests": len(tested),
    }
    examples = [
        f"user {every[tested[i]]['user']} and another share {found.same[i]:.0f} of {found.negatives[i]:.0f} negatives "
        f"and the target {every[tested[i]]['positive']!r}"
        for i in np.flatnonzero(given_away)[:EXAMPLES]
    ]
    return Finding(check, verdict, text, figures, examples if verdict == "leak" else [])


@dataclass(frozen=True)
class Overlap:
    """For each of n requests, how its candidates overlap with those of all other requests.

    Attributes:
        same: (n,) most negatives shared with a request that has the same target; -1 where there is no such request.
        other: (n,) most negatives among the candidates of a request that has another target; -1 as above.
        alike: (n,) share of the requests with most negatives in common, of either kind, that have the same target.
        chance: (n,) share of the other requests that have the same target.
        negatives: (n,) number of negatives.
    """

    same: np.ndarray
    other: np.ndarray
    alike: np.ndarray
    chance: np.ndarray
    negatives: np.ndarray


def overlap(sets: Sequence[Sequence[str]], tested: np.ndarray) -> Overlap:
    """Compare the candidates of the requests ``tested`` (indices into ``sets``) with those of all other requests.

    Args:
        sets: the candidates of every request, the target first.
    """
    sizes = np.array([len(items) for items in sets])
    codes = pd.factorize(np.array([item for items in sets for item in items], dtype=object))[0]  # (candidates,)
    start = np.concatenate([[0], np.cumsum(sizes)])
    target = codes[start[:-1]]  # (requests,)
    # An inverted index: the requests that have item i as a candidate are holders[first[i]:first[i + 1]].
    holders = np.repeat(np.arange(len(sets)), sizes)[np.argsort(codes, kind="stable")]
    first = np.concatenate([[0], np.cumsum(np.bincount(codes))])
    found = np.empty((5, len(tested)))
    for column, t in enumerate(tested):
        negatives = np.unique(codes[start[t] + 1 : start[t + 1]])
        sharing = np.concatenate([holders[first[i] : first[i + 1]] for i in negatives])
        # A request with the same target can share its K negatives. One with another target can share that target as
        # well, but may waste a slot on the target of t: neither kind is favoured.
        shared = np.bincount(sharing, minlength=len(sets))  # (requests,)
        same = target == target[t]
        same[t], shared[t] = False, -1
        alike, chance = same[shared == shared.max()].mean(), same.sum() / (len(sets) - 1)
        best_same = shared[same].max(initial=-1)
        shared[same] = -1
        found[:, column] = best_same, shared.max(), alike, chance, len(negatives)
    return Overlap(*found)
