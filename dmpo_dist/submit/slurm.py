"""Slurm: an sbatch script that starts Ray, or torchrun, over the job's nodes."""

import re
import time
from collections.abc import Callable
from pathlib import Path

from dmpo_dist.artifacts.run_folder import failed_early
from dmpo_dist.config.submit import SubmitConfig
from dmpo_dist.errors import UserError
from dmpo_dist.submit.commands import ask, attempt, hand_over
from dmpo_dist.submit.job import CONFIG_FILE, Record, SubmitJob, render

SCRIPT = "job.sbatch"
POLL_SECONDS = 2.0


def files(job: SubmitJob) -> dict[str, str]:
    """The script and the configuration it reads.

    Raises:
        UserError: torchrun with workers that do not divide among the nodes, or a command or setting it cannot heed.
    """
    slurm, workers, nodes = job.submit.slurm, job.config.cluster.workers, job.submit.nodes
    if slurm.launcher == "torchrun":
        if job.verb == "doctor":
            raise UserError("submit.slurm.launcher=torchrun starts ranks, and doctor has none; use launcher=ray")
        storage = job.config.cluster.storage_path
        if storage is not None:
            raise UserError(
                f"cluster.storage_path={storage} has no effect under torchrun, whose ranks keep "
                "checkpoints in output_dir; leave it out, or use submit.slurm.launcher=ray"
            )
        if workers % nodes:
            raise UserError(
                f"cluster.workers={workers} cannot be shared equally by submit.nodes={nodes}, as torchrun needs; use "
                f"cluster.workers={workers - workers % nodes or nodes}, or submit.slurm.launcher=ray"
            )
    values = job.values() | {"slurm": slurm, "ranks_per_node": workers // nodes}
    return {SCRIPT: render("slurm.sbatch", values), CONFIG_FILE: job.config_text()}


def check(job: SubmitJob) -> None:
    """Refuse what this Slurm cannot run.

    Raises:
        UserError: no Slurm on this machine, no such partition, more nodes, CPUs or GPUs than it has, a missing path, a
            run in output_dir that is not to be resumed.
    """
    for path in map(Path, job.paths):
        if not path.exists():
            raise UserError(
                f"{path}: no such file or folder on this machine; give a path on storage that all nodes see"
            )
    output = job.config.output_dir
    if not job.resume and (output / "config.yaml").exists() and not failed_early(output):
        raise UserError(
            f"output_dir {output} holds a run already; choose another (output_dir=...), or go on with it by --resume"
        )
    partition = job.submit.slurm.partition
    lines = ask("sinfo", "--noheader", "--Node", "--format=%R|%N|%c|%G").split()
    problem = unfit(job.submit, partition, lines)
    if problem:
        raise UserError(problem)


def unfit(submit: SubmitConfig, partition: str | None, lines: list[str]) -> str | None:
    """Why the nodes of ``sinfo --Node`` lines ``partition|node|cpus|gres`` will not do; None when they will."""
    rows = [line.split("|") for line in lines]
    known = sorted({row[0] for row in rows})
    if partition is not None and not set(partition.split(",")) <= set(known):
        return f"submit.slurm.partition={partition}: no such partition; this Slurm has {', '.join(known) or 'none'}"
    nodes = {
        row[1]: (int(row[2]), _gpus(row[3])) for row in rows if partition is None or row[0] in partition.split(",")
    }
    fit = sum(cpus >= submit.cpus_per_node and gpus >= submit.gpus_per_node for cpus, gpus in nodes.values())
    if fit >= submit.nodes:
        return None
    kinds: dict[tuple[int, int], int] = {}
    for kind in nodes.values():
        kinds[kind] = kinds.get(kind, 0) + 1
    has = ", ".join(f"{n} with {cpus} CPUs and {gpus} GPUs" for (cpus, gpus), n in sorted(kinds.items())) or "none"
    return (
        f"submit.nodes={submit.nodes} with submit.cpus_per_node={submit.cpus_per_node} and submit.gpus_per_node="
        f"{submit.gpus_per_node}: {'partition ' + partition if partition else 'this Slurm'} has {fit} such nodes (it "
        f"has {has}); ask for less, or for another partition"
    )


def _gpus(gres: str) -> int:
    """GPUs in a gres such as ``gpu:a100:8(S:0-1),nvme:1``."""
    return sum(int(n) for n in re.findall(r"(?:^|,)gpu(?::[^:,()]+)?:(\d+)", gres))


def submit(job: SubmitJob) -> Record:
    """Submit the rendered script.

    Raises:
        UserError: sbatch refuses it.
        Unanswered: Slurm did not answer in time.
    """
    out = hand_over("sbatch", "--parsable", str(job.folder / SCRIPT))
    return Record("slurm", out.strip().split(";")[0])


def announce(record: Record, folder: Path) -> str:
    """What was submitted, in a line."""
    return f"{record.label} is queued; its log: {folder}/slurm-{record.id}.log"


def look(job: SubmitJob) -> str:
    """The commands that show whether Slurm has the job, and end it."""
    return f"squeue|scancel --me --name={job.name}"


def status(record: Record) -> str:
    """The job's state as Slurm reports it, with the reason why it waits."""
    done = attempt("squeue", "--noheader", "--jobs", record.id, "--format=%T after %M (%R)")
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else "ended; not in the queue any more"


def follow(record: Record, folder: Path, echo: Callable[[str], None]) -> None:
    """Show the job's log until the job has left the queue."""
    log, at = folder / f"slurm-{record.id}.log", 0
    while True:
        ended = status(record).startswith("ended")
        if log.exists():
            with log.open(encoding="utf-8", errors="replace") as file:
                file.seek(at)
                text, at = file.read(), file.tell()
            if text:
                echo(text.removesuffix("\n"))
        if ended:
            return
        time.sleep(POLL_SECONDS)


def stop(record: Record) -> None:
    """Cancel the job."""
    ask("scancel", record.id)
