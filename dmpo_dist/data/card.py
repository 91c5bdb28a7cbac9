"""The data card: the content of ``dataset.json`` as Markdown for people."""

from typing import Any

import pandas as pd
import yaml

from dmpo_dist.artifacts.dataset import DatasetCard
from dmpo_dist.data.leaks import findings_table
from dmpo_dist.data.splits import SPLITS


def moment(timestamp: int) -> dict[str, Any]:
    """A cut in time as a timestamp for programs and as a UTC date for people."""
    return {"timestamp": timestamp, "utc": pd.Timestamp(timestamp, unit="s").isoformat() + "Z"}


def summary(card: DatasetCard) -> str:
    """One line for the terminal: name, groups and users."""
    counts, users = card.counts, card.users
    return (
        f"{card.name}: {counts['train']} training groups of {users['train']} users; users to evaluate: "
        f"{users['validation']} validation, {users['test']} test"
    )


def data_card(card: DatasetCard) -> str:
    """The content of ``dataset.json`` as Markdown for people."""
    config = card.config
    everything = config.get("evaluation_candidates") == "all"
    lines = [f"# {card.name}", "", "| split | groups | users | dropped likes |", "|---|---|---|---|"]
    for split in SPLITS:
        drops = ", ".join(f"{n} {reason}" for reason, n in card.dropped[split].items() if n) or "-"
        lines.append(f"| {split} | {card.counts[split]} | {card.users[split]} | {drops} |")
    if card.interactions:
        split = "Leave-one-out: each user's last like is for testing, the one before for validation"
        if card.cuts:
            cuts = [card.cuts[name].utc for name in ("validation", "test")]
            split = f"Split by global time: validation from {cuts[0]}, test from {cuts[1]}"
        lines += [
            "",
            f"{split}. A request is a like (rating >= {config['rating_threshold']:g}) with at "
            f"least {config['min_history']} earlier likes; its history is the latest {config['max_history']} of them, "
            "all strictly before it.",
            "",
            f"Training negatives: {config['negatives_per_group']} per group, {config['negatives']}, among items seen "
            f"by anybody before the request. Evaluation: {config['evaluation_negatives']} per group, uniform among "
            f"{'all items of the log' if everything else 'such items'} the user never took, neither before nor after.",
            "",
            "Dropped likes: `short_history` too few earlier likes; `unseen_positive` nobody took the item before; "
            "`over_limit` the user has enough requests; `few_candidates` too few items to draw negatives from; "
            "`over_max_validation_users`, `over_max_test_users` not in the sample; `same_moment` liked in the second "
            "of a held-out like, so that its history would be the same.",
        ]
    if card.leaks:
        lines += ["", *findings_table(card.leaks)]
    if card.notes:
        lines += ["", *(f"- {note}" for note in card.notes)]
    lines += ["", f"Fingerprint: `{card.fingerprint}` (seed {card.seed}).", ""]
    lines += ["```yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True).rstrip(), "```", ""]
    return "\n".join(lines)
