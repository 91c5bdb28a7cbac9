"""What is submitted, where its files go, and what is remembered of it."""

import re
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

import dmpo_dist
from dmpo_dist.artifacts.files import write_json, write_whole
from dmpo_dist.config import RunConfig, dump_config
from dmpo_dist.config.submit import LONGEST_NAME, SubmitConfig
from dmpo_dist.errors import UserError
from dmpo_dist.parsing import parsing

Target = Literal["slurm", "ray", "kubernetes"]
Verb = Literal["sft", "train", "doctor"]

CONFIG_FILE = "config.yaml"
RECORD_FILE = "submitted.json"
WRITTEN = ("output_dir", "reference.path", "cluster.storage_path")
"""Keys of folders that the job makes, so that they need not be there before."""


@dataclass(frozen=True)
class SubmitJob:
    """A dmpo command to run on a cluster.

    Args:
        verb: the command.
        config: its configuration.
        resume: go on with the run in output_dir from the start.
        folder: where the rendered files lie.
    """

    verb: Verb
    config: RunConfig
    resume: bool
    folder: Path

    @property
    def submit(self) -> SubmitConfig:
        return self.config.submit

    @property
    def name(self) -> str:
        """The job's name: as configured, or from the last two parts of output_dir; what is cut off is in a digest."""
        if self.submit.name is not None:
            return self.submit.name
        parts = [part for part in self.config.output_dir.parts if part not in ("/", "..", ".")][-2:]
        slug = re.sub(r"[^a-z0-9]+", "-", "-".join(["dmpo", *parts, self.verb]).lower())
        if len(slug) <= LONGEST_NAME:
            return slug.strip("-")
        digest = sha256(slug.encode()).hexdigest()[:7]
        return f"{slug[: LONGEST_NAME - 8].strip('-')}-{digest}"

    @property
    def gpus_per_worker(self) -> float:
        """As ``cluster.train`` decides on the cluster: one where there are GPUs, unless configured."""
        given = self.config.cluster.gpus_per_worker
        return given if given is not None else float(self.submit.gpus_per_node > 0)

    @property
    def paths(self) -> list[str]:
        """Paths that every node must see: data, and the model and DeepSpeed file where these are paths."""
        if self.verb == "doctor":
            return []
        return [str(path) for key, path in self.folders().items() if key not in WRITTEN]

    def folders(self) -> dict[str, Path]:
        """The files and folders that the configuration names, by key; hub ids, shipped files and URIs are none."""
        config = self.config
        paths = {"output_dir": config.output_dir}
        if config.data.path is not None:
            paths["data.path"] = config.data.path
        model = Path(config.model.path)
        if config.model.path.startswith(("/", "./", "../")) or model.exists():
            paths["model.path"] = model
        if config.deepspeed.endswith(".json"):
            paths["deepspeed"] = Path(config.deepspeed)
        if config.reference.path is not None:
            paths["reference.path"] = config.reference.path
        storage = config.cluster.storage_path
        if storage is not None and "://" not in storage:
            paths["cluster.storage_path"] = Path(storage)
        return paths

    def config_text(self) -> str:
        """The configuration for the cluster, without the section ``submit``, which may change on ``--resume``."""
        return dump_config(self.config.model_copy(update={"submit": SubmitConfig()}))

    def values(self) -> dict[str, Any]:
        """What every template may use."""
        import ray

        return {
            "job": self,
            "submit": self.submit,
            "cluster": self.config.cluster,
            "output": str(self.config.output_dir),
            "config_file": str(self.folder / CONFIG_FILE),
            "dmpo_version": dmpo_dist.__version__,
            "ray_version": ray.__version__,
        }


def render(template: str, values: dict[str, Any]) -> str:
    """A template of ``submit/templates`` filled in; ``sh`` quotes for the shell, ``tojson`` for YAML."""
    import shlex

    from jinja2 import Environment, FunctionLoader, StrictUndefined

    folder = resources.files("dmpo_dist.submit") / "templates"
    environment = Environment(
        loader=FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        comment_start_string="{##",  # bash has ${#array[@]}
        comment_end_string="##}",
    )
    environment.filters["sh"] = lambda value: shlex.quote(str(value))
    return environment.get_template(template).render(values)


