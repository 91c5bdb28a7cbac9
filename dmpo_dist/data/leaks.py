"""Leak check: can a model score well on these preference groups without knowing the user?

Every check looks at finished rows, whatever their source, and returns a ``Finding``. A leak makes figures on the data
worthless. A warning is a property of the data that readers of the figures should know.
"""

import html
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import chisquare

from dmpo_dist.artifacts.dataset import LeakFinding
from dmpo_dist.data.candidate_leaks import look_up, overlapping
from dmpo_dist.data.finding import ENOUGH, EXAMPLES, Finding, Row, Verdict

EVALUATED = ("validation", "test")
TOLERATED = 0.01  # up to this share of rows or titles a blemish is a warning, above it a leak
COINCIDENCE = 3  # histories shorter than this may be equal by chance and are not compared
STYLE_GAP = 0.2  # difference between two shares of titles in one style that needs an explanation
UNLIKELY = 1e-3  # p-value below which positions of the positive are not uniform (chi-squared test)
STYLES: dict[str, Callable[[str], bool]] = {
    "an HTML entity": lambda t: html.unescape(t) != t,
    "space around it": lambda t: t != t.strip(),
    "quotes around it": lambda t: len(t) > 1 and t[0] in "\"'“" and t[-1] in "\"'”",
    "a year in brackets": lambda t: re.search(r"\(\d{4}\)\s*$", t) is not None,
    "its article last": lambda t: re.search(r", (The|A|An)\b", t) is not None,
    "capitals only": str.isupper,
    "no capitals": str.islower,
}


def check_leaks(
    rows: Mapping[str, Sequence[Row]],
    events: pd.DataFrame | None,
    shown_at: Mapping[str, Mapping[str, Sequence[int]]] | None = None,
    leave_one_out: bool = False,
) -> list[Finding]:
    """Run all checks on the rows of train, validation and test.

    Args:
        events: the log (user, item, timestamp) the rows were made from, if there was one.
        shown_at: split -> number of candidates -> how often the positive stood at each position of the list of
            candidates that the source showed; None where it showed no lists.
        leave_one_out: the data is split per user, so training on events later than a test request is only a warning.
    """
    return [
        _shared_histories(rows, known_users=events is not None),
        _future_items(rows, events),
        _trained_on_the_future(rows, events is not None, leave_one_out),
        look_up(rows, events),
        overlapping(rows),
        _title_formats(rows),
        _title_styles(rows),
        _duplicate_titles(rows),
        _positions(shown_at, any(row["prompt"] is not None for split in rows.values() for row in split)),
    ]


def leaks(findings: Sequence[Finding]) -> list[Finding]:
    """The findings that are leaks."""
    return [finding for finding in findings if finding.verdict == "leak"]


def leak_message(found: Sequence[Finding]) -> str:
    """The text of an error about leaks: how many there are, and a line for each."""
    listed = "".join(f"\n  {finding.check}: {finding.text}" for finding in found)
    return (
        f"the leak check found {len(found)} leak{'s' * (len(found) > 1)}:{listed}\nfigures on this data would mislead"
    )


def finding_lines(findings: Sequence[Finding]) -> list[str]:
    """Lines for the terminal: one for each leak or warning, then one with the names of all other checks."""
    lines = []
    for finding in findings:
        if finding.verdict in ("leak", "warning"):
            shown = f" For example {'; '.join(finding.examples)}." if finding.examples else ""
            lines.append(f"leak check, {finding.check}: {finding.verdict.upper()}. {finding.text}{shown}")
    for verdict in ("ok", "not checked"):
        named = ", ".join(f.check for f in findings if f.verdict == verdict)
        if named:
            lines.append(f"leak check {verdict}: {named}")
    return lines


def findings_table(findings: Sequence[LeakFinding]) -> list[str]:
    """Markdown lines for the data card."""
    lines = ["| leak check | verdict | finding |", "|---|---|---|"]
    for finding in findings:
        verdict = f"**{finding.verdict}**" if finding.verdict == "leak" else finding.verdict
        examples = f" For example {'; '.join(finding.examples)}." if finding.examples else ""
        lines.append(f"| {finding.check} | {verdict} | {(finding.text + examples).replace('|', '/')} |")
    return lines


def findings_to_json(findings: Sequence[Finding]) -> list[LeakFinding]:
    """The findings as ``dataset.json`` holds them."""
    return [LeakFinding.model_validate(asdict(finding)) for finding in findings]


def canonical(title: str) -> str:
    """The title without case, HTML and punctuation, and with its article in front: equal for variants of one title."""
    text = unicodedata.normalize("NFKC", html.unescape(title)).casefold()
    text = re.sub(r"^(.*?), (the|a|an)\b", r"\2 \1", text)
    return " ".join(re.findall(r"\w+", text)) or text.strip()


