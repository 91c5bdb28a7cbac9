"""`dmpo bench`."""

from pathlib import Path
from typing import Annotated

import typer

from dmpo_dist.cli.options import DryRun, Layers, Overrides, free_folder, read_settings
from dmpo_dist.errors import UserError

bench_app = typer.Typer(
    help="Measure speed and memory, compare with alternatives, and model larger clusters.", no_args_is_help=True
)

WithoutTrl = Annotated[bool, typer.Option("--without-trl", help="Compare with our own separate rows alone.")]


@bench_app.command("speed")
def bench_speed(
    prompt: Annotated[list[int] | None, typer.Option(min=1, help="Prompt tokens; repeatable.  [64 256 1024]")] = None,
    negatives: Annotated[list[int] | None, typer.Option(min=1, help="Negatives K; repeatable.  [1 3 7 15]")] = None,
    vocab: Annotated[list[int] | None, typer.Option(min=16, help="Vocabulary; repeatable.  [4096 32000]")] = None,
    response: Annotated[int, typer.Option(min=2, help="Response tokens, end token included.")] = 12,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each implementation; medians are shown.")] = 5,
    groups_per_row: Annotated[
        int, typer.Option(min=1, help="Also compare so many groups in one row with one row each.")
    ] = 1,
    model_config: Annotated[
        Path | None, typer.Option(help="config.json of the model, whose weights are random.  [a Llama of 6 layers]")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu (fp32) or cuda (bf16).")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 for torch's default.")] = 0,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile our decoder layers with torch.compile.")] = False,
    without_trl: WithoutTrl = False,
    json: Annotated[Path | None, typer.Option(help="Result file.  [runs/bench-speed/speed.json]")] = None,
    png: Annotated[Path | None, typer.Option(help="Chart.  [beside the result file]")] = None,
) -> None:
    """Compare our step with our separate rows and TRL's DPOTrainer on the same tokens: speed, memory, FLOP ceilings.

    Examples:

        dmpo bench speed --prompt 256 --negatives 7 --vocab 4096

        dmpo bench speed --prompt 512 --negatives 7 --model-config Llama-3-8B/config.json --device cuda --compile
    """
    from dmpo_dist.bench import report, settings, speed
    from dmpo_dist.records.environment import describe_environment
    from dmpo_dist.records.log import make_console

    asked = settings.make_settings(
        prompts=prompt or [],
        negatives=negatives or [],
        vocabs=vocab or [],
        response=response,
        model_config=model_config,
        device=device,
        threads=threads,
        rounds=rounds,
        with_trl=not without_trl,
        groups_per_row=groups_per_row,
        compiled=compiled,
    )
    json = json or free_folder(Path("runs/bench-speed")) / "speed.json"
    png = png or json.with_suffix(".png")
    settings.check_outputs(json, png)
    console = make_console()
    result = speed.run(
        asked, describe_environment().content(), console.print, lambda so_far: report.write_json(so_far, json)
    )
    report.draw(result, png)
    report.show(result, console)
    print(f"written: {json} and {png}")


@bench_app.command("gate")
def bench_gate(
    baseline: Annotated[Path, typer.Option(help="What dmpo bench speed --json wrote.")],
    rounds: Annotated[int | None, typer.Option(min=1, help="Turns of each implementation.  [the baseline's]")] = None,
    without_trl: WithoutTrl = False,
    json: Annotated[Path | None, typer.Option(help="Also write the new figures there.")] = None,
) -> None:
    """Repeat a baseline's measurement; exit status 1 if memory grew by over 5 % or a speed-up fell by over 25 %.

    Examples:

        dmpo bench gate --baseline tests/benchmarks/speed_cpu.json
    """
    from dmpo_dist.bench import gate, report, settings, speed
    from dmpo_dist.records.environment import describe_environment
    from dmpo_dist.records.log import make_console

    before = gate.read_baseline(baseline)
    asked = settings.settings_of(before, rounds, not without_trl)
    if json:
        settings.check_outputs(json)
    console = make_console()
    result = speed.run(asked, describe_environment().content(), console.print)
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
    """Show what the time of an optimizer step of `dmpo train` is spent on, and what the training loop adds to it.

    Examples:

        dmpo bench step -c movielens data.path=runs/ml/data model.path=runs/ml/sft/model output_dir=runs/bench-step

        torchrun --nproc-per-node 2 -m dmpo_dist bench step -c movielens data.path=... model.path=... output_dir=...
    """
    settings = read_settings(config, overrides, dry_run)
    from dmpo_dist.bench.step import run_bench_step
    from dmpo_dist.records.log import make_console

    run_bench_step(settings, steps, rounds, make_console())


