"""Explanations for a terminal and as JSON."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dmpo_dist.explanation.counterfactual import sentence
from dmpo_dist.explanation.explainer import Answer
from dmpo_dist.explanation.words import by_word, signed
from dmpo_dist.figures.explanations import area_verdicts, area_words

BAR = 16
"""Characters of the longest bar."""
SHOWN = 0.005
"""The smallest number that does not print as 0.00."""
FOR, AGAINST = "green", "red"


def to_json(answer: Answer) -> dict[str, Any]:
    """One entry of ``requests`` in explanations.json; history items that were cut off are named apart."""
    question, found = answer.question, answer.counterfactual
    assert question.item is not None
    seen_items, seen = question.history_items[answer.cut_off :], question.history[answer.cut_off :]
    rows = zip(seen_items, seen, answer.contributions.tolist(), answer.ranks_without.tolist(), strict=False)
    return {
        "user": question.user,
        "item": question.candidate_items[question.item],
        "title": question.candidates[question.item],
        "rank": answer.rank,
        "candidates": answer.ranked,
        "compared": len(question.candidates),
        "tokens": [
            {"text": text, "log_ratio": ratio}
            for text, ratio in zip(answer.words.pieces, answer.words.log_ratios.tolist(), strict=True)
        ],
        "others_log_ratio": answer.words.others,
        "history": [
            {"item": item, "title": title, "contribution": contribution, "rank_without": rank}
            for item, title, contribution, rank in rows
        ],
        "cut_off": list(question.history[: answer.cut_off]),
        "counterfactual": {
            "removed": [seen[index] for index in found.removed],
            "rank_before": found.rank_before,
            "rank_after": found.rank_after,
            "sentence": sentence(found, seen),
            "top": found.top,
        },
    }


def show(entry: dict[str, Any], reference: str | None, method: str, console: Console) -> None:
    """Print one entry of ``to_json`` so that no manual is needed."""
    console.print()
    console.print(
        f"Why is {entry['title']!r} at rank {entry['rank']} of {entry['candidates']} for user {entry['user']}?",
        style="bold",
        highlight=False,
        markup=False,
    )
    for note in notes(entry):
        console.print(note, highlight=False, markup=False)
    if entry["history"]:
        console.print(_history_table(entry, method))
    console.print(entry["counterfactual"]["sentence"], style="bold", highlight=False, markup=False)
    if entry["tokens"]:
        console.print(_words(entry, reference))


def notes(entry: dict[str, Any]) -> list[str]:
    """What a reader must know before the figures."""
    lines = []
    if entry["cut_off"]:
        named = ", ".join(map(repr, entry["cut_off"]))
        lines.append(
            f"The {len(entry['cut_off'])} oldest history items did not fit into model.max_length, so the model never "
            f"saw them and they have no contribution: {named}."
        )
    if len(entry["history"]) == 1:
        lines.append("The model saw one history item: its contribution is against a prompt without any history.")
    if not entry["history"]:
        lines.append("The model saw no history item that could be taken away and leave a prompt.")
    if entry["compared"] < entry["candidates"]:
        lines.append(
            f"With items left out it is compared with {entry['compared'] - 1} titles: all above it and the next below. "
            "One from further below could overtake it unseen; --rivals says how many, 0 all."
        )
    return lines


def _history_table(entry: dict[str, Any], method: str) -> Table:
    """The history, largest contribution first."""
    unit = "margin over the other candidates" if method == "margin" else "log-probability"
    table = Table(
        "history item", "effect", "", "rank without it", box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left",
        title=f"What each history item adds to the title's {unit} (in nats; + speaks for it)",
    )  # fmt: skip
    table.columns[1].justify = table.columns[3].justify = "right"
    largest = max(abs(row["contribution"]) for row in entry["history"]) or 1.0
    for row in sorted(entry["history"], key=lambda row: -row["contribution"]):
        amount = row["contribution"]
        colour = FOR if amount > 0 else AGAINST
        bar = Text("█" * round(BAR * abs(amount) / largest), style=colour)
        moved = row["rank_without"] - entry["rank"]
        rank = f"{row['rank_without']}" + (f" ({'down' if moved > 0 else 'up'} {abs(moved)})" if moved else "")
        table.add_row(Text(row["title"]), Text(format(amount, signed(largest)), style=colour), bar, rank)
    return table


def _words(entry: dict[str, Any], reference: str | None) -> Text:
    """What training did to the title against the other candidates, then to each of its words."""
    ratios, others = [token["log_ratio"] for token in entry["tokens"]], entry["others_log_ratio"]
    total = sum(ratios)
    if max(map(abs, [*ratios, others])) < SHOWN:
        return Text(f"Its log-probability is that of the reference ({reference}), as is that of the other candidates.")
    gained = "gained on" if total > others else "lost against"
    text = Text(
        f"Since the reference ({reference}) its log-probability changed by {total:+.2f}, that of the other candidates "
        f"by {others:+.2f} on average: it {gained} them. Word by word:\n"
    )
    for word, ratio in by_word((token["text"], token["log_ratio"]) for token in entry["tokens"]):
        text.append(word, style=f"bold {FOR if ratio > 0 else AGAINST}").append(f" {ratio:+.2f}  ", style="dim")
    return text


def show_faithfulness(result: dict[str, Any], console: Console) -> None:
    """The measured areas, in sentences."""
    console.print()
    console.print(
        Text("Do these contributions say what the model does?", style="bold"),
        f"{result['requests']} requests of "
        f"{result['users']} users, {result['random_orders']} random orders each; items taken away one after another; "
        f"mean distance between curves in nats, 95 % intervals over users.",
        highlight=False,
    )
    table = Table("items taken away", "area", "95 % interval", "users +/-", "sign test p", box=box.SIMPLE_HEAD,
                  pad_edge=False)  # fmt: skip
    for name, area in result["areas"].items():
        table.add_row(
            ", ".join(area_words(name)), f"{area['area']:+.3f}", f"{area['low']:+.3f} to {area['high']:+.3f}",
            f"{area['users_above']}/{area['users_below']}", f"{area['sign_test_p']:.2g}",
        )  # fmt: skip
    console.print(table)
    console.print(faithfulness_sentence(result["areas"]), style="bold", highlight=False, markup=False)


def faithfulness_sentence(areas: Mapping[str, Mapping[str, float]]) -> str:
    """What ``attribution_vs_random`` and ``inverse_vs_random`` show, by the rule of ``verdicts``; "" without both."""
    verdicts = area_verdicts(areas)
    if not {"attribution_vs_random", "inverse_vs_random"} <= verdicts.keys():
        return ""
    faster, slower = (verdicts[name].verdict for name in ("attribution_vs_random", "inverse_vs_random"))
    if faster == "ahead of" and slower == "behind":
        return "Faithful: the order of contributions pulls the title down faster than chance, and its inverse slower."
    if faster == "ahead of":
        return "Partly: the order of contributions pulls the title down faster than chance, but its inverse not slower."
    return "Not shown: the order of contributions does not pull the title down faster than a random order here."