def _evaluated(rows: Mapping[str, Sequence[Row]]) -> list[Row]:
    return [row for split in EVALUATED for row in rows[split]]


def _no_evaluation(check: str) -> Finding:
    return Finding(check, "not checked", "There are no validation or test rows.")


def _shared_histories(rows: Mapping[str, Sequence[Row]], known_users: bool) -> Finding:
    """Requests whose history (or finished prompt) is also that of a training group, of the same user if known."""
    check = "histories shared by splits"
    evaluated = _evaluated(rows)
    if not evaluated:
        return _no_evaluation(check)

    def key(row: Row) -> Any:
        if not row["history_items"]:
            return row["prompt"]
        return (row["user"] if known_users else "", tuple(row["history_items"]))

    # A short history may recur by chance, so only longer ones and finished prompts are looked for.
    train = {key(row) for row in rows["train"] if row["prompt"] is not None or len(row["history_items"]) >= COINCIDENCE}
    shared = [row for row in evaluated if key(row) in train]
    distinct = len({key(row) for row in shared})
    text = (
        f"{distinct} of {len({key(row) for row in rows['train']})} training histories also occur in evaluation, in "
        f"{len(shared)} of its {len(evaluated)} rows."
    )
    figures = {"histories": distinct, "evaluation_rows": len(shared)}
    return Finding(check, "leak" if shared else "ok", text, figures, [_describe(row) for row in shared[:EXAMPLES]])


def _describe(row: Row) -> str:
    if not row["history_items"]:
        return _short(row["prompt"])
    titles = row["history"] or row["history_items"]
    return f"user {row['user']}, history {_short(', '.join(titles))}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _future_items(rows: Mapping[str, Sequence[Row]], events: pd.DataFrame | None) -> Finding:
    """History items that the user had not taken strictly before the request, and targets in their own history."""
    check = "future items in histories"
    every = [row for split in rows.values() for row in split]
    again = _taken_again(events)
    own = [
        row
        for row in every
        if (row["positive_item"] or row["positive"]) in row["history_items"]
        and (row["user"], row["positive_item"]) not in again
    ]
    figures = {"target_in_own_history": len(own)}
    examples = [f"{row['positive']!r} in the history of user {row['user']}" for row in own[:EXAMPLES]]
    text = f"{len(own)} of {len(every)} rows hold their target in the history"
    if events is None:
        untimed = "; the rows have no times, so later items cannot be found."
        return Finding(check, "leak" if own else "not checked", text + untimed, figures, examples)
    late = _late_history(every, events)
    examples += [f"{item!r} in the history of user {user} at {time}" for user, item, time in late[:EXAMPLES]]
    text += f"; {len(late)} history items were taken at the time of the request or after it, or never."
    return Finding(check, "leak" if own or late else "ok", text, figures | {"late_items": len(late)}, examples)


def _taken_again(events: pd.DataFrame | None) -> set[tuple[str, str]]:
    """(user, item) that stand in the log more than once, as with ``data.repeats=keep``."""
    if events is None:
        return set()
    again = events.loc[events.duplicated(["user", "item"]), ["user", "item"]]
    return set(again.itertuples(index=False, name=None))


def _late_history(rows: Sequence[Row], events: pd.DataFrame) -> list[tuple[str, str, int]]:
    """(user, item, request time) of history items that the user had not taken before the request."""
    history = pd.DataFrame(
        [(row["user"], item, row["timestamp"]) for row in rows for item in row["history_items"]],
        columns=["user", "item", "asked"],
    )
    users = events["user"].isin(history["user"].unique())
    # The first time each user took each item; a left join keeps history items that the log does not have at all.
    taken = events.loc[users].groupby(["user", "item"], as_index=False)["timestamp"].min()
    merged = history.merge(taken, on=["user", "item"], how="left")
    late = merged[~(merged["timestamp"] < merged["asked"])]  # NaN < time is False: items without a time are late, too
    return list(late[["user", "item", "asked"]].itertuples(index=False, name=None))


def _trained_on_the_future(rows: Mapping[str, Sequence[Row]], timed: bool, leave_one_out: bool) -> Finding:
    """Requests that are earlier than some training request; with leave-one-out most of them are."""
    check = "training after requests"
    evaluated = _evaluated(rows)
    if not evaluated or not rows["train"]:
        return _no_evaluation(check)
    if not timed:
        return Finding(check, "not checked", "The rows have no times.")
    asked = np.array([row["timestamp"] for row in evaluated])
    trained = np.array([row["timestamp"] for row in rows["train"]])
    early = int((asked <= trained.max()).sum())
    future = int((trained >= asked.min()).sum())
    text = (
        f"{early} of {len(asked)} validation and test requests are not later than all of training, and {future} of "
        f"{len(trained)} training rows know events from after the first of these requests."
    )
    figures = {"requests_before_training_ends": early, "training_rows_in_the_future": future}
    if leave_one_out:
        text += " That is how leave-one-out works; do not compare with figures of a time split."
    return Finding(check, "ok" if not early else "warning" if leave_one_out else "leak", text, figures)


