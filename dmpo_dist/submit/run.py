"""``dmpo submit``: render, check, submit, and later follow, ask and stop."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from dmpo_dist.config import RunConfig
from dmpo_dist.errors import UserError
from dmpo_dist.submit import kubernetes, ray_jobs, slurm
from dmpo_dist.submit.job import Job, Record, Target, Verb, check, choose_folder, find_record, write

TARGETS: dict[Target, ModuleType] = {"slurm": slurm, "ray": ray_jobs, "kubernetes": kubernetes}


def submit_job(
    target: Target, verb: Verb, config: RunConfig, resume: bool, render_only: bool, echo: Callable[[str], None]
) -> tuple[Record | None, Path]:
    """Render a job's files into a new folder and, unless ``render_only``, hand them to the cluster.

    Returns:
        What was submitted (None if only rendered), and the folder. When the cluster refuses the job or the user
        interrupts, the folder is removed again.

    Raises:
        UserError: see ``check`` here and of the target; nothing is left running then.
    """
    module = TARGETS[target]
    job = Job(verb, config, resume, choose_folder(config, render_only))
    check(job, target)
    files = module.files(job)
    if not render_only:
        module.check(job)
    write(job, files)
    for name in files:
        echo(f"wrote {job.folder / name}")
    if render_only:
        return None, job.folder
    try:
        record = module.submit(job, echo)
    except (UserError, KeyboardInterrupt):
        shutil.rmtree(job.folder)
        raise
    record.save(job.folder)
    return record, job.folder


def follow_job(record: Record, folder: Path, echo: Callable[[str], None]) -> None:
    """Show the job's output to its end; Ctrl-C leaves the job running.

    Raises:
        UserError: the output cannot be had, or the job failed.
    """
    try:
        TARGETS[record.target].follow(record, folder, echo)
    except KeyboardInterrupt:
        echo(f"the job goes on; dmpo submit logs {folder} shows more, dmpo submit stop {folder} ends it")


def job_status(run: Path) -> str:
    """State of the latest submission of ``run``."""
    record, _ = find_record(run)
    return f"{record.target} {record.id}: {TARGETS[record.target].status(record)}"


def stop_job(run: Path) -> str:
    """Stop the latest submission of ``run``; returns its state then."""
    record, _ = find_record(run)
    TARGETS[record.target].stop(record)
    return job_status(run)


def job_logs(run: Path, echo: Callable[[str], None]) -> None:
    """Show the output of the latest submission of ``run``."""
    record, folder = find_record(run)
    follow_job(record, folder, echo)