@bench_app.command("catalogue")
def bench_catalogue(
    model: Annotated[str | None, typer.Option("--model", "-m", help="Model folder.  [random Llama, 6 layers]")] = None,
    catalogue: Annotated[Path | None, typer.Option(help="As for dmpo rank.  [made-up titles]")] = None,
    titles: Annotated[int, typer.Option(min=1, help="Titles scored.")] = 1700,
    prompt: Annotated[int, typer.Option(min=1, help="Prompt tokens, at least.")] = 256,
    top: Annotated[int, typer.Option(min=1, help="Best titles that are also searched for alone.")] = 10,
    token_budget: Annotated[int, typer.Option(min=1, help="Most tokens in a row.")] = 1024,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0 for torch's default.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each way; medians are shown.")] = 3,
) -> None:
    """Score a catalogue behind one shared prompt and in separate rows, search its best titles, and compare.

    Examples:

        dmpo bench catalogue --titles 1700 --prompt 256 --threads 1

        dmpo bench catalogue -m runs/ml/dmpo/model --catalogue runs/ml/data
    """
    from dmpo_dist.bench.catalogue import bench_catalogue as run
    from dmpo_dist.bench.catalogue import show
    from dmpo_dist.data.requests import read_catalogue
    from dmpo_dist.records.log import make_console

    names = list(read_catalogue(catalogue).titles) if catalogue else None
    show(run(model, names, titles, prompt, top, token_budget, threads, rounds), make_console())


