"""A running Ray cluster: its Jobs API gets the configuration and a working directory, and runs the driver."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dmpo_dist.cluster.resources import shortage
from dmpo_dist.config.submit import RayJobsConfig
from dmpo_dist.errors import UserError
from dmpo_dist.submit.commands import Unanswered, interruptible
from dmpo_dist.submit.job import CONFIG_FILE, Record, SubmitJob, render

DRIVER = "driver.sh"
UPLOAD = "upload"
MIB = 2**20
POLL_SECONDS = 1.0
MAY_BE_LOST = 5
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
ADDRESS_NAMES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


def files(job: SubmitJob) -> dict[str, str]:
    """The submission, and the driver script and configuration that are uploaded.

    Raises:
        UserError: a path is relative, which would lie inside the uploaded copy.
    """
    for key, path in job.folders().items():
        if job.verb != "doctor" and not path.is_absolute():
            raise UserError(f"{key}={path}: must be absolute, a path on storage that all nodes of the cluster see")
    env = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | job.submit.env
    values = job.values() | {"target": "ray", "nodes": None, "retries": 0}
    address = job.submit.ray.address or "(from RAY_API_SERVER_ADDRESS)"
    asked = {"address": address, "submission_id": submission_id(job), "env": env}
    return {
        "submission.yaml": render("submission.yaml", values | asked),
        f"{UPLOAD}/{DRIVER}": render("driver.sh", values),
        f"{UPLOAD}/{CONFIG_FILE}": job.config_text(),
    }


def submission_id(job: SubmitJob) -> str:
    """The job's name and the folder's number, so that a second submission of a run has another id."""
    return job.name if job.folder.name == "submit" else f"{job.name}-{job.folder.name}"


def check(job: SubmitJob) -> None:
    """Refuse what this cluster cannot run.

    Raises:
        UserError: see ``connect``; more workers than the cluster has resources for, or too large a working directory.
    """
    settings = job.submit.ray
    _, headers, address = connect(settings)
    if job.verb != "doctor":
        have = resources(address, headers)
        gpus = job.config.cluster.gpus_per_worker
        lacking = shortage(job.config.cluster, float(bool(have.get("GPU"))) if gpus is None else gpus, have)
        if lacking:
            raise UserError(f"{lacking}; lower one of them")
    if settings.working_dir is not None:
        require_small(settings.working_dir, settings.excludes, settings.max_upload_mib)


def connect(settings: RayJobsConfig) -> tuple[Any, dict[str, str], str]:
    """A client of the cluster's Jobs API, the headers it sends, and the address.

    Raises:
        UserError: ray[default] is not installed, no address, no token or a wrong one, the head cannot be reached, or
            runs another version of Ray.
    """
    import logging
    from importlib.util import find_spec

    import ray
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in ("ray", "ray.dashboard.modules.dashboard_sdk"):  # the second has a level of its own
        logging.getLogger(name).setLevel(logging.ERROR)
    address, headers = _address(settings), _headers(settings)
    if find_spec("aiohttp") is None:  # Ray's client wants it, and says so less clearly
        raise UserError(
            "--to ray needs Ray's client (ray[default]); in your clone: pip install -c constraints.txt -e '.[submit]'"
        )
    try:
        client = JobSubmissionClient(address, headers=dict(headers))
        version = client._server_ray_version  # of the head; its get_version() is the API's version
    except AuthenticationError as error:
        raise UserError(_no_entry(address, str(error), bool(headers))) from None
    except (ConnectionError, RuntimeError, ValueError, requests.RequestException) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"submit.ray.address={address}: the Ray head cannot be reached ({first}); check the address, that the "
            "head's dashboard runs (ray[default] there, --dashboard-host=0.0.0.0), and that this machine reaches it "
            "(ssh -L 8265:head:8265)"
        ) from None
    if settings.check_versions and version != ray.__version__:
        raise UserError(
            f"{address} runs Ray {version}, this is Ray {ray.__version__}; install ray=={version} here, or submit all "
            "the same with submit.ray.check_versions=false"
        )
    return client, headers, address


def _address(settings: RayJobsConfig) -> str:
    """The configured address, or the environment's; Ray lets the environment win, so they must not differ."""
    there = {name: os.environ[name] for name in ADDRESS_NAMES if os.environ.get(name)}
    for name, value in there.items():
        if settings.address is not None and value.rstrip("/") != settings.address.rstrip("/"):
            raise UserError(f"submit.ray.address={settings.address}, but {name}={value}, which Ray obeys; unset {name}")
    address = settings.address or next(iter(there.values()), None)
    if address is None or not address.startswith(("http://", "https://")):
        raise UserError(
            f"where is the cluster ({address or 'no address'})? Give its head's dashboard, as in "
            "submit.ray.address=http://head:8265"
        )
    return address.rstrip("/")


