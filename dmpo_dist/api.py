"""dmpo_dist from Python: prepare a log, train, rank and evaluate, without YAML and without a cluster.

Each function does what the command of its name does, and takes any key of the configuration by its dotted name in
``settings``, such as ``{"train.learning_rate": 1e-5}`` (``dmpo config show --all`` lists them).
"""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import pandas as pd
from rich.console import Console

from dmpo_dist.artifacts.evaluation import Evaluation
from dmpo_dist.config import RunConfig, config_of
from dmpo_dist.config.section import at_home, dotted
from dmpo_dist.data.prepare import prepare as prepare_groups
from dmpo_dist.data.store import PreparedData
from dmpo_dist.data.tables import require_once
from dmpo_dist.data.template import make_template
from dmpo_dist.errors import UserError
from dmpo_dist.evaluation.ranking import load_ranking_model
from dmpo_dist.modeling.backbone import enforce_template, find_model, unlike_training, with_length_of
from dmpo_dist.modeling.ranking_model import RankingModel
from dmpo_dist.parsing import parsing
from dmpo_dist.quiet import silence_libraries

Settings = Mapping[str, Any]
ARGUMENTS = {
    "objective.name": "objective", "model.path": "model", "data.path": "data", "output_dir": "folder",
    "data.source.path": "log", "data.source.items_path": "titles", "data.source.users_path": "users",
}  # fmt: skip
"""Key -> argument, where it has another name than the last part of the key."""


def prepare(
    log: pd.DataFrame | str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    titles: pd.DataFrame | str | Path | None = None,
    titles_columns: Mapping[str, str] | None = None,
    users: pd.DataFrame | str | Path | None = None,
    users_columns: Mapping[str, str] | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    settings: Settings | None = None,
) -> PreparedData:
    """Make preference groups from an interaction log: requests split by time, with negatives, checked for leaks.

    Args:
        log: a data frame or a file (CSV, JSON lines, Parquet) with a row per interaction, or a folder that
            ``data.source.kind`` knows (MovieLens, Amazon, RecBole). A log without ratings holds likes.
        columns: our column -> yours, of user, item, rating, timestamp (seconds or dates), title, genres; further names,
            as {"description": "text"}, keep that text of each item for prompts.
        titles: a second data frame or file with item and title, where the log has no titles.
        titles_columns: the same for ``titles``, where its columns have other names.
        users, users_columns: a data frame or file with a row per user, and which of its fields to keep for prompts.
        folder: where the groups are kept; None is the first free one of runs/data, runs/data-2, ...
        seed: of the negatives.
        settings: further keys, such as ``{"data.split": "leave_one_out"}``.

    Returns:
        The groups of ``train``, ``validation`` and ``test``; ``.card`` says what was dropped and why.

    Raises:
        UserError: a malformed log, no group left, or a leak; see ``dmpo data prepare``.

    Example:
        >>> columns = {"user": "customer", "item": "sku", "timestamp": "time", "title": "name"}
        >>> data = dmpo.prepare(frame, columns=columns)
    """
    tables = {"path": ("log", log), "items_path": ("titles", titles), "users_path": ("users", users)}
    frames = [name for name, table in tables.values() if isinstance(table, pd.DataFrame)]
    with TemporaryDirectory(prefix="dmpo-") as scratch, _as_called(Path(scratch), frames):
        names = {"columns": columns, "items_columns": titles_columns, "users_columns": users_columns}
        given: dict[str, Any] = {f"data.source.{key}": dict(value or {}) for key, value in names.items()}
        for key, (name, table) in tables.items():
            if table is not None:
                given[f"data.source.{key}"] = _as_file(table, Path(scratch) / f"{name}.parquet")
        if isinstance(log, pd.DataFrame):
            given["data.source.kind"] = "parquet"
        usual = {"seed": 0} | {f"data.source.{key}": None for key in tables}
        config = config_of(_with_settings({"seed": seed} | given, usual, settings))
        return prepare_groups(config.data, config.seed, _free_folder(folder, "data"))