def check(job: SubmitJob, target: Target) -> None:
    """Refuse what no cluster could run.

    Raises:
        UserError: an odd folder name, no data.path, an address beside the target, more workers than the nodes asked for
            can hold.
    """
    config, submit = job.config, job.submit
    if not re.fullmatch(r"[\w./+@=,-]+", str(job.folder)):
        raise UserError(
            f"submit.folder={job.folder}: a space or a sign that scripts trip over; choose another submit.folder"
        )
    if job.verb != "doctor" and config.data.path is None:
        raise UserError("data.path is not set; give the folder of the prepared data as the cluster's nodes see it")
    if config.cluster.address not in (None, "auto"):
        raise UserError(
            f"cluster.address={config.cluster.address}: a submitted job finds its own cluster; leave it out "
            "(--to ray takes submit.ray.address, the head's http address)"
        )
    if target == "ray" or job.verb == "doctor":
        return
    cpus, gpus = config.cluster.cpus_per_worker, job.gpus_per_worker
    fit = int(submit.cpus_per_node / cpus)
    if gpus:
        fit = min(fit, int(submit.gpus_per_node / gpus))
    if config.cluster.workers > submit.nodes * fit:
        raise UserError(
            f"cluster.workers={config.cluster.workers} with {cpus:g} CPUs and {gpus:g} GPUs each do not fit on "
            f"submit.nodes={submit.nodes} with submit.cpus_per_node={submit.cpus_per_node} and "
            f"submit.gpus_per_node={submit.gpus_per_node}, which hold {submit.nodes * fit}; ask for more, or lower "
            "cluster.workers"
        )


def choose_folder(config: RunConfig, render_only: bool) -> Path:
    """submit.folder, or output_dir/submit; where that holds files already, the first of submit-2, submit-3, ... free.

    What is only rendered goes to ./submit: output_dir may be a path on the cluster that this machine does not
    have.
    """
    first = config.submit.folder or (Path() if render_only else config.output_dir) / "submit"
    candidates = (first, *(first.parent / f"{first.name or 'submit'}-{n}" for n in range(2, 1000)))
    return next(
        folder for folder in candidates if not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    )


def write(job: SubmitJob, files: dict[str, str]) -> None:
    """Write rendered files (name -> text) into the job's folder; scripts become executable.

    Raises:
        UserError: it cannot be written.
    """
    try:
        for name, text in files.items():
            path = job.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text)
            if text.startswith("#!"):
                path.chmod(0o755)
    except OSError as error:
        raise UserError(
            f"{job.folder}: {error.strerror}; where output_dir is not on this machine, say where to keep what is "
            "rendered, as in submit.folder=submitted/my-run"
        ) from None


@dataclass(frozen=True)
class Record:
    """What was submitted: enough to ask for it and to stop it."""

    target: Target
    id: str
    where: str = ""
    """Ray: the address; Kubernetes: the namespace."""
    context: str | None = None
    token_file: str | None = None

    @property
    def label(self) -> str:
        """What the cluster's own tools would call it."""
        kind = {"slurm": "Slurm job", "ray": "Ray job", "kubernetes": "RayJob"}[self.target]
        return f"{kind} {self.id}"

    def save(self, folder: Path) -> None:
        write_json(folder / RECORD_FILE, asdict(self))


def find_record(run: Path) -> tuple[Record, Path]:
    """The latest submission recorded in ``run`` (an output_dir or a folder of rendered files), and its folder.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    found = [path for path in (run / RECORD_FILE, *run.glob(f"submit*/{RECORD_FILE}")) if path.is_file()]
    if not found:
        raise UserError(f"{run}: nothing submitted is recorded there; give the run's output_dir, or its submit.folder")
    latest = max(found, key=lambda path: path.stat().st_mtime)
    with parsing(latest, "was it written by `dmpo submit`? Look for the job by the cluster's own tools"):
        return TypeAdapter(Record).validate_json(latest.read_text(encoding="utf-8")), latest.parent
