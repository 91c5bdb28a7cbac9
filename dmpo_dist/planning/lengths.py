"""The lengths of prompts and responses as the training groups of prepared data have them."""

import numpy as np

from dmpo_dist.config import RunConfig
from dmpo_dist.data.store import PreparedData, texts_of_data
from dmpo_dist.data.template import make_template
from dmpo_dist.data.tokenization import GroupTokenizer, tokenize_rows
from dmpo_dist.errors import UserError
from dmpo_dist.modeling.backbone import enforce_template, find_model, load_tokenizer
from dmpo_dist.planning.model import SCRATCH
from dmpo_dist.planning.plan import Lengths
from dmpo_dist.training.job import Job, Kind

COUNTED = 512
"""Training groups that are counted, where there are more, spread over all of them."""


def data_lengths(config: RunConfig, kind: Kind) -> Lengths | None:
    """Mean lengths over the training groups in ``data.path``, rounded up.

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
    data = PreparedData.load(config.data.path, config.data.shots, config.data.shots_seed)
    template = enforce_template(source.stamp, config.template, config.model.path)
    encode = GroupTokenizer(
        tokenizer, make_template(template, tokenizer), config.model.max_length,
        Job(kind, config, config.model.path, config.output_dir).loss.scores_history, seed=config.seed,
        texts=texts_of_data(template, data),
    )  # fmt: skip
    chosen = np.unique(np.linspace(0, len(data.train) - 1, min(COUNTED, len(data.train)), dtype=int))
    groups = tokenize_rows(data.train.select(chosen), encode, negatives=0 if kind == "sft" else None)
    prompts = np.array([len(group.prefix) for group in groups])
    responses = [np.array([len(branch) for branch in group.branches]) for group in groups]
    return Lengths(
        prompt=int(np.ceil(prompts.mean())),
        response=max(2, int(np.ceil(np.concatenate(responses).mean()))),
        groups=len(data.train),
        history=int(np.ceil(np.mean([len(group.prefix_scored) for group in groups]))),
        longest=int(max(prompt + found.max() for prompt, found in zip(prompts, responses, strict=True))),
        counted=len(groups),
    )