def train(
    data: PreparedData,
    model: str | Path | RankingModel = "scratch",
    *,
    stage: Literal["sft", "preference"] = "preference",
    objective: str = "dmpo",
    negatives: int = 7,
    shots: int | None = None,
    workers: int = 1,
    folder: str | Path | None = None,
    seed: int = 0,
    settings: Settings | None = None,
) -> RankingModel:
    """Fine-tune a model on prepared groups.

    One worker trains in this process. Ray starts the workers where there are several, where ``RAY_ADDRESS`` or
    ``cluster.address`` names a cluster, and where this process is connected to one already.

    Args:
        data: what ``prepare`` returned.
        model: a hub id, a model folder, what an earlier ``train`` returned, or "scratch" (a small random model).
        stage: "sft" for the likelihood of the positive, "preference" for ``objective``.
        objective: dmpo, sdpo, dpo_pairs, dmpo_released, ipo, simpo, recpo, mult_dpo, plackett_luce or rank_reward
            (which needs ``train.on_policy``); options go into ``settings``, as ``{"objective.beta": 0.1}``.
        negatives: K of a group in each step (preference stage).
        shots: train on this many groups; None takes all.
        workers: ranks of the run.
        folder: for model, log and checkpoints; None is the first free one of runs/sft, runs/dmpo, ...
        seed: of new weights and of the order of groups.
        settings: further keys, such as ``{"model.lora": {"r": 16}, "train.learning_rate": 1e-5, "train.epochs": 3}``.

    Returns:
        The trained model; ``.source.path`` is its folder.

    Raises:
        UserError: see ``dmpo train``.

    Example:
        >>> sft = dmpo.train(data, "Qwen/Qwen3-0.6B", stage="sft", shots=100, settings={"model.lora": {}})
        >>> model = dmpo.train(data, sft, objective="dmpo", negatives=7, workers=2)
    """
    from dmpo_dist.commands.train import run_stage
    from dmpo_dist.training.engine import single_rank

    silence_libraries()
    _require_prepared(data, "train")
    if stage not in ("sft", "preference"):
        raise UserError(f"stage={stage!r}: there is no such stage; give 'sft' or 'preference'")
    start = model.scored_source.path if isinstance(model, RankingModel) else str(model)
    given = {"data.shots": shots, "seed": seed, "cluster.workers": workers, "model.path": start}
    usual: dict[str, Any] = {"data.shots": None, "seed": 0, "cluster.workers": 1, "model.path": "scratch"}
    usual |= {"objective.name": "dmpo", "train.negatives": 7}
    of_preferences = {"objective.name": objective, "train.negatives": negatives}
    if stage == "sft" and of_preferences.items() - usual.items():
        raise UserError(
            f"objective={objective!r}, negatives={negatives}: have no effect on stage='sft'; leave them out"
        )
    given |= of_preferences if stage == "preference" else {}
    given = _with_settings(given, usual, settings)
    config = _run_config(data, folder, "sft" if stage == "sft" else objective, given)
    if start != "scratch":
        config = with_length_of([find_model(start)], config)
    _require_its_template(model, config, settings, "model")
    with nullcontext() if _needs_ray(config) else single_rank():
        folder_of_model = run_stage(stage, config, _console())
    named = {"objective.name": objective} if stage == "preference" else {}  # settings may hold options of its own
    return load(folder_of_model, settings=named | dict(settings or {}))


def load(path: str | Path, *, settings: Settings | None = None) -> RankingModel:
    """A trained model, or any causal language model, that scores and ranks titles.

    Args:
        path: a model folder (a whole model or an adapter) or a hub id.
        settings: keys of ``model`` and ``template``, such as ``{"model.dtype": "bfloat16"}``.

    Raises:
        UserError: no such model, a damaged file, or another template than the model was trained with.

    Warns:
        UserWarning: the model was trained in 4 bits, or with another context, and is not used so.

    Example:
        >>> dmpo.load("runs/dmpo/model").rank(history=["Heat", "Alien"], candidates=["Up", "Aliens"])
    """
    source = find_model(str(path))
    config = with_length_of([source], config_of(dict(settings or {})))
    for difference in unlike_training(source, config.model):
        warnings.warn(f"{path} was trained with {difference}", stacklevel=2)
    return load_ranking_model(str(path), config)


def evaluate(
    data: PreparedData,
    models: Mapping[str, str | Path | RankingModel],
    *,
    baselines: Sequence[str] = ("random", "popularity", "item_knn"),
    against: Sequence[str] = (),
    folder: str | Path | None = None,
    seed: int = 0,
    settings: Settings | None = None,
) -> Evaluation:
    """Rank the test requests with models and baselines on the same candidates, with 95 % intervals over users.

    Args:
        data: what ``prepare`` returned.
        models: name in the table -> trained model, model folder or hub id.
        baselines: names of ``evaluation.baselines``.
        against: names that all others are compared with, paired by user; none compares dmpo with all others.
        folder: for evaluation.json, evaluation.md and scores.parquet; None is the first free runs/evaluation-N.
        seed: of the bootstrap and of the random baseline.
        settings: further keys, such as ``{"model.dtype": "bfloat16"}``.

    Returns:
        The figures: ``.models[name][metric].value``, ``.low``, ``.high``, and ``.comparisons``.

    Raises:
        UserError: see ``dmpo evaluate``.

    Example:
        >>> result = dmpo.evaluate(data, {"sft": sft, "dmpo": model})
        >>> result.models["dmpo"]["ndcg@10"].value
    """
    from dmpo_dist.commands.evaluate import evaluate as run
    from dmpo_dist.commands.train import open_run_folder

    silence_libraries()
    _require_prepared(data, "evaluate")
    if not isinstance(models, Mapping):
        raise UserError('models: give each model a name for the table, as in {"dmpo": model}')
    paths = {name: m.scored_source.path if isinstance(m, RankingModel) else str(m) for name, m in models.items()}
    usual = {"seed": 0, "evaluation.baselines": ["random", "popularity", "item_knn"]}
    given = _with_settings({"seed": seed, "evaluation.baselines": list(baselines)}, usual, settings)
    config = _run_config(data, folder, "evaluation", given)
    config = with_length_of([find_model(path) for path in paths.values()], config)
    for name, model in models.items():
        _require_its_template(model, config, settings, name)
    open_run_folder(config, "evaluate", resume=False)
    return run(paths, config, config.output_dir, _console(), against=list(against))