def _headers(settings: RayJobsConfig) -> dict[str, str]:
    if settings.token_file is None:
        return {}
    try:
        token = settings.token_file.expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"submit.ray.token_file={settings.token_file}: cannot be read ({error})") from None
    if not token or not token.isascii() or len(token.split()) != 1:
        raise UserError(f"submit.ray.token_file={settings.token_file}: must hold one token and nothing else")
    return {"Authorization": f"Bearer {token}"}


def _no_entry(address: str, error: str, given: bool) -> str:
    wrong = "failed" in error.splitlines()[0]
    source = "submit.ray.token_file" if given else "RAY_AUTH_TOKEN or ~/.ray/auth_token"
    if wrong:
        return (
            f"{address} refuses the token of {source}: it is not the cluster's; ask whoever started the cluster for it"
        )
    return (
        f"{address} asks for a token, and none was sent; put it into a file that only you can read and set "
        "submit.ray.token_file, or set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
    )


def resources(address: str, headers: dict[str, str]) -> dict[str, float]:
    """Totals of the cluster's living nodes, such as {"CPU": 64, "GPU": 8}."""
    from ray.util.state import StateApiClient
    from ray.util.state.common import ListApiOptions, StateResource
    from ray.util.state.exception import RayStateApiException

    try:
        client = StateApiClient(address=address, headers=dict(headers))
        nodes = client.list(
            StateResource.NODES, ListApiOptions(limit=10_000, detail=True), raise_on_missing_output=False
        )
    except (RayStateApiException, ConnectionError, RuntimeError) as error:
        raise UserError(f"{address} does not say what nodes it has: {str(error).strip().splitlines()[0]}") from None
    totals: dict[str, float] = {}
    for node in nodes:
        if node["state"] == "ALIVE":
            for name, amount in node["resources_total"].items():
                totals[name] = totals.get(name, 0.0) + float(amount)
    return totals


def require_small(folder: Path, excludes: list[str], limit_mib: float) -> None:
    """Refuse a working directory above ``limit_mib``, naming what is large in it.

    Raises:
        UserError: it is too large, or no folder.
    """
    if not folder.is_dir():
        raise UserError(f"submit.ray.working_dir={folder}: no such folder")
    ignore = shutil.ignore_patterns(*excludes)
    sizes: dict[str, int] = {}
    for parent, folders, names in os.walk(folder):
        out = ignore(parent, [*folders, *names])
        folders[:] = [name for name in folders if name not in out]
        for path in (Path(parent) / name for name in names if name not in out):
            top = path.relative_to(folder).parts[0]
            sizes[top] = sizes.get(top, 0) + path.lstat().st_size
    total = sum(sizes.values()) / MIB
    if total > limit_mib:
        largest = sorted(sizes.items(), key=lambda entry: -entry[1])[:3]
        listed = ", ".join(f"{name} ({size / MIB:.1f} MiB)" for name, size in largest)
        raise UserError(
            f"submit.ray.working_dir={folder} holds {total:.1f} MiB, more than "
            f"submit.ray.max_upload_mib={limit_mib:g}; the largest are {listed}: leave them out with "
            "submit.ray.excludes, or upload no working_dir"
        )


def submit(job: SubmitJob) -> Record:
    """Upload the working directory, which Ctrl-C interrupts, and start the driver.

    Raises:
        UserError: the cluster refuses it.
        Unanswered: the connection was lost before it answered.
    """
    import requests

    settings = job.submit.ray
    upload, number = job.folder / UPLOAD, submission_id(job)
    env = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | job.submit.env
    runtime_env = {"working_dir": str(upload), "env_vars": env}
    with interruptible():
        client, _, address = connect(settings)
        if settings.working_dir is not None:
            _copy(settings.working_dir, upload, settings.excludes)
        try:
            client._upload_working_dir_if_needed(runtime_env)  # submit_job's first step; it then only asks for the job
        except (RuntimeError, ValueError, requests.RequestException) as error:
            raise UserError(f"{address} does not take the upload: {_reason(error)}") from None
    try:
        client.submit_job(
            entrypoint=f"bash {DRIVER}",
            submission_id=number,
            runtime_env=runtime_env,
            metadata={"output_dir": str(job.config.output_dir)},
        )
    except requests.RequestException as error:
        raise Unanswered(f"{address} was lost before it answered ({_reason(error)})") from None
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{address} refuses the job: {_reason(error)}; if it has one of that name, choose another submit.name"
        ) from None
    token_file = str(settings.token_file.expanduser().absolute()) if settings.token_file else None
    return Record("ray", number, address, token_file=token_file)


