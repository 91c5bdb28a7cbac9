"""The command line: one thin function per verb; the work is done in orchestration and data."""

import errno
import logging
import os
import shutil
import sys
import time
import warnings
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from dmpo_dist import __version__
from dmpo_dist.config import RunConfig, dump_config, load_config
from dmpo_dist.errors import UserError
from dmpo_dist.submit.job import Target, Verb

STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
SECONDS_FOR_RANK_0 = 3

app = typer.Typer(
    name="dmpo",
    help="Fine-tune language models into personalised rankers by Direct Multi-Preference Optimization, on Ray and DeepSpeed.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Turn interaction logs into preference groups.", no_args_is_help=True)
config_app = typer.Typer(help="Look at and check configurations.", no_args_is_help=True)
bench_app = typer.Typer(help="Measure speed and memory against the alternatives.", no_args_is_help=True)
submit_app = typer.Typer(help="Hand a run to Slurm, a Ray cluster or Kubernetes.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(config_app, name="config")
app.add_typer(bench_app, name="bench")
app.add_typer(submit_app, name="submit")

Layers = Annotated[
    list[Path] | None,
    typer.Option("-c", "--config", help="YAML file, or the name of a recipe in launch/recipes; later ones win."),
]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value overrides, such as train.learning_rate=1e-4.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and stop.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in output_dir from its latest checkpoint.")]
To = Annotated[Target, typer.Option("--to", help="Kind of cluster.", show_default=False)]
RenderOnly = Annotated[bool, typer.Option("--render-only", help="Write the files and submit nothing.")]
Detach = Annotated[bool, typer.Option("--detach", help="Do not follow the output (Slurm is never followed at once).")]
Submitted = Annotated[Path, typer.Argument(help="output_dir or submit.folder of the submitted run.")]


@data_app.command("prepare")
def data_prepare(config: Layers = None, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Split interactions by time, draw negatives and write preference groups to data.path.

    Examples:

        dmpo data prepare data.path=runs/data

        dmpo data prepare -c movielens data.source.path=ml-latest-small data.path=runs/ml/data
    """
    settings = _settings(config, overrides, dry_run)
    if settings.data.path is None:
        raise UserError("data.path is not set; say where to write the prepared data, as in data.path=runs/data")
    from dmpo_dist.data.prepare import prepare

    prepare(settings.data, settings.seed, settings.data.path, echo=print)


@app.command()
def sft(config: Layers = None, overrides: Overrides = None, resume: Resume = False, dry_run: DryRun = False) -> None:
    """First stage: supervised fine-tuning on the positives (and, if asked, the histories).

    Examples:

        dmpo sft -c movielens data.path=runs/ml/data output_dir=runs/ml/sft

        torchrun --nproc-per-node 2 -m dmpo_dist sft -c movielens data.path=runs/ml/data output_dir=runs/ml/sft
    """
    _stage("sft", _settings(config, overrides, dry_run), resume)


@app.command()
def train(config: Layers = None, overrides: Overrides = None, resume: Resume = False, dry_run: DryRun = False) -> None:
    """Second stage: preference optimization, one positive against K negatives per group.

    Examples:

        dmpo train -c movielens model.path=runs/ml/sft/model data.path=runs/ml/data output_dir=runs/ml/dmpo

        dmpo train -c movielens objective.name=sdpo cluster.workers=4 deepspeed=zero3 output_dir=runs/ml/sdpo

        dmpo train -c movielens output_dir=runs/ml/dmpo --resume
    """
    _stage("train", _settings(config, overrides, dry_run), resume)


@app.command()
def evaluate(
    config: Layers = None,
    overrides: Overrides = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", "-m", help="NAME=FOLDER of a model to rank with; repeatable.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Rank the test requests with models and baselines on the same candidates; writes to output_dir.

    Examples:

        dmpo evaluate -c movielens -m sft=runs/ml/sft/model -m dmpo=runs/ml/dmpo/model data.path=runs/ml/data output_dir=runs/ml/evaluation
    """
    from dmpo_dist.orchestration.evaluate import evaluate as run
    from dmpo_dist.orchestration.evaluate import preflight
    from dmpo_dist.orchestration.runlog import make_console
    from dmpo_dist.orchestration.stage import open_run_folder

    settings = _settings(config, overrides, dry_run)
    models = _models(model or [])
    preflight(models, settings)  # before there is a folder
    open_run_folder(settings, resume=False)
    run(models, settings, settings.output_dir, make_console())


@app.command()
def quickstart(overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Simulate users, train SFT and DMPO on two local Ray workers, and measure the ranking: a few minutes on two cores.

    Examples:

        dmpo quickstart

        dmpo quickstart seed=1 output_dir=runs/quickstart-seed1
    """
    from dmpo_dist.orchestration.quickstart import quickstart as run
    from dmpo_dist.orchestration.runlog import make_console

    settings = _settings([Path("quickstart")], overrides, dry_run)
    if not any(o.startswith("output_dir=") for o in overrides or []):
        settings = settings.model_copy(update={"output_dir": _free(settings.output_dir)})
    run(settings, make_console())


@app.command()
def doctor(config: Layers = None, overrides: Overrides = None) -> None:
    """Show versions, accelerator, attention backends, shared memory and writable paths; exit 2 if something is missing.

    Examples:

        dmpo doctor

        dmpo doctor -c movielens output_dir=/shared/runs
    """
    from dmpo_dist.orchestration.doctor import examine
    from dmpo_dist.orchestration.runlog import make_console

    if not examine(_settings(config, overrides, dry_run=False), make_console()):
        raise typer.Exit(2)


@app.command()
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
        Path | None, typer.Option(help="An evaluation.json that ranks the model, for its card.")
    ] = None,
) -> None:
    """Write a trained model for others: adapter or whole weights, tokenizer, generation configuration, model card.

    Examples:

        dmpo export runs/dmpo/model exported --merge --data runs/ml/data --evaluation runs/ml/evaluation/evaluation.json

        dmpo export runs/dmpo/model exported-adapter
    """
    from dmpo_dist.export import export as run

    run(model, output, merge, dtype, shard_size, data, evaluation)


@app.command()
def architectures(
    output: Annotated[Path | None, typer.Option("--output", help="Also write the table to this file.")] = None,
) -> None:
    """Measure on tiny models which families share their prompt here and how exactly; print a Markdown table.

    Examples:

        dmpo architectures

        dmpo architectures --output docs/ARCHITECTURES.md
    """
    from dmpo_dist.architectures import show_architectures

    if not show_architectures(output):
        raise typer.Exit(1)


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
    settings = _settings(config, overrides, dry_run)
    from dmpo_dist.bench.step import run_bench_step
    from dmpo_dist.orchestration.runlog import make_console

    run_bench_step(settings, steps, rounds, make_console())


@submit_app.command("sft")
def submit_sft(
    to: To, config: Layers = None, overrides: Overrides = None, resume: Resume = False,
    render_only: RenderOnly = False, detach: Detach = False, dry_run: DryRun = False,
) -> None:  # fmt: skip
    """Run `dmpo sft` on a cluster; see `dmpo submit train`."""
    _submit(to, "sft", _settings(config, overrides, dry_run), resume, render_only, detach)


@submit_app.command("train")
def submit_train(
    to: To, config: Layers = None, overrides: Overrides = None, resume: Resume = False,
    render_only: RenderOnly = False, detach: Detach = False, dry_run: DryRun = False,
) -> None:  # fmt: skip
    """Run `dmpo train` on a cluster: writes readable files to output_dir/submit and submits them.

    Examples:

        dmpo submit train --to slurm -c pretrained_lora submit.nodes=2 submit.gpus_per_node=4 submit.slurm.partition=gpu data.path=... output_dir=/shared/runs/a

        dmpo submit train --to ray -c pretrained_lora submit.ray.address=http://head:8265 data.path=... output_dir=/shared/runs/a

        dmpo submit train --to kubernetes --render-only -c pretrained_lora submit.folder=a submit.kubernetes.image=... output_dir=/checkpoints/a
    """
    _submit(to, "train", _settings(config, overrides, dry_run), resume, render_only, detach)


@submit_app.command("doctor")
def submit_doctor(
    to: To, config: Layers = None, overrides: Overrides = None, render_only: RenderOnly = False, detach: Detach = False
) -> None:
    """Run `dmpo doctor` where a run's driver would: a first look at a cluster."""
    _submit(to, "doctor", _settings(config, overrides, dry_run=False), False, render_only, detach)


@submit_app.command("status")
def submit_status(run: Submitted) -> None:
    """Say what the cluster does with a submitted run."""
    from dmpo_dist.submit.run import job_status

    print(job_status(run))


@submit_app.command("logs")
def submit_logs(run: Submitted) -> None:
    """Show a submitted run's output to its end; Ctrl-C leaves the run alone."""
    from dmpo_dist.submit.run import job_logs

    job_logs(run, _print_now)


@submit_app.command("stop")
def submit_stop(run: Submitted) -> None:
    """Stop a submitted run; `dmpo submit ... --resume` goes on with it."""
    from dmpo_dist.submit.run import stop_job

    print(stop_job(run))


@config_app.command("show")
def config_show(config: Layers = None, overrides: Overrides = None) -> None:
    """Print the resolved configuration as YAML.

    Examples:

        dmpo config show -c quickstart train.negatives=15
    """
    print(dump_config(_settings(config, overrides, dry_run=False)), end="")


@config_app.command("validate")
def config_validate(config: Layers = None, overrides: Overrides = None) -> None:
    """Check configuration files; exit 2 with the first mistakes named.

    Examples:

        dmpo config validate -c my.yaml
    """
    _settings(config, overrides, dry_run=False)
    print("valid: " + (", ".join(str(layer) for layer in config) if config else "the defaults"))


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
    json = json or _free(Path("runs/bench-speed")) / "speed.json"
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
    settings = _settings(config, overrides, dry_run)
    from dmpo_dist.bench.scaling import Sweep, run_scaling
    from dmpo_dist.bench.scaling_report import report_scaling
    from dmpo_dist.orchestration.runlog import make_console

    sweep = Sweep(
        sorted(set(workers or [1, 2])), sorted(set(zero or range(4))), [False, True] if offload else [False],
        sorted(set(budget or [4096])), groups,
    )  # fmt: skip
    console = make_console()
    report_scaling(run_scaling(settings, sweep, warmup, steps, resume, console), settings.output_dir, console)


@bench_app.command("simulate")
def bench_simulate(
    cells: Annotated[
        Path | None, typer.Option(help="Output folder of `dmpo bench scaling`: check the model against its cells.")
    ] = None,
    model_config: Annotated[Path | None, typer.Option(help="A config.json: simulate it from 1 to 4,096 GPUs.")] = None,
    gpu: Annotated[str, typer.Option(help="GPU, for its peak.")] = "H100",
    mfu: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the peak it achieves.")] = 0.35,
    zero: Annotated[list[int] | None, typer.Option(min=0, max=3, help="ZeRO stage; repeatable.  [2 3]")] = None,
    lora_rank: Annotated[int, typer.Option(min=0, help="Rank of the adapters; 0 trains all weights.")] = 0,
    prompt: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 256,
    response: Annotated[int, typer.Option(min=2, help="Response tokens.")] = 12,
    negatives: Annotated[int, typer.Option(min=1, help="Negatives K.")] = 7,
    groups: Annotated[int, typer.Option(min=1, help="Groups a GPU and step.")] = 32,
    micro_batches: Annotated[int, typer.Option(min=1, help="Micro-batches a GPU and step.")] = 4,
    node_bandwidth: Annotated[float, typer.Option(help="GB/s a GPU within a node.")] = 300,
    fabric_bandwidth: Annotated[float, typer.Option(help="GB/s a GPU between nodes.")] = 40,
    overlap: Annotated[float, typer.Option(min=0, max=1, help="Share of the collectives that is hidden.")] = 0.5,
    jitter: Annotated[float, typer.Option(min=0, help="Spread of computing times over their mean.")] = 0.02,
    failure_hours: Annotated[float, typer.Option(help="Hours between failures of a GPU.")] = 50_000,
    checkpoint_seconds: Annotated[float, typer.Option(help="To write a checkpoint.")] = 60,
    restart_seconds: Annotated[float, typer.Option(help="From a failure to training again.")] = 300,
    output: Annotated[Path, typer.Option(help="Result file; the plot lies beside it.")] = Path("runs/simulation.json"),
) -> None:
    """Model steps on N GPUs: checked against measured cells, and from 1 to 4,096 GPUs with failures and checkpoints.

    Examples:

        dmpo bench simulate --cells runs/scaling

        dmpo bench simulate --model-config Llama-3-8B/config.json --gpu H100 --zero 2 --zero 3
    """
    from dmpo_dist.bench import simulation
    from dmpo_dist.bench.flops import DENSE_BF16_PEAKS, known_peak
    from dmpo_dist.bench.settings import check_outputs
    from dmpo_dist.orchestration.runlog import make_console
    from dmpo_dist.planning.network import Link, Network
    from dmpo_dist.planning.simulate import Machine

    peak = known_peak(gpu)
    if cells is None and model_config is None:
        raise UserError("give --cells to check the model, --model-config to simulate one, or both")
    if peak is None:
        raise UserError(f"--gpu {gpu} is not known; known are {', '.join(DENSE_BF16_PEAKS)}")
    console = make_console()
    if cells is not None:
        simulation.show_calibration(simulation.read_cells(cells), console)
    if model_config is not None:
        check_outputs(output, output.with_suffix(".png"))
        network = Network(Link(3e-6, 1e9 * node_bandwidth), Link(10e-6, 1e9 * fabric_bandwidth), gpus_per_node=8)
        machine = Machine(
            peak * mfu, 0.005, network, overlap, jitter, failure_hours, checkpoint_seconds, restart_seconds
        )
        works = [
            simulation.make_workload(model_config, prompt, response, negatives, groups, micro_batches, lora_rank, stage)
            for stage in sorted(set(zero or [2, 3]))
        ]
        title = f"{model_config.parent.name or model_config}, {gpu} at {mfu:.0%} of its peak, P={prompt} R={response} K={negatives}"
        simulation.run_simulation(works, machine, title, output, console)


runs_app = typer.Typer(help="Look at and compare the runs below a folder.", no_args_is_help=True)
app.add_typer(runs_app, name="runs")
Compared = Annotated[list[Path], typer.Argument(metavar="RUN RUN ...", help="output_dirs of training runs.")]


@runs_app.command("list")
def runs_list(root: Annotated[Path, typer.Argument(help="Folder that holds runs.")] = Path("runs")) -> None:
    """All training runs below a folder: stage, steps, best validation, test figures, speed, commit, finished or not.

    Examples:

        dmpo runs list runs/ml
    """
    from dmpo_dist.orchestration.compare import show_runs
    from dmpo_dist.orchestration.runlog import make_console
    from dmpo_dist.orchestration.runs import find_runs

    show_runs(find_runs(root), root, make_console())


@runs_app.command("compare")
def runs_compare(
    runs: Compared,
    evaluations: Annotated[
        Path | None, typer.Option(help="Folder that holds evaluations.  [the folder that holds all runs]")
    ] = None,
) -> None:
    """Settings that differ, final figures, and paired differences on the test requests where `dmpo evaluate` ranked both.

    Examples:

        dmpo runs compare runs/ml/sft runs/ml/dmpo
    """
    from dmpo_dist.orchestration.compare import find_evaluations, run_names, show_comparison
    from dmpo_dist.orchestration.runlog import make_console
    from dmpo_dist.orchestration.runs import read_run

    found, root = [read_run(folder) for folder in _several(runs)], _common(runs)
    show_comparison(found, run_names(found, root), find_evaluations(evaluations or root), make_console())


@runs_app.command("plot")
def runs_plot(
    runs: Compared,
    metric: Annotated[str, typer.Option(help="Validation metric.")] = "ndcg@10",
    output: Annotated[Path, typer.Option("--output", help="PNG to write.")] = Path("runs.png"),
) -> None:
    """Loss, margin and validation of several runs in one picture.

    Examples:

        dmpo runs plot runs/ml/dmpo runs/ml/sdpo --output runs/ml/compare.png
    """
    from dmpo_dist.bench.settings import check_outputs
    from dmpo_dist.orchestration.compare import plot_runs, run_names
    from dmpo_dist.orchestration.runs import read_run

    found = [read_run(folder) for folder in _several(runs)]
    check_outputs(output)
    plot_runs(found, run_names(found, _common(runs)), metric, output)
    print(f"written: {output}")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"dmpo_dist {__version__}")
        raise typer.Exit


def main() -> NoReturn:
    """Run the command line; a user's mistake is one message and exit status 2."""
    _quiet()
    try:
        code = app(standalone_mode=False) or 0  # click hands typer.Exit's code back instead of raising it
    except UserError as error:
        _tell(str(error))
        code = 2
    except OSError as error:
        if error.errno not in STORAGE:
            raise
        where = error.filename or "output_dir"
        _tell(f"{where}: {error.strerror}; check space and permissions, or write to another output_dir or data.path")
        code = 2
    except typer.Abort:
        code = 130
    except Exception as error:
        if not hasattr(error, "format_message"):  # not a usage error of click's
            raise
        if error.format_message():  # nothing where the help was shown instead
            _tell(f"{error.format_message()}; see dmpo --help")
        code = 2
    sys.exit(code)


def _tell(message: str) -> None:
    """Print an error: rank 0 at once; another rank only if torchrun, seeing rank 0 gone, has not ended it by then."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(SECONDS_FOR_RANK_0)
        message = f"rank {rank}: {message}"
    print(f"error: {message}", file=sys.stderr)


def _settings(layers: list[Path] | None, overrides: list[str] | None, dry_run: bool) -> RunConfig:
    settings = load_config([_layer(layer) for layer in layers or []], overrides)
    if dry_run:
        print(dump_config(settings), end="")
        raise typer.Exit
    return settings


def _layer(layer: Path) -> Path:
    """A file, or the recipe of that name."""
    folder = resources.files("dmpo_dist.recipes")
    recipe = folder / f"{layer}.yaml"
    if layer.exists() or recipe.is_file():
        return layer if layer.exists() else Path(str(recipe))
    known = sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
    raise UserError(f"--config {layer}: no such file, and no recipe of that name; recipes are {', '.join(known)}")


def _stage(kind: str, settings: RunConfig, resume: bool) -> None:
    from dmpo_dist.orchestration.runlog import make_console
    from dmpo_dist.orchestration.stage import run_stage

    run_stage("sft" if kind == "sft" else "train", settings, make_console(), resume)


def _submit(to: Target, verb: Verb, settings: RunConfig, resume: bool, render_only: bool, detach: bool) -> None:
    from dmpo_dist.submit.run import follow_job, submit_job

    record, folder = submit_job(to, verb, settings, resume, render_only, _print_now)
    if record is not None and (detach or to == "slurm"):
        print(f"dmpo submit status|logs|stop {folder} asks for it, shows its output, ends it")
    elif record is not None:
        follow_job(record, folder, _print_now)


def _print_now(line: str) -> None:
    print(line, flush=True)


def _models(entries: list[str]) -> dict[str, str]:
    """Name -> folder."""
    models: dict[str, str] = {}
    for entry in entries:
        name, sep, path = entry.partition("=")
        if not sep or not name or not path:
            raise UserError(
                f"--model {entry!r} is not of the form NAME=FOLDER, for example --model dmpo=runs/dmpo/model"
            )
        if name in models:
            raise UserError(f"--model {name}= is given twice, for {models[name]} and {path}; choose another name")
        models[name] = path
    return models


def _several(runs: list[Path]) -> list[Path]:
    if len(set(runs)) < max(2, len(runs)):
        raise UserError(f"{' '.join(map(str, runs))}: give two or more different runs; `dmpo runs list` shows them")
    return runs


def _common(folders: list[Path]) -> Path:
    """The deepest folder that holds all of ``folders``."""
    return Path(os.path.commonpath(folders))


def _free(folder: Path) -> Path:
    """``folder``, or the first of folder-2, folder-3, ... that does not exist."""
    if not folder.exists():
        return folder
    number = next(n for n in range(2, 10_000) if not folder.with_name(f"{folder.name}-{n}").exists())
    other = folder.with_name(f"{folder.name}-{number}")
    print(f"{folder} exists already and is kept; writing to {other}")
    return other


def _quiet() -> None:
    """Silence what third-party imports print; our own lines say what matters."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if shutil.which("nvidia-smi") is None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed warns where it has to find out
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    for name in ("ray", "deepspeed", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