@bench_app.command("scaling")
def bench_scaling(
    config: Layers = None,
    overrides: Overrides = None,
    workers: Annotated[list[int] | None, typer.Option(min=1, help="Workers; repeatable.  [1 2]")] = None,
    zero: Annotated[list[int] | None, typer.Option(min=0, max=3, help="ZeRO stage; repeatable.  [0 1 2 3]")] = None,
    offload: Annotated[bool, typer.Option("--offload", help="Also ZeRO 2 and 3 with offload.")] = False,
    budget: Annotated[list[int] | None, typer.Option(min=16, help="Token budget; repeatable.  [4096]")] = None,
    groups: Annotated[int, typer.Option(min=1, help="Preference groups per step at the fewest workers.")] = 16,
    warmup: Annotated[int, typer.Option(min=1, help="Steps before measuring.")] = 3,
    steps: Annotated[int, typer.Option(min=3, help="Steps measured.")] = 10,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the sweep in output_dir.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Measure strong and weak scaling of `dmpo train`: throughput, efficiency, memory and communication.

    Examples:

        dmpo bench scaling -c quickstart output_dir=runs/scaling

        dmpo bench scaling -c pretrained_lora --workers 1 --workers 8 --zero 2 --zero 3 --offload --groups 64
        cluster.address=auto data.path=... output_dir=/shared/scaling
    """
    settings = read_settings(config, overrides, dry_run)
    from dmpo_dist.bench.scaling import Sweep, run_scaling
    from dmpo_dist.bench.scaling_report import report_scaling
    from dmpo_dist.records.log import make_console

    sweep = Sweep(
        workers=sorted(set(workers or [1, 2])),
        zero=sorted(set(zero or range(4))),
        offload=[False, True] if offload else [False],
        token_budgets=sorted(set(budget or [4096])),
        groups=groups,
    )
    console = make_console()
    report_scaling(run_scaling(settings, sweep, warmup, steps, resume, console), settings.output_dir, console)


@bench_app.command("simulate")
def bench_simulate(
    cells: Annotated[
        Path | None, typer.Option(help="Output folder of `dmpo bench scaling` to compare the model with.")
    ] = None,
    model_config: Annotated[
        Path | None, typer.Option(help="config.json of the model to simulate on 1 to 4,096 GPUs.")
    ] = None,
    gpu: Annotated[str, typer.Option(help="GPU of the table of `dmpo plan`, such as h100-80g or H100.")] = "H100",
    mfu: Annotated[
        float | None,
        typer.Option(min=0.01, max=1, help="Share of its peak that is reached.  [the table's, less for narrow models]"),
    ] = None,
    zero: Annotated[list[int] | None, typer.Option(min=0, max=3, help="ZeRO stage; repeatable.  [2 3]")] = None,
    lora_rank: Annotated[int, typer.Option(min=0, help="Rank of the adapters; 0 trains all weights.")] = 0,
    prompt: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 256,
    response: Annotated[int, typer.Option(min=2, help="Response tokens.")] = 12,
    negatives: Annotated[int, typer.Option(min=1, help="Negatives K.")] = 7,
    groups: Annotated[int, typer.Option(min=1, help="Preference groups of each GPU per step.")] = 32,
    micro_batches: Annotated[int, typer.Option(min=1, help="Micro-batches of each GPU per step.")] = 4,
    node_bandwidth: Annotated[float | None, typer.Option(help="GB/s of each GPU within a node.  [the table's]")] = None,
    fabric_bandwidth: Annotated[
        float | None, typer.Option(help="GB/s of each GPU between nodes.  [the table's]")
    ] = None,
    overlap: Annotated[float, typer.Option(min=0, max=1, help="Share of the collectives that computing hides.")] = 0.5,
    jitter: Annotated[float, typer.Option(min=0, help="Standard deviation of computing time / mean.")] = 0.02,
    failure_hours: Annotated[float, typer.Option(help="Hours between failures of a GPU.")] = 50_000,
    checkpoint_seconds: Annotated[float, typer.Option(help="Seconds to write a checkpoint.")] = 60,
    restart_seconds: Annotated[float, typer.Option(help="Seconds from a failure until training resumes.")] = 300,
    output: Annotated[Path, typer.Option(help="Result file; the plot lies beside it.")] = Path("runs/simulation.json"),
) -> None:
    """Model the speed of training on 1 to 4,096 GPUs with failures and checkpoints, or check the model by measurements.

    Examples:

        dmpo bench simulate --cells runs/scaling

        dmpo bench simulate --model-config Llama-3-8B/config.json --gpu H100 --zero 2 --zero 3
    """
    from dmpo_dist.bench import simulation
    from dmpo_dist.bench.settings import check_outputs
    from dmpo_dist.planning.gpus import FABRIC_LATENCY, NODE_LATENCY
    from dmpo_dist.planning.network import Link, Network
    from dmpo_dist.planning.simulate import Machine
    from dmpo_dist.records.log import make_console

    if cells is None and model_config is None:
        raise UserError("give --cells to check the model, --model-config to simulate one, or both")
    device, console = simulation.named_gpu(gpu), make_console()
    if cells is not None:
        simulation.show_calibration(simulation.read_cells(cells), console)
    if model_config is not None:
        check_outputs(output, output.with_suffix(".png"))
        hidden = simulation.read_shape(model_config, lora_rank).hidden
        share = device.mfu_at(hidden) if mfu is None else mfu
        node = Link(NODE_LATENCY, device.intra if node_bandwidth is None else 1e9 * node_bandwidth)
        fabric = Link(FABRIC_LATENCY, device.inter if fabric_bandwidth is None else 1e9 * fabric_bandwidth)
        machine = Machine(
            flops_per_second=device.bf16 * share,
            overhead=0.005,
            network=Network(node, fabric, simulation.PER_NODE),
            overlap=overlap,
            jitter=jitter,
            failure_hours=failure_hours,
            checkpoint_seconds=checkpoint_seconds,
            restart_seconds=restart_seconds,
        )
        works = [
            simulation.make_workload(model_config, prompt, response, negatives, groups, micro_batches, lora_rank, stage)
            for stage in sorted(set(zero or [2, 3]))
        ]
        name = model_config.parent.name or model_config
        title = f"{name}, {gpu} at {share:.0%} of its peak, P={prompt} R={response} K={negatives}"
        simulation.run_simulation(works, machine, title, output, console)