def _require_prepared(data: object, function: str) -> None:
    if not isinstance(data, PreparedData):
        raise UserError(
            f"{function}: its data is {data!r:.60}; give what dmpo_dist.prepare returned, or open its folder again by "
            "dmpo_dist.data.store.PreparedData.load(folder)"
        )


def _with_settings(given: Settings, usual: Settings, settings: Settings | None) -> dict[str, Any]:
    """What the arguments of a call ``given`` by key, and its ``settings``, which win over the ``usual`` arguments.

    Raises:
        UserError: another argument than the usual one says otherwise than ``settings``.
    """
    said = dotted(settings or {})
    for key in (key for key in usual if key in given and key in said):
        if str(given[key]) not in (str(usual[key]), str(said[key])):  # a path may be a text
            name = ARGUMENTS.get(key) or key.rpartition(".")[2]
            raise UserError(f"{key}: settings say {said[key]!r}, the call says {given[key]!r} ({name}); leave one out")
    return {**given, **(settings or {})}


def _console() -> Console:
    """Plain lines: a notebook shows no live display without a widget library."""
    return Console(force_jupyter=False, force_terminal=False, width=120, markup=False)


def _run_config(data: PreparedData, folder: str | Path | None, name: str, given: Settings) -> RunConfig:
    few = len(data.train) if len(data.train) < data.card.counts["train"] else None  # after ``data.few``
    given, fixed = dict(given), {"data.path": data.path} | ({} if folder is None else {"output_dir": folder})
    _with_settings(fixed, dict.fromkeys(fixed), given)
    if few is not None and given.get("data.shots") is None:
        given |= {"data.shots": few, "data.shots_seed": data.shots_seed, "data.shots_skip": data.shots_skip}
    return config_of({"data.path": data.path, "output_dir": _free_folder(folder, name)} | given)


def _require_its_template(
    model: str | Path | RankingModel, config: RunConfig, settings: Settings | None, called: str
) -> None:
    """Raise UserError where ``model`` was loaded with a template of its own: what goes on from here is its path alone.

    A template in ``settings`` says what is meant.
    """
    if not isinstance(model, RankingModel) or any(key.partition(".")[0] == "template" for key in settings or {}):
        return
    source = model.scored_source
    if make_template(enforce_template(source.stamp, config.template, source.path), model.tokenizer) != model.template:
        raise UserError(
            f"{called}: {source.path} was loaded with another template than would be used here; give its template keys "
            "in settings here as well, or load it without them"
        )


@contextmanager
def _as_called(scratch: Path, frames: Sequence[str]) -> Iterator[None]:
    """Errors name the arguments of ``prepare``, and neither the keys behind them nor our files of its data frames."""
    try:
        yield
    except UserError as error:
        text = re.sub(r"data\.source\.(\w*columns)\.(\w+)", r'\1["\2"]', str(error))
        text = text.replace("items_columns[", "titles_columns[").replace("data.source.items_path", "titles=...")
        for name in frames:
            text = text.replace(str(scratch / f"{name}.parquet"), f"the data frame {name}")
            text = re.sub(rf"(?<![\w/]){name}\.parquet", f"the data frame {name}", text)
        raise UserError(text) from None


def _as_file(table: pd.DataFrame | str | Path, file: Path) -> Path:
    """The path of ``table``; a data frame is written to ``file``."""
    if not isinstance(table, pd.DataFrame):
        return Path(at_home(table))
    require_once([str(name) for name in table.columns], "the data frame")
    with parsing("the data frame", "a column holds values of one type: see astype(str)"):
        table.to_parquet(file)
    return file


def _free_folder(folder: str | Path | None, name: str) -> Path:
    """``folder``, else the first of runs/name, runs/name-2, ... that does not exist."""
    if folder is not None:
        return Path(at_home(folder))
    first = Path("runs") / name
    others = (first.with_name(f"{name}-{number}") for number in range(2, 10_000))
    return next(path for path in (first, *others) if not path.exists())


def _needs_ray(config: RunConfig) -> bool:
    """Several workers, a cluster that is named, or one that this process has joined."""
    import os
    import sys

    ray = sys.modules.get("ray")
    joined = ray is not None and ray.is_initialized()
    return config.cluster.workers > 1 or bool(config.cluster.address or os.environ.get("RAY_ADDRESS")) or joined