def announce(record: Record, folder: Path) -> str:
    """What was submitted, in a line."""
    return f"{record.label} is submitted to {record.where}"


def look(job: SubmitJob) -> str:
    """The commands that show whether the cluster has the job, and end it."""
    return f"ray job status|stop --address {_address(job.submit.ray)} {submission_id(job)}"


def _copy(source: Path, upload: Path, excludes: list[str]) -> None:
    """The working directory beside the rendered files; what is rendered stays."""
    ours = {name: (upload / name).read_bytes() for name in (DRIVER, CONFIG_FILE)}
    clash = [name for name in ours if (source / name).exists()]
    if clash:
        raise UserError(
            f"submit.ray.working_dir={source} has a {clash[0]} of its own, which the run's would hide; rename it"
        )
    target, names = upload.resolve(), shutil.ignore_patterns(*excludes)

    def ignore(parent: str, entries: list[str]) -> set[str]:
        own = {entry for entry in entries if (Path(parent) / entry).resolve() == target.parent}
        return names(parent, entries) | own

    shutil.copytree(source, upload, ignore=ignore, dirs_exist_ok=True)


def _reason(error: Exception) -> str:
    """The last line of a server's traceback."""
    text = str(error)
    if "{" in text:
        with contextlib.suppress(ValueError):
            text = json.loads(text[text.index("{") : text.rindex("}") + 1]).get("msg", text)
    return [line for line in text.strip().splitlines() if line.strip()][-1]


def _client(record: Record) -> Any:
    token = Path(record.token_file) if record.token_file else None
    return connect(RayJobsConfig(address=record.where, token_file=token, check_versions=False))[0]


def status(record: Record) -> str:
    """The job's state as Ray reports it, with its message."""
    return _state(_client(record), record)


def _state(client: Any, record: Record) -> str:
    try:
        info = client.get_job_info(record.id)
    except RuntimeError as error:
        if "404" not in str(error):
            raise
        return "unknown there; the head has been started anew"
    return f"{info.status.value}{f' ({info.message})' if info.message else ''}"


def follow(record: Record, folder: Path, echo: Callable[[str], None]) -> None:
    """Show the driver's output until the job has ended; a lost connection is tried again.

    Raises:
        UserError: the job failed, or the head stays away.
    """
    import requests

    client, shown, lost, state = _client(record), 0, 0, ""
    while not state.startswith((*ENDED, "unknown")):
        try:
            state = _state(client, record)  # before the log, which is then complete when the job has ended
            log = client.get_job_logs(record.id) if not state.startswith("unknown") else ""
            lost = 0
        except (RuntimeError, requests.RequestException) as error:
            lost += 1
            if lost == MAY_BE_LOST:
                first = str(error).strip().splitlines()[0]
                raise UserError(
                    f"{record.where} no longer answers ({first}); the job may still run there: dmpo submit status "
                    f"{folder}"
                ) from None
            time.sleep(POLL_SECONDS)
            continue
        end = len(log) if state.startswith(ENDED) else log.rfind("\n") + 1
        if end > shown:
            echo(log[shown:end].removesuffix("\n"))
            shown = end
        time.sleep(0 if state.startswith(ENDED) else POLL_SECONDS)
    echo(f"Ray job {record.id}: {state}")
    if not state.startswith("SUCCEEDED"):
        raise UserError(f"the job ended as {state.split()[0]}; its output is above")


def stop(record: Record) -> None:
    """Stop the job and wait until it has ended."""
    client = _client(record)
    if _state(client, record).startswith((*ENDED, "unknown")):
        return
    client.stop_job(record.id)
    while not _state(client, record).startswith((*ENDED, "unknown")):
        time.sleep(POLL_SECONDS)
