"""`dmpo submit`."""

from pathlib import Path
from typing import Annotated

import typer

from dmpo_dist.cli.options import DryRun, Layers, Overrides, Resume, print_now, read_settings
from dmpo_dist.config import RunConfig
from dmpo_dist.submit.job import Target, Verb

submit_app = typer.Typer(help="Hand a run to Slurm, a Ray cluster or Kubernetes.", no_args_is_help=True)

To = Annotated[Target, typer.Option("--to", help="Kind of cluster.", show_default=False)]
RenderOnly = Annotated[
    bool, typer.Option("--render-only", help="Write the files, to ./submit or submit.folder, and submit nothing.")
]
Detach = Annotated[
    bool, typer.Option("--detach", help="Do not show the job's output until it ends (for Slurm it never is).")
]
Submitted = Annotated[Path, typer.Argument(help="output_dir or submit.folder of the submitted run.")]


@submit_app.command("sft")
def submit_sft(
    to: To,
    config: Layers = None,
    overrides: Overrides = None,
    resume: Resume = False,
    render_only: RenderOnly = False,
    detach: Detach = False,
    dry_run: DryRun = False,
) -> None:
    """Run `dmpo sft` on a cluster; see `dmpo submit train`."""
    _submit(to, "sft", read_settings(config, overrides, dry_run), resume, render_only, detach)


@submit_app.command("train")
def submit_train(
    to: To,
    config: Layers = None,
    overrides: Overrides = None,
    resume: Resume = False,
    render_only: RenderOnly = False,
    detach: Detach = False,
    dry_run: DryRun = False,
) -> None:
    """Run `dmpo train` on a cluster: writes readable files to output_dir/submit and submits them.

    Examples:

        dmpo submit train --to slurm -c pretrained_lora submit.nodes=2 submit.gpus_per_node=4 submit.slurm.partition=gpu
        data.path=... output_dir=/shared/runs/a

        dmpo submit train --to ray -c pretrained_lora submit.ray.address=http://head:8265 data.path=...
        output_dir=/shared/runs/a

        dmpo submit train --to kubernetes --render-only -c pretrained_lora submit.folder=a
        submit.kubernetes.image=registry.example.com/dmpo:cuda output_dir=/checkpoints/a
    """
    _submit(to, "train", read_settings(config, overrides, dry_run), resume, render_only, detach)


@submit_app.command("doctor")
def submit_doctor(
    to: To, config: Layers = None, overrides: Overrides = None, render_only: RenderOnly = False, detach: Detach = False
) -> None:
    """Run `dmpo doctor` on a cluster, where the driver of a run would be: a first test of it."""
    _submit(to, "doctor", read_settings(config, overrides, dry_run=False), False, render_only, detach)


@submit_app.command("status")
def submit_status(run: Submitted) -> None:
    """Print the state of a submitted run."""
    from dmpo_dist.submit.run import job_status

    print(job_status(run))


@submit_app.command("logs")
def submit_logs(run: Submitted) -> None:
    """Show the output of a submitted run until it ends; Ctrl-C does not stop the run."""
    from dmpo_dist.submit.run import job_logs

    job_logs(run, print_now)


@submit_app.command("stop")
def submit_stop(run: Submitted) -> None:
    """Stop a submitted run; `dmpo submit ... --resume` continues it."""
    from dmpo_dist.submit.run import stop_job

    print(stop_job(run))


def _submit(to: Target, verb: Verb, settings: RunConfig, resume: bool, render_only: bool, detach: bool) -> None:
    from dmpo_dist.submit.run import follow_job, submit_job

    record, folder = submit_job(to, verb, settings, resume, render_only, print_now)
    if record is not None and (detach or to == "slurm"):
        print(f"dmpo submit status|logs|stop {folder} asks for it, shows its output, ends it")
    elif record is not None:
        follow_job(record, folder, print_now)