def _titles(rows: Sequence[Row]) -> set[str]:
    return {title for row in rows for title in (*row["history"], row["positive"], *row["negatives"])}


def _title_formats(rows: Mapping[str, Sequence[Row]]) -> Finding:
    """Titles that are written in one way in training and in another in evaluation."""
    check = "titles written differently"
    evaluated = _evaluated(rows)
    if not evaluated:
        return _no_evaluation(check)
    forms = {name: defaultdict(set) for name in ("train", "evaluation")}  # part -> canonical title -> its spellings
    for name, part in (("train", rows["train"]), ("evaluation", evaluated)):
        for title in _titles(part):
            forms[name][canonical(title)].add(title)
    both = sorted(forms["train"].keys() & forms["evaluation"].keys())
    differs = [key for key in both if not forms["train"][key] & forms["evaluation"][key]]
    examples = [f"{min(forms['train'][k])!r} and {min(forms['evaluation'][k])!r}" for k in differs[:EXAMPLES]]
    text = f"{len(differs)} of {len(both)} titles in training and evaluation are written differently there."
    verdict: Verdict = "ok" if not differs else "leak" if len(differs) > TOLERATED * len(both) else "warning"
    return Finding(check, verdict, text, {"titles": len(differs), "of": len(both)}, examples)


def _title_styles(rows: Mapping[str, Sequence[Row]]) -> Finding:
    """A style of writing that tells the titles of one split from another's, or targets from negatives."""
    check = "style of titles"
    evaluated = _evaluated(rows)
    if not evaluated:
        return _no_evaluation(check)
    pairs = [
        ("training", sorted(_titles(rows["train"])), "evaluation", sorted(_titles(evaluated))),
        *(
            (f"{name} targets", [r["positive"] for r in part], "negatives", [n for r in part for n in r["negatives"]])
            for name, part in (("training", rows["train"]), ("evaluation", evaluated))
        ),
    ]
    gaps = []
    for one, titles, other, other_titles in pairs:
        if min(len(titles), len(other_titles)) < ENOUGH:
            continue
        for style, has in STYLES.items():
            a, b = (float(np.mean([has(title) for title in part])) for part in (titles, other_titles))
            if abs(a - b) > STYLE_GAP:
                gaps.append(f"{style}: {a:.0%} of {one}, {b:.0%} of {other}")
    text = f"{len(gaps)} styles tell splits or targets apart{': ' + '; '.join(gaps) if gaps else ''}."
    return Finding(check, "leak" if gaps else "ok", text, {"gaps": gaps})


def _duplicate_titles(rows: Mapping[str, Sequence[Row]]) -> Finding:
    """Requests whose target is also among their negatives, and titles equal up to case, HTML and punctuation."""
    check = "duplicate titles"
    every = [row for split in rows.values() for row in split]
    names: dict[str, str] = {title: canonical(title) for title in _titles(every)}
    twice = [row for row in every if names[row["positive"]] in {names[title] for title in row["negatives"]}]
    forms = Counter(names.values())
    alike = sorted(title for title, name in names.items() if forms[name] > 1)
    text = (
        f"{len(twice)} of {len(every)} rows have the target a second time among the negatives; {len(alike)} of "
        f"{len(names)} titles equal another one up to case, HTML and punctuation."
    )
    verdict: Verdict = "leak" if len(twice) > TOLERATED * len(every) else "warning" if twice or alike else "ok"
    figures = {"rows_with_the_target_twice": len(twice), "titles_alike": len(alike)}
    return Finding(check, verdict, text, figures, [repr(title) for title in alike[:EXAMPLES]])


def _positions(shown_at: Mapping[str, Mapping[str, Sequence[int]]] | None, in_prompt: bool) -> Finding:
    """Whether the target's position among the candidates that the source lists tells which one it is."""
    check = "position of the target"
    if not shown_at:
        return Finding(
            check, "ok" if not in_prompt else "not checked", "Prompts list no candidates that could be found."
        )
    uneven, parts = [], []
    for split, by_size in shown_at.items():
        for counts in by_size.values():
            shares = ", ".join(f"{count / sum(counts):.0%}" for count in counts)
            parts.append(f"{split} {shares} of {sum(counts)}")
            # Null hypothesis: the target was put at each position with equal probability.
            if sum(counts) >= ENOUGH and float(chisquare(counts).pvalue) < UNLIKELY:
                uneven.append(split)
    text = f"The target's position among the listed candidates: {'; '.join(parts)}."
    if uneven and not in_prompt:
        text += " The prompts of this data list no candidates, so no model sees it."
    verdict: Verdict = "ok" if not uneven else "leak" if in_prompt else "warning"
    return Finding(check, verdict, text, {split: dict(by_size) for split, by_size in shown_at.items()})
