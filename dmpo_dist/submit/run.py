"""``dmpo submit``: render, check, submit, and later follow, ask and stop."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from dmpo_dist.config import RunConfig
from dmpo_dist.errors import UserError
from dmpo_dist.submit import kubernetes, ray_jobs, slurm
from dmpo_dist.submit.commands import Unanswered, holding_interruptions, interruptible, say
from dmpo_dist.submit.job import RECORD_FILE, Record, SubmitJob, Target, Verb, check, choose_folder, find_record, write

TARGETS: dict[Target, ModuleType] = {"slurm": slurm, "ray": ray_jobs, "kubernetes": kubernetes}


def submit_job(
    target: Target, verb: Verb, config: RunConfig, resume: bool, render_only: bool, echo: Callable[[str], None]
) -> tuple[Record | None, Path]:
    """Render a job's files into a new folder and, unless ``render_only``, hand them to the cluster.

    Until the cluster has answered, Ctrl-C, SIGTERM and SIGHUP take everything back; afterwards the job goes on.

    Returns:
        What was submitted (None if only rendered), and the folder. It is removed again when nothing was.

    Raises:
        UserError: ``check`` of the job or of the target refuses it; nothing runs but what the message names.
    """
    with interruptible():
        try:
            module = TARGETS[target]
            job = SubmitJob(verb, config, resume, choose_folder(config, render_only))
            check(job, target)
            files = module.files(job)
            if not render_only:
                module.check(job)
            return _hand_over(job, target, files, render_only, echo), job.folder
        except KeyboardInterrupt as interruption:
            say(f"interrupted: {str(interruption) or 'nothing was submitted'}")
            raise


def _hand_over(
    job: SubmitJob, target: Target, files: dict[str, str], render_only: bool, echo: Callable[[str], None]
) -> Record | None:
    try:
        write(job, files)
        for name in files:
            echo(f"wrote {job.folder / name}")
        return None if render_only else _submit(job, target, echo)
    except Unanswered as error:
        raise UserError(
            f"{error}; the job may be on the cluster all the same, {TARGETS[target].look(job)} shows and ends it; its "
            f"files are kept in {job.folder}"
        ) from None
    except (UserError, KeyboardInterrupt) as error:
        if not (job.folder / RECORD_FILE).exists():
            shutil.rmtree(job.folder, ignore_errors=True)  # it may not be there
        elif isinstance(error, KeyboardInterrupt):  # it came with the announcement
            raise KeyboardInterrupt(_goes_on(job.folder)) from None
        raise


def _submit(job: SubmitJob, target: Target, echo: Callable[[str], None]) -> Record:
    """Submit a job and record it; when interrupted, neither."""
    module = TARGETS[target]
    with holding_interruptions() as interrupted:
        try:
            record = module.submit(job)
        except KeyboardInterrupt:
            if not interrupted:
                raise
            raise Unanswered("interrupted before the cluster answered") from None
        record.save(job.folder)
    if interrupted:
        _take_back(record, job.folder)
    echo(module.announce(record, job.folder))  # from here on Ctrl-C lets the job go on
    return record


def _goes_on(folder: Path) -> str:
    return f"the job goes on; dmpo submit logs {folder} shows more, dmpo submit stop {folder} ends it"


def _take_back(record: Record, folder: Path) -> NoReturn:
    """Stop a job whose submission was interrupted too late.

    Raises:
        KeyboardInterrupt: done.
        UserError: it cannot be stopped, or this too was interrupted.
    """
    try:
        TARGETS[record.target].stop(record)
    except (UserError, RuntimeError, OSError, KeyboardInterrupt) as error:
        reason = str(error).strip() or "interrupted again"
        raise UserError(
            f"interrupted, but {record.label} is submitted and may go on ({reason.splitlines()[0]}); end it with dmpo "
            f"submit stop {folder}"
        ) from None
    (folder / RECORD_FILE).unlink()
    raise KeyboardInterrupt(f"{record.label} was submitted meanwhile and is stopped")


def follow_job(record: Record, folder: Path, echo: Callable[[str], None]) -> None:
    """Show the job's output to its end.

    Raises:
        UserError: the output cannot be had, or the job failed.
        KeyboardInterrupt: interrupted; the job goes on, and that was said.
    """
    try:
        with interruptible():
            TARGETS[record.target].follow(record, folder, echo)
    except KeyboardInterrupt:
        say(_goes_on(folder))
        raise


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
