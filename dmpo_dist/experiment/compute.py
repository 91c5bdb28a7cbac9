"""SFT continued at equal compute: as many steps of SFT as cost what a cell's preference stage costs."""

import tempfile
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from dmpo_dist.commands.train import SCRATCH, make_start
from dmpo_dist.config import RunConfig
from dmpo_dist.data.store import PreparedData, texts_of_data
from dmpo_dist.data.template import make_template
from dmpo_dist.data.tokenization import GroupTokenizer, TokenGroup, tokenize_rows
from dmpo_dist.modeling.backbone import enforce_template, find_model, load_tokenizer
from dmpo_dist.objectives.registry import make_objective
from dmpo_dist.planning.command import with_length_of_start
from dmpo_dist.planning.compute import compute_factor
from dmpo_dist.planning.model import blueprint
from dmpo_dist.training.job import Job, Kind
from dmpo_dist.training.listed import listed_groups

COUNTED = 256
"""Groups whose tokens are counted, where there are more."""


def equal_compute(continued: RunConfig, cell: RunConfig) -> RunConfig:
    """``continued``, SFT for as many steps as the preference stage of ``cell``, with as many as cost the same FLOPs.

    Validation is not counted, and a reference that is cached counts as if it ran in every step.

    Raises:
        UserError: a model whose FLOPs cannot be counted, such as a mixture of experts, or a ``model.attention`` that
            would be wrong for it.
    """
    cell = with_length_of_start(cell)
    loss = make_objective(cell.objective)
    titles = continued.sft.loss_on == "all_titles"
    preference, sft_groups = _token_groups(_of_tokens(cell), titles or loss.scores_history)
    model = blueprint(cell.model)
    route = model.route(_on_gpus(cell), cell.model.max_length, cell.model.attention)
    factor = compute_factor(
        model.shape,
        preference,
        cell.train.negatives,
        sft_groups=sft_groups,
        reference=loss.needs_reference,
        history_in_preference=loss.scores_history,
        history_in_sft=titles,
        shared=route.backend != "unshared",
    )
    sft = continued.sft
    more = {"epochs": sft.epochs * factor} if sft.steps is None else {"steps": max(1, round(sft.steps * factor))}
    return continued.model_copy(update={"sft": sft.model_copy(update=more)})


def _on_gpus(config: RunConfig) -> bool:
    """Whether the cells are trained on GPUs: as ``cluster.gpus_per_worker`` says, else if this machine has one."""
    asked = config.cluster.gpus_per_worker
    return torch.cuda.is_available() if asked is None else asked > 0


def _of_tokens(config: RunConfig) -> str:
    """As JSON: what the tokens of the training groups depend on, so that cells which share it are counted once."""
    listed = {"train": {"negatives"}, "sft": {"negatives"}} if config.template.lists_candidates else {}
    groups = {"path", "shots", "shots_seed", "shots_skip"}
    return config.model_dump_json(include={"seed": True, "model": True, "template": True, "data": groups, **listed})


@lru_cache(maxsize=64)
def _token_groups(config_json: str, score_history: bool) -> tuple[list[TokenGroup], list[TokenGroup] | None]:
    """The first training groups as the preference stage reads them and, where it reads others, as SFT does.

    They are made as training makes them, by tokenizer and template of the model that SFT starts from.
    """
    config = RunConfig.model_validate_json(config_json)
    data = PreparedData.for_training(config.data)
    with tempfile.TemporaryDirectory(prefix="dmpo-tokenizer-") as folder:
        start = config.model.path
        if start == SCRATCH:
            start = str(Path(folder) / SCRATCH)
            make_start(Path(start), config, data)
        source = find_model(start)
        tokenizer = load_tokenizer(source)
    template = enforce_template(source.stamp, config.template, config.model.path)
    encode = GroupTokenizer(
        tokenizer, make_template(template, tokenizer), config.model.max_length, score_history, config.seed,
        texts=texts_of_data(template, data),
    )  # fmt: skip
    data = replace(data, train=data.train.select(range(min(COUNTED, len(data.train)))))
    if not template.lists_candidates:
        return tokenize_rows(data.train, encode), None
    stages: tuple[Kind, Kind] = ("preference", "sft")
    listed = [listed_groups(Job(kind, config, start, config.output_dir), data, encode) for kind in stages]
    preference, sft = ([groups(index, 0) for index in range(len(groups))] for groups in listed)
    return preference, sft
