"""The lengths of prompts and responses as the training groups of prepared data have them."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dmpo_dist.config import RunConfig
from dmpo_dist.data.store import PreparedData, texts_of_data
from dmpo_dist.data.template import make_template
from dmpo_dist.data.tokenization import GroupTokenizer, TokenGroup, tokenize_rows
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.backbone import enforce_template, find_model, load_tokenizer
from dmpo_dist.planning.model import SCRATCH
from dmpo_dist.planning.plan import Lengths
from dmpo_dist.training.groups import with_negatives
from dmpo_dist.training.job import Job, Kind
from dmpo_dist.training.listed import listed_groups

COUNTED = 512
"""Training groups that are counted, where there are more, spread over all of them."""


def data_lengths(config: RunConfig, kind: Kind) -> Lengths | None:
    """Mean lengths over the training groups in ``data.path``, and the responses of a step, rounded up.

    None where there is no data, no tokenizer on this machine (a hub id that is not in the cache), or one that training
    is yet to make (``model.path=scratch``).
    """
    if config.data.path is None or not config.data.path.exists() or config.model.path == SCRATCH:
        return None
    try:
        source = find_model(config.model.path)
        tokenizer = load_tokenizer(source)
    except UserError:
        return None
    data = PreparedData.for_training(config.data)
    template = enforce_template(source.stamp, config.template, config.model.path)
    job = Job(kind, config.model_copy(update={"template": template}), config.model.path, config.output_dir)
    encode = GroupTokenizer(
        tokenizer, make_template(template, tokenizer), config.model.max_length, job.loss.scores_history,
        seed=config.seed, texts=texts_of_data(template, data),
    )  # fmt: skip
    chosen = np.unique(np.linspace(0, len(data.train) - 1, min(COUNTED, len(data.train)), dtype=int))
    groups = _groups(job, replace(data, train=data.train.select(chosen)), encode)
    prompts = np.array([len(group.prefix) for group in groups])
    responses = [np.array([len(branch) for branch in group.branches]) for group in groups]
    return Lengths(
        prompt=int(np.ceil(prompts.mean())),
        response=max(2, int(np.ceil(np.concatenate(responses).mean()))),
        groups=len(data.train),
        history=int(np.ceil(np.mean([len(group.prefix_scored) for group in groups]))),
        longest=int(max(prompt + found.max() for prompt, found in zip(prompts, responses, strict=True))),
        counted=len(groups),
        stored=max(data.stored_negatives()),
        others=_others(groups, config.train.negatives, data.ragged) if kind == "preference" else None,
    )


def _groups(job: Job, data: PreparedData, encode: GroupTokenizer) -> list[TokenGroup]:
    """The training groups as ``training.worker`` makes them for the first epoch."""
    if job.config.template.lists_candidates:
        listed = listed_groups(job, data, encode)
        return [listed(index, 0) for index in range(len(listed))]
    return tokenize_rows(data.train, encode, negatives=0 if job.kind == "sft" else None)


def _others(groups: Sequence[TokenGroup], negatives: int, ragged: bool) -> int | None:
    """Mean number of responses of a step beside the first, rounded up; None where each group has ``negatives``."""
    if not ragged and not any(group.levels for group in groups):
        return None
    return int(np.ceil(np.mean([len(with_negatives(group, negatives, 0).branches) - 1 for group in groups])))
