"""HR@1 as papers measure it: what a model writes of its own accord, beside the title it gives the highest log-prob."""

from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from dmpo_dist.artifacts.evaluation import GeneratedFigures
from dmpo_dist.data.store import groups_from_rows
from dmpo_dist.evaluation.generation import generate_freely, valid_ratio
from dmpo_dist.evaluation.metrics import ranking_metrics
from dmpo_dist.modeling.ranking_model import RankingModel

ROOM = 4
"""Tokens that a text may be longer than the longest candidate of its request, before it is cut off."""


def generated_figures(
    model: RankingModel, rows: Dataset, scores: Sequence[np.ndarray], requests: int, seed: int
) -> GeneratedFigures:
    """Greedy texts after the prompts of some requests, held against their candidates letter by letter.

    Args:
        rows: the requests; scores: of all of them, (1+K,) each, the positive first.
        requests: how many to take, drawn by ``seed``.
    """
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(len(rows), min(requests, len(rows)), replace=False))
    groups = groups_from_rows(rows.select(chosen))
    fitted = [model.encode.fit(group) for group in groups]
    longest = max(len(ids) for one in fitted for ids in one.responses)
    prompts, template = [one.asked for one in fitted], model.template
    texts = generate_freely(model.load_weights().writer(), model.tokenizer, template, prompts, longest + ROOM)
    spaces = [one.prompt.text[len(one.asked) :] for one in fitted]  # which belong to the response
    texts = [text.removeprefix(before) for text, before in zip(texts, spaces, strict=True)]
    hits, valid = [], []
    for text, group, one in zip(texts, groups, fitted, strict=True):
        answers = [group.positive, *group.negatives]
        if group.prompt is not None:  # finished answers, which may hold a terminator
            responses = [template.complete(answer, one.prompt.templated) for answer in answers]
        else:
            responses = [template.render_response(answer) for answer in answers]
        hits.append(valid_ratio([text], responses[:1], template.terminator))
        valid.append(valid_ratio([text], responses, template.terminator))
    by_log_prob = ranking_metrics([np.asarray(scores[index]) for index in chosen])["hr@1"]
    return GeneratedFigures.model_validate(
        {"hr@1": np.mean(hits), "valid": np.mean(valid), "hr@1 by log-prob": by_log_prob.mean()}
    )
