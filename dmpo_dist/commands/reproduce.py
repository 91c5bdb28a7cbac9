"""`dmpo reproduce NAME`: a paper's protocol as a pinned recipe, and the paper's figure beside the one found here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from dmpo_dist.artifacts.evaluation import Evaluation
from dmpo_dist.artifacts.files import write_whole
from dmpo_dist.artifacts.locks import only_one
from dmpo_dist.artifacts.run_folder import failure_noted
from dmpo_dist.commands.evaluate import evaluate
from dmpo_dist.commands.quickstart import into, train_missing
from dmpo_dist.commands.run_folder import open_run_folder, require_no_data_path
from dmpo_dist.commands.train import say
from dmpo_dist.config import RunConfig
from dmpo_dist.config.section import dotted
from dmpo_dist.data.prepare import prepare
from dmpo_dist.errors import UserError
from dmpo_dist.formats import interval, metric_name, number

FILE = "reproduction.md"
NOT_OF_THE_PROTOCOL = (
    "output_dir", "data.path", "data.source.path", "data.source.items_path", "data.source.users_path", "cluster.",
    "submit.", "tracking.", "deepspeed",
)  # fmt: skip
"""Keys, or beginnings of keys, that say where and on how many machines something runs."""
ONE_WORDING = "one wording of the prompt in place of ten drawn at random"
OUR_LISTS = "histories and candidates end in a comma before the next words"
NO_DROPOUT = "no dropout in the adapters (the authors' 0.1)"
OTHER_NEGATIVES = "other negatives of the list in each epoch, where the authors draw them once"


@dataclass(frozen=True)
class Paper:
    """What a paper reports, and what is known to differ from its code.

    Attributes:
        figure: of ``metric`` on ``data`` with the paper's model; None where none was found.
        source: where the figure was read, and of whom; a figure that another paper or a reader quotes says so.
        data: which data it is of, and in what form ``data.source.path`` must hold it.
        differs: what the recipe does otherwise, whatever the settings.
        catalogue: whether ``metric`` is of the target among all titles of the catalogue.
    """

    title: str
    arxiv: str
    metric: Literal["hr@1", "pooled_auc", "ndcg@10"]
    figure: float | None
    source: str
    data: str
    differs: tuple[str, ...]
    catalogue: bool = False


LASTFM = (
    "LastFM with 20 candidates: a folder with train, validation and test in JSON, as lastfm-sft-cans20 of the authors, "
    "whose files are to be named train.json, validation.json and test.json"
)
PAPERS = {
    "sdpo": Paper(
        "S-DPO",
        "2406.09215",
        "hr@1",
        0.645,
        "with 3 negatives, not read in the paper: a user quotes it in issue 8 of the authors' repository, without "
        "naming metric or data, and finds 0.53 himself; DynamicPO's authors report 0.6617 on LastFM with 15 negatives",
        LASTFM,
        (
            ONE_WORDING,
            OUR_LISTS,
            NO_DROPOUT,
            OTHER_NEGATIVES,
            "the weights of the best NDCG@10 on validation, where the authors keep those of the lowest loss",
            "3 negatives, where the paper's main results take 3 or 5, whichever is better",
        ),
    ),
    "dynamicpo": Paper(
        "DynamicPO on DMPO",
        "2605.00327",
        "hr@1",
        0.6661,
        "README of the authors' repository, Llama-2-7B; DMPO alone has 0.5848 there",
        LASTFM,
        (
            ONE_WORDING,
            OUR_LISTS,
            NO_DROPOUT,
            OTHER_NEGATIVES,
            "the hardest negatives where the authors cluster log-probs by k-means",
            "the last weights, where the authors evaluate a checkpoint of their choice and do not say which",
        ),
    ),
    "dmpo": Paper(
        "DMPO",
        "2405.16127",
        "pooled_auc",
        None,
        "the paper reports AUC on Llama-2-7B in tables that were not at hand; the authors' repository holds no figure",
        "Amazon Video Games: the folder of the files that the authors released",
        (
            "SFT on the better orders of the preference rows in place of the authors' 100 SFT rows",
            "15 of the 100 training histories are also in the evaluation file, which the leak check says",
            "the AUC of both orders of every request, where the authors' auc.ipynb draws one of the two for each",
            "the Games files, where the authors' run.sh names the Movies files",
        ),
    ),
    "minionerec": Paper(
        "MiniOneRec",
        "2510.24431",
        "ndcg@10",
        0.1242,
        "its table 1, Office, as quoted by notes of a reimplementation, which finds 0.1271 for the authors' checkpoint "
        "with 16 beams; HR@3, @5 and @10 are 0.1217, 0.1420 and 0.1634; the size of the model was not found",
        "Amazon Office Products (2018): interactions.csv with user, item and timestamp, and the titles in "
        "data.source.items_path; split by time at the periods of their published rows",
        (
            "titles in place of their semantic ids, and no tasks that translate between the two",
            "one exact ranking of all titles in place of 50 beams",
            "a training period of which the published rows hold only the users that were active later",
            "rank rewards as they are, where the authors' code divides the penalties by their sum",
            "SFT keeps the step of the best NDCG@10 of 10 epochs, where the authors stop early by the loss",
            "SFT warms up over 5 % of its steps, where the authors take 20 steps",
            "the reference stays the SFT model, where the authors move it along",
            "one test request of each user",
        ),
        catalogue=True,
    ),
}


def reproduce(name: str, config: RunConfig, recipe: RunConfig, console: Console, resume: bool = False) -> list[str]:
    """Prepare, train and evaluate by ``config`` into its ``output_dir``; returns the lines of the comparison.

    Args:
        name: a key of ``PAPERS``.
        recipe: the protocol as it is pinned, without what the user changed.
        resume: go on in the folder of an interrupted one.

    Raises:
        UserError: no data, a folder that exists, or see ``prepare``, ``run_stage`` and ``evaluate``.
    """
    paper, output = PAPERS[name], config.output_dir.absolute()
    if config.data.source.path is None:
        raise UserError(f"data.source.path is not set; `dmpo reproduce {name}` needs {paper.data}")
    require_no_data_path(config, "reproduce")
    open_run_folder(config, f"reproduce {name}", resume)
    with only_one(output), failure_noted(output):  # so that the command can be typed again with other settings
        say(console, f"1/4 data: {paper.data}")
        if not (output / "data").exists():  # it appears whole
            prepare(config.data, config.seed, output / "data", console.print, allow_leaks=True)
        config = config.model_copy(update={"data": config.data.model_copy(update={"path": output / "data"})})
        sft, model = output / "sft" / "model", output / name / "model"
        train_missing(
            [
                ("2/4 SFT", "sft", into(config, output / "sft", config.model.path)),
                (f"3/4 {paper.title}", "preference", into(config, output / name, str(sft))),
            ],
            console,
        )
        say(console, "4/4 evaluation")
        evaluation = evaluate({"sft": str(sft), name: str(model)}, config, output, console, catalogue=paper.catalogue)
        lines = comparison(name, evaluation, str(config.data.source.path), changed_keys(config, recipe))
        write_whole(output / FILE, "\n".join([f"# {lines[0]}", "", *(f"- {line}" for line in lines[1:]), ""]))
    for line in lines:
        console.print(line, highlight=False)
    return lines


def comparison(name: str, evaluation: Evaluation, data: str, changed: list[str]) -> list[str]:
    """The paper's figure, the one found here with its interval and valid ratio, and what differs.

    Args:
        data: what the requests here come from.
        changed: see ``changed_keys``.
    """
    paper = PAPERS[name]
    among = evaluation.catalogue if paper.catalogue else evaluation
    assert among is not None  # the recipe asks for it
    entry = next(row for row in among.models if row == name or row.startswith(f"{name}, "))  # exact, or by beams alone
    found = among.models[entry][paper.metric]
    of_all = f" among all {evaluation.catalogue.items} titles" if paper.catalogue and evaluation.catalogue else ""
    paper_says = "no figure found" if paper.figure is None else number(paper.figure)
    lines = [
        f"{paper.title} (arXiv {paper.arxiv}): {metric_name(paper.metric)}",
        f"paper: {paper_says} ({paper.source})",
        f"here: {number(found.value)} {interval(found.low, found.high)} by log-prob{entry.removeprefix(name)}{of_all} "
        f"on {evaluation.requests} requests of {data}",
    ]
    if evaluation.generation is not None:
        written = evaluation.generation.models[name]
        lines.append(
            f"here, by what the model writes: {number(written.hr)}; valid ratio {number(written.valid)}, on "
            f"{evaluation.generation.requests} requests"
        )
    return [*lines, *(f"differs: {text}" for text in (*changed, *paper.differs))]


def changed_keys(config: RunConfig, recipe: RunConfig) -> list[str]:
    """The settings of ``config`` that are not the protocol's, each with what it is there."""
    here, there = _flat(config), _flat(recipe)
    return [
        f"{key}={here.get(key)} (protocol: {there.get(key)})"
        for key in sorted(here.keys() | there.keys())
        if here.get(key) != there.get(key) and not key.startswith(NOT_OF_THE_PROTOCOL)
    ]


def _flat(config: RunConfig) -> dict[str, Any]:
    return dotted(config.model_dump(mode="json"))


def recipe_of(name: str) -> Path:
    """The name of the recipe of a paper, as ``-c`` takes it.

    Raises:
        UserError: no such paper.
    """
    if name not in PAPERS:
        raise UserError(f"{name}: no paper of that name; `dmpo reproduce` knows {', '.join(PAPERS)}")
    return Path(f"reproduce_{name}")
