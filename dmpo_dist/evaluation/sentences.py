"""What an evaluation says beside its tables: whether orders mattered, and what models write by themselves."""

from typing import Any

from dmpo_dist.formats import number


def order_line(evaluation: dict[str, Any]) -> str | None:
    """How far scores moved when candidates or requests were put in another order; None if not measured."""
    order = evaluation.get("order")
    if not order or not order["models"]:
        return None
    worst = {
        kind: max(of_model[kind]["max_difference"] for of_model in order["models"].values())
        for kind in ("candidates", "packing")
    }
    return (
        f"{order['requests']} requests scored again: log-probs moved by at most {worst['candidates']:.1g} nats with "
        f"candidates in other orders, {worst['packing']:.1g} with requests packed otherwise"
    )


def generation_lines(evaluation: dict[str, Any]) -> list[str]:
    """HR@1 by generation beside HR@1 by log-prob, a line for each model; empty where nothing was generated."""
    found = evaluation.get("generation")
    if not found:
        return []
    return [
        f"{name} wrote a title for {found['requests']} requests: hr@1 {number(of_model['hr@1'])} by generation, "
        f"{number(of_model['hr@1 by log-prob'])} by log-prob; {of_model['valid']:.1%} of the texts are a candidate"
        for name, of_model in found["models"].items()
    ]
