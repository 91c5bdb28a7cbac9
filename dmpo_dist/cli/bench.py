"""`dmpo bench`."""

from pathlib import Path
from typing import Annotated

import typer

from dmpo_dist.cli.options import DryRun, Layers, Overrides, free_folder, read_settings

bench_app = typer.Typer(help="Measure speed and memory against the alternatives.", no_args_is_help=True)

WithoutTrl = Annotated[bool, typer.Option("--without-trl", help="Compare with our own separate rows alone.")]


@bench_app.command("speed")
def bench_speed(
    prompt: Annotated[list[int] | None, typer.Option(help="Prompt tokens; repeatable.  [64 256 1024]")] = None,
    negatives: Annotated[list[int] | None, typer.Option(help="Negatives K; repeatable.  [1 3 7 15]")] = None,
    vocab: Annotated[list[int] | None, typer.Option(help="Vocabulary; repeatable.  [4096 32000]")] = None,
    response: Annotated[int, typer.Option(help="Response tokens, end token included.")] = 12,
    rounds: Annotated[int, typer.Option(help="Turns of every contestant; medians over them are shown.")] = 5,
    groups_per_row: Annotated[
        int, typer.Option(help="Also time ours with that many groups in one row against a row each.")
    ] = 1,
    model_config: Annotated[
        Path | None, typer.Option(help="A config.json to make the model from, with random weights.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu (fp32) or cuda (bf16).")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 for torch's default.")] = 0,
    without_trl: WithoutTrl = False,
    json: Annotated[Path | None, typer.Option(help="Result file.  [runs/bench-speed/speed.json]")] = None,
    png: Annotated[Path | None, typer.Option(help="Chart.  [beside the result file]")] = None,
) -> None:
    """Ours, our separate rows and TRL's DPOTrainer on the same token ids: speed, memory and their FLOP ceilings.

    Examples:

        dmpo bench speed --prompt 256 --negatives 7 --vocab 4096

        dmpo bench speed --prompt 256 --negatives 7 --model-config Llama-3-8B/config.json --device cuda
    """
    from dmpo_dist.bench import report, settings, speed
    from dmpo_dist.orchestration.environment import describe_environment
    from dmpo_dist.orchestration.runlog import make_console

    asked = settings.make_settings(
        prompt or [], negatives or [], vocab or [], response, model_config, device, threads, rounds,
        not without_trl, groups_per_row,
    )  # fmt: skip
    json = json or free_folder(Path("runs/bench-speed")) / "speed.json"
    png = png or json.with_suffix(".png")
    settings.check_outputs(json, png)
    console = make_console()
    result = speed.run(asked, describe_environment(), console.print, lambda so_far: report.write_json(so_far, json))
    report.draw(result, png)
    report.show(result, console)
    print(f"written: {json} and {png}")


@bench_app.command("gate")
def bench_gate(
    baseline: Annotated[Path, typer.Option(help="What dmpo bench speed --json wrote.")],
    rounds: Annotated[int | None, typer.Option(min=1, help="Turns of every contestant.  [the baseline's]")] = None,
    without_trl: WithoutTrl = False,
    json: Annotated[Path | None, typer.Option(help="Also write the new figures there.")] = None,
) -> None:
    """Measure a baseline's cells again; exit 1 where memory grew by over 5 % or a ratio of speed fell by over 25 %.

    Examples:

        dmpo bench gate --baseline tests/benchmarks/speed_cpu.json
    """
    from dmpo_dist.bench import gate, report, settings, speed
    from dmpo_dist.orchestration.environment import describe_environment
    from dmpo_dist.orchestration.runlog import make_console

    before = gate.read_baseline(baseline)
    asked = settings.settings_of(before, rounds, not without_trl)
    if json:
        settings.check_outputs(json)
    console = make_console()
    result = speed.run(asked, describe_environment(), console.print)
    if json:
        report.write_json(result, json)
    report.show(result, console)
    lines = gate.violations(before, result)
    for line in lines:
        print(f"worse: {line}")
    if lines:
        raise typer.Exit(1)
    print(f"as good as {baseline} in all {len(asked.cells)} cells")


@bench_app.command("step")
def bench_step(
    config: Layers = None,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps in a block.")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="Blocks of each kind, in turn.")] = 5,
    dry_run: DryRun = False,
) -> None:
    """Show where the time of an optimizer step of `dmpo train` goes, and what the loop adds to the bare computation.

    Examples:

        dmpo bench step -c movielens data.path=runs/ml/data model.path=runs/ml/sft/model output_dir=runs/bench-step

        torchrun --nproc-per-node 2 -m dmpo_dist bench step -c movielens data.path=... model.path=... output_dir=...
    """
    settings = read_settings(config, overrides, dry_run)
    from dmpo_dist.bench.step import run_bench_step
    from dmpo_dist.orchestration.runlog import make_console

    run_bench_step(settings, steps, rounds, make_console())


@bench_app.command("catalogue")
def bench_catalogue(
    model: Annotated[str | None, typer.Option("--model", "-m", help="Model folder.  [a random Llama of 6 layers]")] = None,
    catalogue: Annotated[Path | None, typer.Option(help="As for dmpo rank.  [made-up titles]")] = None,
    titles: Annotated[int, typer.Option(min=1, help="Titles scored.")] = 1700,
    prompt: Annotated[int, typer.Option(min=1, help="Prompt tokens, at least.")] = 256,
    token_budget: Annotated[int, typer.Option(min=1, help="Most tokens in a row.")] = 1024,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 for torch's default.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of both ways; medians are shown.")] = 3,
) -> None:  # fmt: skip
    """Time a whole catalogue scored behind one shared prompt against separate rows, and compare the scores.

    Examples:

        dmpo bench catalogue --titles 1700 --prompt 256 --threads 1

        dmpo bench catalogue -m runs/ml/dmpo/model --catalogue runs/ml/data
    """
    from dmpo_dist.bench.catalogue import bench_catalogue as run
    from dmpo_dist.bench.catalogue import show
    from dmpo_dist.data.requests import read_catalogue
    from dmpo_dist.orchestration.runlog import make_console

    names = list(read_catalogue(catalogue).titles) if catalogue else None
    show(run(model, names, titles, prompt, token_budget, threads, rounds), make_console())


@bench_app.command("scaling")
def bench_scaling(
    config: Layers = None,
    overrides: Overrides = None,
    workers: Annotated[list[int] | None, typer.Option(min=1, help="Workers; repeatable.  [1 2]")] = None,
    zero: Annotated[list[int] | None, typer.Option(min=0, max=3, help="ZeRO stage; repeatable.  [0 1 2 3]")] = None,
    offload: Annotated[
        bool, typer.Option("--offload", help="Also stages 2 and 3 with offload to host memory.")
    ] = False,
    budget: Annotated[list[int] | None, typer.Option(min=16, help="Token budget; repeatable.  [4096]")] = None,
    groups: Annotated[int, typer.Option(min=1, help="Preference groups a step at the fewest workers.")] = 16,
    warmup: Annotated[int, typer.Option(min=1, help="Steps before measuring.")] = 3,
    steps: Annotated[int, typer.Option(min=3, help="Steps measured.")] = 10,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the sweep in output_dir.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Strong and weak scaling of `dmpo train`, each cell a Ray Train job: throughput, efficiency, memory, communication.

    Examples:

        dmpo bench scaling -c quickstart output_dir=runs/scaling

        dmpo bench scaling -c pretrained_lora --workers 1 --workers 8 --zero 2 --zero 3 --offload --groups 64 cluster.address=auto data.path=... output_dir=/shared/scaling
    """
    settings = read_settings(config, overrides, dry_run)
    from dmpo_dist.bench.scaling import Sweep, run_scaling
    from dmpo_dist.bench.scaling_report import report_scaling
    from dmpo_dist.orchestration.runlog import make_console

    sweep = Sweep(
        sorted(set(workers or [1, 2])), sorted(set(zero or range(4))), [False, True] if offload else [False],
        sorted(set(budget or [4096])), groups,
    )  # fmt: skip
    console = make_console()
    report_scaling(run_scaling(settings, sweep, warmup, steps, resume, console), settings.output_dir, console)
